#include "host/launch.h"

#include <stdlib.h>
#include <string.h>

#include "device/decode/config.h"
#include "host/platform.h"

namespace flash::host {

namespace {

// One loading at a time: it happens once a kernel, and devices of one kind share the file's pages.
Mutex g_mutex;

// The kernel in an image, or null with the error set. Loading says nothing about the architecture
// or the PTX version: only cuLibraryGetKernel does.
CUkernel load_image(const Kernel& kernel, const Image& image) {
  const Driver& api = *driver();
  char path[2048];
  snprintf(path, sizeof(path), "%s/%s", registry_folder(), image.file);
  size_t size = 0;
  char* code = read_file(path, &size);
  if (code == nullptr) {
    fail("%s cannot be read", path);
    return nullptr;
  }
  CUlibrary library = nullptr;
  CUkernel loaded = nullptr;
  char what[2176];
  snprintf(what, sizeof(what), "loading %s", path);
  if (check(api.cuLibraryLoadData(&library, code, nullptr, nullptr, 0, nullptr, nullptr, 0),
            what) &&
      !check(api.cuLibraryGetKernel(&loaded, library, kernel.symbol), what)) {
    api.cuLibraryUnload(library);
    loaded = nullptr;
  }
  free(code);
  return loaded;
}

// The best image is compiled code, of the latest architecture that the device runs.
int score(const Image& image) {
  return (image.is_ptx ? 0 : 10000) + 2 * image.arch + (image.is_exact ? 1 : 0);
}

const Image* load(const Kernel& kernel, const Device& device, CUkernel* loaded) {
  bool is_tried[kMaxImages] = {};
  for (;;) {
    int best = -1;
    for (int i = 0; i < kernel.num_images; ++i) {
      if (is_tried[i] || !may_run(kernel.images[i], device.cc)) continue;
      if (best < 0 || score(kernel.images[i]) > score(kernel.images[best])) best = i;
    }
    if (best < 0) return nullptr;
    is_tried[best] = true;
    *loaded = load_image(kernel, kernel.images[best]);
    if (*loaded != nullptr) return &kernel.images[best];
  }
}

// Of so many CTAs, with room for attributes.
CUlaunchConfig config_of(const Shape& shape, int64_t num_ctas, CUlaunchAttribute* attributes) {
  CUlaunchConfig config = {};
  config.gridDimX = static_cast<unsigned int>(num_ctas);
  config.blockDimX = static_cast<unsigned int>(shape.threads);
  config.gridDimY = config.gridDimZ = config.blockDimY = config.blockDimZ = 1;
  config.sharedMemBytes = static_cast<unsigned int>(shape.smem_bytes);
  config.attrs = attributes;
  return config;
}

// Asks how many clusters of a kernel run at once, and lets it have those of 16.
bool count_clusters(const Kernel& kernel, CUkernel loaded, const Shape& shape, const Device& device,
                    Clusters* found) {
  const Driver& api = *driver();
  const ContextScope scope(device);
  if (!scope.ok() ||
      !check(api.cuKernelSetAttribute(kNonPortableClusterSizeAllowed, 1, loaded, device.handle),
             kernel.symbol)) {
    return false;
  }
  int size = decode::kMostInCluster;
  for (int& count : found->count) {
    CUlaunchAttribute cluster = CUlaunchAttribute::cluster(size);
    CUlaunchConfig config = config_of(shape, size, &cluster);
    config.numAttrs = 1;
    // Not every device has every size.
    if (api.cuOccupancyMaxActiveClusters(&count, loaded, &config) != kCudaSuccess) count = 0;
    size /= 2;
  }
  return true;
}

// Loads a kernel and lets it use its shared memory on this device.
bool load_once(Kernel* kernel, const Device& device) {
  const Lock lock(g_mutex);
  std::atomic<CUkernel>& slot = kernel->loaded[device.ordinal];
  if (slot.load(std::memory_order_relaxed) != nullptr) return true;
  CUkernel loaded = nullptr;
  const Image* image = load(*kernel, device, &loaded);
  if (image == nullptr) return false;
  const Shape shape = shape_of(kernel->family, kernel->kind, kernel->head_dim, image->arch);
  const int smem_bytes = shape.smem_bytes;
  if (smem_bytes > device.max_smem) {
    return fail("%s needs %d bytes of shared memory; device %d has %d for a block", kernel->symbol,
                smem_bytes, device.ordinal, device.max_smem);
  }
  constexpr int kAlwaysAllowed = 48 * 1024;
  if (smem_bytes > kAlwaysAllowed &&
      !check(driver()->cuKernelSetAttribute(kMaxDynamicSharedSizeBytes, smem_bytes, loaded,
                                            device.handle),
             kernel->symbol)) {
    return false;
  }
  if (shape.has_clusters && image->arch >= 90 &&
      !count_clusters(*kernel, loaded, shape, device, &kernel->clusters[device.ordinal])) {
    return false;
  }
  kernel->loaded_arch[device.ordinal] = image->arch;
  slot.store(loaded, std::memory_order_release);
  return true;
}

}  // namespace

bool prepare(Want want, const Device& device, Ready* ready) {
  want.num_sms = device.num_sms;
  Kernel* kernel = find(want);
  while (kernel != nullptr) {
    const std::atomic<CUkernel>& slot = kernel->loaded[device.ordinal];
    Kernel* next = nullptr;
    if (slot.load(std::memory_order_acquire) == nullptr) {
      next = find_behind(*kernel, want);
      std::atomic<bool>& is_refused = kernel->is_refused[device.ordinal];
      if ((is_refused.load() && next != nullptr) || !load_once(kernel, device)) {
        is_refused.store(true);
        kernel = next;
        continue;
      }
    }
    *ready = {kernel, slot.load(std::memory_order_acquire),
              shape_of(kernel->family, kernel->kind, kernel->head_dim,
                       kernel->loaded_arch[device.ordinal])};
    return true;
  }
  return false;
}

bool launch(const Ready& ready, const Device& device, void* stream, int64_t num_ctas,
            const void* params, int cluster) {
  const char* symbol = ready.kernel->symbol;
  if (num_ctas == 0) return true;
  if (num_ctas > INT32_MAX) {
    return fail("%s: too many tiles for one launch on device %d", symbol, device.ordinal);
  }
  CUlaunchAttribute attributes[2];
  CUlaunchConfig config = config_of(ready.shape, num_ctas, attributes);
  config.hStream = static_cast<CUstream>(stream);
  // In code for architectures that have the instruction to wait.
  if (ready.shape.waits && ready.kernel->loaded_arch[device.ordinal] >= 90) {
    attributes[config.numAttrs++] = CUlaunchAttribute::overlap();
  }
  if (cluster > 0) attributes[config.numAttrs++] = CUlaunchAttribute::cluster(cluster);
  void* arguments[] = {const_cast<void*>(params)};
  return check(driver()->cuLaunchKernelEx(&config, ready.handle, arguments, nullptr), symbol);
}

}  // namespace flash::host
