// A CUDA driver that runs nothing and writes down what it is asked, so that the host library's
// paths run without a GPU. `STUB_LOG` names the file; `STUB_CC` the device's compute capability, 90
// if unset; `STUB_SMS` how many multiprocessors it has, 132 if unset; `STUB_L2` the
// bytes of its L2 cache.
//
// With kernels made for the emulator linked in, a launch runs them.
//
// A loaded file that holds "wrong-arch" has no kernel for the device, as the driver finds out when
// it is asked for the kernel and not before.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "host/driver.h"
#include "host/flash.h"

using namespace flash::host;

// Of emulator/, where that is linked in.
__attribute__((weak)) void run_kernel(const char* name, unsigned grid, unsigned cluster,
                                      unsigned threads, const void* params);

namespace {

thread_local CUcontext t_current;

struct StubLibrary {
  bool is_wrong;
};

void note(const char* text) {
  FILE* log = fopen(getenv("STUB_LOG"), "a");
  fprintf(log, "%s\n", text);
  fclose(log);
}

CUcontext context_of(CUdevice device) {
  return reinterpret_cast<CUcontext>(static_cast<uintptr_t>(0x1000 + device));
}

// Of the struct that a kernel takes.
size_t params_size(const char* kernel) {
  const auto is = [&](const char* kind) { return strstr(kernel, kind) != nullptr; };
  if (is("flash_fwd_sm90")) return sizeof(flash::TmaForwardParams);
  if (is("flash_bwd_sm90")) return sizeof(flash::TmaBackwardParams);
  if (is("flash_fwd") || is("flash_s_dmask")) return sizeof(flash::ForwardParams);
  if (is("flash_combine")) return sizeof(flash::CombineParams);
  if (is("flash_append")) return sizeof(flash::AppendParams);
  if (is("flash_fill")) return sizeof(flash::FillParams);
  return sizeof(flash::BackwardParams);
}

}  // namespace

extern "C" {

CUresult cuInit(unsigned int) { return getenv("STUB_NO_DEVICE") != nullptr ? 100 : 0; }

CUresult cuDriverGetVersion(int* version) {
  *version = 13000;
  return 0;
}

CUresult cuGetErrorName(CUresult error, const char** text) {
  *text = error == 209 ? "CUDA_ERROR_NO_BINARY_FOR_GPU" : "CUDA_ERROR_STUB";
  return 0;
}

CUresult cuGetErrorString(CUresult error, const char** text) {
  *text = error == 100 ? "no CUDA-capable device is detected" : "the words of the driver";
  return 0;
}

CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  *device = ordinal;
  return ordinal < 2 ? 0 : 101;
}

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice) {
  const char* text = getenv("STUB_CC");
  const int cc = text != nullptr ? atoi(text) : 90;
  switch (attribute) {
    case kMultiprocessorCount:
      *value = getenv("STUB_SMS") != nullptr ? atoi(getenv("STUB_SMS")) : 132;
      break;
    case kL2CacheSize:
      *value = getenv("STUB_L2") != nullptr ? atoi(getenv("STUB_L2")) : 50 << 20;
      break;
    case kComputeCapabilityMajor:
      *value = cc / 10;
      break;
    case kComputeCapabilityMinor:
      *value = cc % 10;
      break;
    case kMaxSharedMemoryPerBlockOptIn:
      *value = 227 * 1024;
      break;
  }
  return 0;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  note("retain");
  *context = context_of(device);
  return 0;
}

CUresult cuCtxGetCurrent(CUcontext* context) {
  *context = t_current;
  return 0;
}

CUresult cuCtxSetCurrent(CUcontext context) {
  t_current = context;
  return 0;
}

CUresult cuLibraryLoadData(CUlibrary* library, const void* code, int*, void**, unsigned int, int*,
                           void**, unsigned int) {
  note("load");
  usleep(20000);  // wide enough for other threads to come by
  StubLibrary* made = new StubLibrary;
  made->is_wrong = strstr(static_cast<const char*>(code), "wrong-arch") != nullptr;
  *library = reinterpret_cast<CUlibrary>(made);
  return 0;
}

