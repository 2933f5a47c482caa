// From a kernel of the table to work on a stream.
#pragma once

#include <stdint.h>

#include "host/plan.h"
#include "host/registry.h"

namespace flash::host {

// A kernel that has been loaded on a device. PTX for an older architecture keeps that one's tiles,
// so the shape is the loaded image's, not the device's.
struct Ready {
  const Kernel* kernel;
  CUkernel handle;
  Shape shape;
};

// Finds what serves a call and loads it where this is its first use on the device. What the driver
// refuses gives way to the next that serves.
bool prepare(Want want, const Device& device, Ready* ready);

// Launches a kernel that takes one parameter struct by value, in clusters of so many CTAs, or none.
// The device's context must be current.
bool launch(const Ready& ready, const Device& device, void* stream, int64_t num_ctas,
            const void* params, int cluster = 0);

}  // namespace flash::host
