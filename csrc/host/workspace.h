// What is decided of a call before its memory is allocated: how it is cut, and what workspace that
// takes. False with the error set where no kernel serves it.
#pragma once

#include "host/api.h"
#include "host/driver.h"

namespace flash::host {

bool plan_forward(const Device& on, int dtype, int num_splits, ForwardParams* params,
                  FlashWorkspace* workspace);
bool plan_backward(const Device& on, int dtype, BackwardParams* params, FlashWorkspace* workspace);

}  // namespace flash::host
