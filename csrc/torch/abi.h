// The one place that knows which of torch's two ABIs this shim is built for.
#pragma once

#ifdef FLASH_FULL_ABI
#include "torch/full.h"
#else
#include "torch/stable.h"
#endif
