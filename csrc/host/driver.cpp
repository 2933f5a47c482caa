#include "host/driver.h"

#include <atomic>

#include "host/platform.h"
#include "host/text.h"

namespace flash::host {

namespace {

#ifdef _WIN32
constexpr const char* kDriverLibrary = "nvcuda.dll";
#else
constexpr const char* kDriverLibrary = "libcuda.so.1";
#endif

Driver g_driver;
std::atomic<bool> g_driver_ready;
Device g_devices[kMaxDevices];
std::atomic<bool> g_device_ready[kMaxDevices];
Mutex g_mutex;

thread_local Text t_error;

template <class Function>
bool resolve(void* library, const char* name, Function** function) {
  *function = reinterpret_cast<Function*>(find_symbol(library, name));
  if (*function != nullptr) return true;
  return fail("the CUDA driver has no %s: it is older than CUDA 12.0; update the driver", name);
}

bool resolve_all(void* library) {
  Driver& d = g_driver;
  return resolve(library, "cuInit", &d.cuInit) &&
         resolve(library, "cuDriverGetVersion", &d.cuDriverGetVersion) &&
         resolve(library, "cuGetErrorName", &d.cuGetErrorName) &&
         resolve(library, "cuGetErrorString", &d.cuGetErrorString) &&
         resolve(library, "cuDeviceGet", &d.cuDeviceGet) &&
         resolve(library, "cuDeviceGetAttribute", &d.cuDeviceGetAttribute) &&
         resolve(library, "cuDevicePrimaryCtxRetain", &d.cuDevicePrimaryCtxRetain) &&
         resolve(library, "cuCtxGetCurrent", &d.cuCtxGetCurrent) &&
         resolve(library, "cuCtxSetCurrent", &d.cuCtxSetCurrent) &&
         resolve(library, "cuLibraryLoadData", &d.cuLibraryLoadData) &&
         resolve(library, "cuLibraryGetKernel", &d.cuLibraryGetKernel) &&
         resolve(library, "cuLibraryUnload", &d.cuLibraryUnload) &&
         resolve(library, "cuKernelSetAttribute", &d.cuKernelSetAttribute) &&
         resolve(library, "cuLaunchKernelEx", &d.cuLaunchKernelEx) &&
         resolve(library, "cuOccupancyMaxActiveClusters", &d.cuOccupancyMaxActiveClusters) &&
         resolve(library, "cuTensorMapEncodeTiled", &d.cuTensorMapEncodeTiled);
}

bool read_attribute(CUdevice handle, CUdevice_attribute attribute, int* value) {
  return check(g_driver.cuDeviceGetAttribute(value, attribute, handle), "cuDeviceGetAttribute");
}

bool open_device(int ordinal, Device* device) {
  int major = 0;
  int minor = 0;
  device->ordinal = ordinal;
  if (!check(g_driver.cuDeviceGet(&device->handle, ordinal), "cuDeviceGet")) return false;
  const CUdevice handle = device->handle;
  if (!read_attribute(handle, kComputeCapabilityMajor, &major) ||
      !read_attribute(handle, kComputeCapabilityMinor, &minor) ||
      !read_attribute(handle, kMultiprocessorCount, &device->num_sms) ||
      !read_attribute(handle, kL2CacheSize, &device->l2_bytes) ||
      !read_attribute(handle, kMaxSharedMemoryPerBlockOptIn, &device->max_smem)) {
    return false;
  }
  device->cc = 10 * major + minor;
  return check(g_driver.cuDevicePrimaryCtxRetain(&device->context, handle),
               "cuDevicePrimaryCtxRetain");
}

}  // namespace

Text& last_error() { return t_error; }

bool fail(const char* format, ...) {
  t_error.clear();
  va_list arguments;
  va_start(arguments, format);
  t_error.add_list(format, arguments);
  va_end(arguments);
  return false;
}

bool check(CUresult result, const char* what) {
  if (result == kCudaSuccess) return true;
  const char* name = nullptr;
  const char* words = nullptr;
  if (g_driver.cuGetErrorName(result, &name) != kCudaSuccess || name == nullptr)
    name = "unknown error";
  if (g_driver.cuGetErrorString(result, &words) != kCudaSuccess || words == nullptr) words = "";
  return fail("%s: %s (%d): %s", what, name, result, words);
}

const Driver* driver() {
  if (g_driver_ready.load(std::memory_order_acquire)) return &g_driver;
  const Lock lock(g_mutex);
  if (g_driver_ready.load(std::memory_order_relaxed)) return &g_driver;
  void* library = open_library(kDriverLibrary);
  if (library == nullptr) {
    fail("the CUDA driver library %s cannot be opened: is an NVIDIA driver installed?",
         kDriverLibrary);
    return nullptr;
  }
  if (!resolve_all(library) || !check(g_driver.cuInit(0), "cuInit")) return nullptr;
  g_driver_ready.store(true, std::memory_order_release);
  return &g_driver;
}

const Device* device(int ordinal) {
  if (ordinal < 0 || ordinal >= kMaxDevices) {
    fail("there is no CUDA device %d", ordinal);
    return nullptr;
  }
  if (g_device_ready[ordinal].load(std::memory_order_acquire)) return &g_devices[ordinal];
  if (driver() == nullptr) return nullptr;
  const Lock lock(g_mutex);
  if (!g_device_ready[ordinal].load(std::memory_order_relaxed)) {
    if (!open_device(ordinal, &g_devices[ordinal])) return nullptr;
    g_device_ready[ordinal].store(true, std::memory_order_release);
  }
  return &g_devices[ordinal];
}

ContextScope::ContextScope(const Device& device) {
  if (!check(g_driver.cuCtxGetCurrent(&previous_), "cuCtxGetCurrent")) return;
  if (previous_ != device.context) {
    if (!check(g_driver.cuCtxSetCurrent(device.context), "cuCtxSetCurrent")) return;
    restores_ = previous_ != nullptr;
  }
  ok_ = true;
}

ContextScope::~ContextScope() {
  if (restores_) g_driver.cuCtxSetCurrent(previous_);
}

}  // namespace flash::host
