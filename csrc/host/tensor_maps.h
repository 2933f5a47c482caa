// Operands as the tensor memory accelerator takes them.
#pragma once

#include "host/plan.h"

namespace flash::host {

// Whether the driver takes a call's tensors as they lie: rows at multiples of 16 bytes, each at a
// place of its own. Of a plan, which has no tensors yet, true.
bool have_tensor_maps(const ForwardParams& params, int element_bytes);
bool have_tensor_maps(const BackwardParams& params);

// The parameters of a kernel that loads and stores by that accelerator. Cheap enough for every
// call: 125 ns a map on an H100's host.
bool make_tma_params(const ForwardParams& params, const Shape& shape, int dtype, bool is_paired,
                     TmaForwardParams* made);
bool make_tma_params(const ForwardParams& params, const Shape& shape, int dtype,
                     TmaLatentParams* made);
bool make_tma_params(const BackwardParams& params, const Shape& shape, int dtype,
                     TmaBackwardParams* made);

}  // namespace flash::host
