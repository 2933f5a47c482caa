// The CUDA driver API, as far as this library uses it, opened at run time.
//
// Declared here, so that building needs no CUDA header and loading needs no CUDA library. Types and
// values are those of the driver's stable ABI (cuda.h); none of these functions has a second
// version.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace flash::host {

using CUresult = int;
using CUdevice = int;
using CUcontext = struct CUctx_st*;
using CUstream = struct CUstream_st*;
using CUlibrary = struct CUlib_st*;
using CUkernel = struct CUkern_st*;

enum : CUresult { kCudaSuccess = 0 };

enum CUdevice_attribute : int {
  kMultiprocessorCount = 16,
  kL2CacheSize = 38,
  kComputeCapabilityMajor = 75,
  kComputeCapabilityMinor = 76,
  kMaxSharedMemoryPerBlockOptIn = 97,
};

enum CUfunction_attribute : int {
  kMaxDynamicSharedSizeBytes = 8,
  kNonPortableClusterSizeAllowed = 14,
};

struct CUlaunchAttribute {
  int id;
  int value[17];  // the first of the 64 bytes behind eight

  // Allows a kernel to begin beside the end of the one in front on its stream.
  static CUlaunchAttribute overlap() { return {6, {0, 1}}; }
  // CTAs of a cluster.
  static CUlaunchAttribute cluster(int size) { return {4, {0, size, 1, 1}}; }
};

struct CUlaunchConfig {
  unsigned int gridDimX, gridDimY, gridDimZ;
  unsigned int blockDimX, blockDimY, blockDimZ;
  unsigned int sharedMemBytes;
  CUstream hStream;
  CUlaunchAttribute* attrs;
  unsigned int numAttrs;
};

// The driver's calling convention: __stdcall matters on 32-bit Windows only, which has no CUDA.
struct Driver {
  CUresult (*cuInit)(unsigned int flags);
  CUresult (*cuDriverGetVersion)(int* version);
  CUresult (*cuGetErrorName)(CUresult error, const char** text);
  CUresult (*cuGetErrorString)(CUresult error, const char** text);
  CUresult (*cuDeviceGet)(CUdevice* device, int ordinal);
  CUresult (*cuDeviceGetAttribute)(int* value, CUdevice_attribute attribute, CUdevice device);
  CUresult (*cuDevicePrimaryCtxRetain)(CUcontext* context, CUdevice device);
  CUresult (*cuCtxGetCurrent)(CUcontext* context);
  CUresult (*cuCtxSetCurrent)(CUcontext context);
  CUresult (*cuLibraryLoadData)(CUlibrary* library, const void* code, int* jit_options,
                                void** jit_values, unsigned int num_jit_options,
                                int* library_options, void** library_values,
                                unsigned int num_library_options);
  CUresult (*cuLibraryGetKernel)(CUkernel* kernel, CUlibrary library, const char* name);
  CUresult (*cuLibraryUnload)(CUlibrary library);
  CUresult (*cuKernelSetAttribute)(CUfunction_attribute attribute, int value, CUkernel kernel,
                                   CUdevice device);
  CUresult (*cuLaunchKernelEx)(const CUlaunchConfig* config, CUkernel kernel, void** params,
                               void** extra);
  CUresult (*cuOccupancyMaxActiveClusters)(int* count, CUkernel kernel,
                                           const CUlaunchConfig* config);
  CUresult (*cuTensorMapEncodeTiled)(void* map, int type, uint32_t rank, void* address,
                                     const uint64_t* dims, const uint64_t* strides,
                                     const uint32_t* box, const uint32_t* steps, int interleave,
                                     int swizzle, int l2_promotion, int fill);
};

// The driver, opened and initialised by the first caller; null with the error set where it cannot
// be.
const Driver* driver();

// True for success; else sets the error: what was done, and the driver's own words.
bool check(CUresult result, const char* what);

// What a tile plan must know of a device.
struct Device {
  CUdevice handle;
  CUcontext context;  // the primary one, retained for good
  int ordinal;
  int cc;  // 10 * major + minor
  int num_sms;
  int l2_bytes;
  int max_smem;
};

constexpr int kMaxDevices = 64;

// Facts of a device; null with the error set where there is none.
const Device* device(int ordinal);

// Makes a device's primary context current, and gives the caller's back at the end.
//
// A thread that has made no CUDA call has no context, autograd's among them; there the primary one
// stays bound, as the CUDA runtime would leave it.
class ContextScope {
 public:
  explicit ContextScope(const Device& device);
  ~ContextScope();
  ContextScope(const ContextScope&) = delete;
  ContextScope& operator=(const ContextScope&) = delete;

  bool ok() const { return ok_; }

 private:
  CUcontext previous_ = nullptr;
  bool ok_ = false;
  bool restores_ = false;
};

}  // namespace flash::host