CUresult cuLibraryGetKernel(CUkernel* kernel, CUlibrary library, const char* name) {
  if (reinterpret_cast<StubLibrary*>(library)->is_wrong) return 209;
  *kernel = reinterpret_cast<CUkernel>(strdup(name));
  return 0;
}

CUresult cuLibraryUnload(CUlibrary library) {
  note("unload");
  delete reinterpret_cast<StubLibrary*>(library);
  return 0;
}

CUresult cuKernelSetAttribute(CUfunction_attribute attribute, int value, CUkernel, CUdevice) {
  if (attribute != kMaxDynamicSharedSizeBytes) return 0;
  char line[64];
  snprintf(line, sizeof(line), "smem %d", value);
  note(line);
  return 0;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUkernel kernel, void** params, void**) {
  const char* name = reinterpret_cast<const char*>(kernel);
  const size_t size = params_size(name);
  char line[8192];
  int at = snprintf(line, sizeof(line), "launch %s %u %u %u %d %llu ", name, config->gridDimX,
                    config->blockDimX, config->sharedMemBytes, t_current == context_of(0) ? 0 : 1,
                    static_cast<unsigned long long>(reinterpret_cast<uintptr_t>(config->hStream)));
  for (size_t i = 0; i < size; ++i) {
    at += snprintf(line + at, sizeof(line) - at, "%02x",
                   static_cast<const unsigned char*>(params[0])[i]);
  }
  note(line);
  unsigned cluster = 1;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const CUlaunchAttribute& attribute = config->attrs[i];
    if (attribute.id == CUlaunchAttribute::overlap().id) {
      snprintf(line, sizeof(line), "attribute %s %d", name, attribute.id);
    } else {
      cluster = static_cast<unsigned>(attribute.value[1]);
      snprintf(line, sizeof(line), "cluster %s %u", name, cluster);
    }
    note(line);
  }
  if (run_kernel != nullptr) {
    run_kernel(name, config->gridDimX, cluster, config->blockDimX, params[0]);
  }
  return 0;
}

// As many CTAs as a multiprocessor has shared memory for; of 16 where there are as many.
CUresult cuOccupancyMaxActiveClusters(int* count, CUkernel, const CUlaunchConfig* config) {
  int num_sms = 0;
  cuDeviceGetAttribute(&num_sms, kMultiprocessorCount, 0);
  constexpr unsigned kSmemOfSm = 228 * 1024;
  const int ctas = num_sms * static_cast<int>(kSmemOfSm / (config->sharedMemBytes + 1024));
  *count = ctas / config->attrs[0].value[1];
  return 0;
}

// A map in the open: the address, four sizes, three strides in bytes, columns and rows of the box,
// the element type, the swizzle and heads of the box.
CUresult cuTensorMapEncodeTiled(void* map, int type, uint32_t rank, void* address,
                                const uint64_t* dims, const uint64_t* strides, const uint32_t* box,
                                const uint32_t* steps, int interleave, int swizzle, int, int fill) {
  bool is_right = rank == 4 && interleave == 0 && fill == 0 &&
                  reinterpret_cast<uintptr_t>(map) % 64 == 0 &&
                  reinterpret_cast<uintptr_t>(address) % 16 == 0 && t_current != nullptr;
  uint64_t words[16] = {reinterpret_cast<uint64_t>(address)};
  for (int i = 0; i < 4; ++i) {
    is_right = is_right && dims[i] >= 1 && dims[i] <= uint64_t{1} << 32 && box[i] >= 1 &&
               box[i] <= 256 && steps[i] == 1;
    words[1 + i] = dims[i];
  }
  for (int i = 0; i < 3; ++i) {
    is_right = is_right && strides[i] % 16 == 0 && strides[i] < uint64_t{1} << 40;
    words[5 + i] = strides[i];
  }
  words[8] = box[0];
  words[9] = box[1];
  words[10] = static_cast<uint64_t>(type);
  words[11] = static_cast<uint64_t>(swizzle);
  words[12] = box[2];
  memcpy(map, words, sizeof(words));
  return is_right ? 0 : 1;
}

// Of libtorch_cuda, which a CPU build of torch lacks.
int32_t aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = reinterpret_cast<void*>(uintptr_t{0x5700});
  return 0;
}
}
