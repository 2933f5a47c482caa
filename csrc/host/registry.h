// The table of kernels that were really built, read from `index.txt` beside them.
//
// One line for each compiled image of each kernel, words parted by blanks:
//
//   flash-attn-kernels 1
//   forward sm80 128 bf16 90 cubin flash_fwd_sm80_d128_bf16 sm_90/flash_fwd_sm80_d128_bf16.cubin
//   kind    family d dtype arch form  symbol                  file, relative to index.txt
//
// arch is 10 * major + minor, with an `a` where the code runs on that very architecture only. Rows
// stand best first: families in order of preference, then head dims from narrow to wide. d 0 serves
// every head dim.
#pragma once

#include <atomic>

#include "host/api.h"
#include "host/driver.h"
#include "host/plan.h"
#include "host/text.h"

namespace flash::host {

// One compiled form of a kernel.
struct Image {
  const char* file;
  int arch;
  bool is_ptx;
  bool is_exact;  // 90a: no later architecture runs it
};

constexpr int kMaxImages = 16;

struct Kernel {
  const char* symbol;
  int family;
  int kind;
  int head_dim;
  int dtype;
  int num_images;
  Image images[kMaxImages];
  // Where the kernel is loaded, by device; a CUkernel is valid in every context of the device.
  std::atomic<CUkernel> loaded[kMaxDevices];
  int loaded_arch[kMaxDevices];               // of the image, written before `loaded`
  Clusters clusters[kMaxDevices];             // likewise
  std::atomic<bool> is_refused[kMaxDevices];  // by the driver
};

// What a caller needs.
struct Want {
  int kind;
  int head_dim;
  int dtype;
  int cc;
  // The call, where not every family may take it.
  const ForwardParams* forward = nullptr;
  const BackwardParams* backward = nullptr;
  int family = kNumFamilies;  // the only one, if it is one
  int num_sms = 0;            // of the device
};

// Reads the table. True at once if this folder's table has been read before.
bool open_registry(const char* folder);

int num_kernels();
const Kernel& kernel(int index);

// The first kernel that serves `want`, or null with the error set to the explanation.
Kernel* find(const Want& want);

// The next one, or null.
Kernel* find_behind(const Kernel& kernel, const Want& want);

// Says what kernels there are for a kind, and why none of them serves `want`.
void explain(const Want& want, Text* text);

// Whether an image may run on a device; the driver has the last word.
bool may_run(const Image& image, int cc);

// The folder that `file` of an image is relative to.
const char* registry_folder();

const char* kind_name(int kind);
const char* dtype_name(int dtype);

}  // namespace flash::host
