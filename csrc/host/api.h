// The C ABI of the host library: plans a call, loads its kernels, launches them on a stream.
//
// Every function returns 1 for success and 0 for failure; flash_last_error() then tells the calling
// thread why. Functions that launch are asynchronous, may be called from any thread and inside the
// capture of a CUDA graph, and leave the caller's current context as it was. `device` is the
// ordinal that the driver knows; `stream` a CUstream of that device, or null.
#pragma once

#include "host/flash.h"

#ifdef _WIN32
#define FLASH_API extern "C" __declspec(dllexport)
#elif defined(__GNUC__)
#define FLASH_API extern "C" __attribute__((visibility("default")))
#else
#define FLASH_API extern "C"
#endif

enum FlashKind {
  FLASH_FORWARD,
  FLASH_COMBINE,
  FLASH_APPEND,
  FLASH_DELTA,
  FLASH_BACKWARD,
  FLASH_CONVERT,
  FLASH_S_DMASK,
  FLASH_FILL,
  FLASH_DQ,
  FLASH_DECODE,
  FLASH_NUM_KINDS
};

// Floats of scratch memory that a call needs; the caller allocates it, on the call's stream.
struct FlashWorkspace {
  int64_t o_partial;
  int64_t lse_partial;
  int64_t dq_accum;
  int64_t statistics;
  int64_t turns;      // of 4 bytes each
  int64_t next_tile;  // at a multiple of 8 bytes; of a backward call next_block
  int64_t decodes;    // 1: the call has few queries, and flash_decode() is to run it
  int64_t finished;   // of a backward call, of 4 bytes each, as those behind
  int64_t order;      // ForwardParams::line, in front of next_tile; or BackwardParams::order
};

FLASH_API const char* flash_last_error();

// Reads the table of kernels in a folder. Needs no driver, and does nothing the second time.
FLASH_API int flash_open(const char* kernel_folder);

FLASH_API int flash_num_kernels();

// Whether a kernel of a kind serves head dim `head_dim` (the wider of Q's and V's) on compute
// capability `cc` (10 * major + minor). Of the features only FLASH_QV counts. Needs no driver.
enum FlashFeature {
  FLASH_MASK = 1,
  FLASH_SCORED = 2,
  FLASH_DROPOUT = 4,
  FLASH_PAGES = 8,
  FLASH_QV = 16
};
FLASH_API int flash_find(int kind, int head_dim, int dtype, int cc, int features);

// The kernel that serves such a call of usual sizes, forward, backward or with one query, or null.
// Needs no driver.
FLASH_API const char* flash_kernel_of(int kind, int head_dim, int dtype, int cc, int features);

// 10 * major + minor of a device, 0 on failure.
FLASH_API int flash_compute_capability(int device);

// Fills in the order of tiles and the number of splits: `num_splits` as given, though no more than
// there are blocks of keys, or chosen where it is 0. Then o_partial, lse_partial and next_tile must
// be given if the workspace says so. Where flash_decode() is to run the call, 0 splits remain 0.
FLASH_API int flash_plan_forward(int device, int dtype, int num_splits,
                                 flash::ForwardParams* params, FlashWorkspace* workspace);

// A planned forward call: merges its splits, writes S_dmask (zeroed before) if it is given, and
// gives rows of o and lse that no sequence uses 0 and +inf.
FLASH_API int flash_forward(int device, void* stream, int dtype,
                            const flash::ForwardParams* params);

// Fills in the number of copies and columns of dq_accum, which must then be given, as must what
// else the workspace says, and the order of tiles. delta_batch, delta_head and deterministic are
// read.
FLASH_API int flash_plan_backward(int device, int dtype, flash::BackwardParams* params,
                                  FlashWorkspace* workspace);

// A planned backward call: delta, then dK and dV with sums for dQ, then dQ. Rows that no sequence
// uses get gradient 0.
FLASH_API int flash_backward(int device, void* stream, int dtype,
                             const flash::BackwardParams* params);

// A call whose plan says so, with new rows for its cache or without.
FLASH_API int flash_decode(int device, void* stream, int dtype, const flash::DecodeParams* params);

FLASH_API int flash_combine(int device, void* stream, int dtype,
                            const flash::CombineParams* params);

// New keys and values into the cache, rotated if asked for; rotated queries into q_rotated.
FLASH_API int flash_append(int device, void* stream, int dtype, const flash::AppendParams* params);
