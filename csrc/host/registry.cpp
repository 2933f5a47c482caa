#include "host/registry.h"

#include <stdlib.h>
#include <string.h>

#include "host/platform.h"

namespace flash::host {

namespace {

constexpr const char* kHeader = "flash-attn-kernels 1";
constexpr int kMaxKernels = 1024;

const char* const kKindNames[] = {"forward", "combine", "append", "delta", "backward",
                                  "convert", "s_dmask", "fill",   "dq",    "decode"};
const char* const kDtypeNames[] = {"fp16", "bf16", "e4m3"};
const char* const kFamilyNames[] = {
    "sm80",     "sm90_wide",       "sm90_narrow", "sm90",   "sm90_scored", "sm90_fp8_wide",
    "sm90_fp8", "sm90_fp8_scored", "sm90_latent", "decode", "decode_wide", "common"};

Kernel* g_kernels;  // the table is opened once and stays
int g_num_kernels;
char g_folder[1024];
char* g_manifest;  // the words of the table point into it
std::atomic<bool> g_ready;
Mutex g_mutex;

int index_of(const char* word, const char* const* names, int count) {
  for (int i = 0; i < count; ++i) {
    if (strcmp(word, names[i]) == 0) return i;
  }
  return -1;
}

// Cuts the next word off `*at`; null at the end of the line.
char* next_word(char** at) {
  char* begin = *at + strspn(*at, " \t\r");
  if (*begin == '\0') return nullptr;
  char* end = begin + strcspn(begin, " \t\r");
  *at = *end == '\0' ? end : end + 1;
  *end = '\0';
  return begin;
}

Kernel* kernel_of_symbol(const char* symbol) {
  for (int i = 0; i < g_num_kernels; ++i) {
    if (strcmp(g_kernels[i].symbol, symbol) == 0) return &g_kernels[i];
  }
  if (g_num_kernels == kMaxKernels) return nullptr;
  Kernel* added = &g_kernels[g_num_kernels++];
  added->symbol = symbol;
  return added;
}

bool parse_row(char* line, int number) {
  enum { kKind, kFamily, kHeadDim, kDtype, kArch, kForm, kSymbol, kFile, kWords };
  char* words[kWords];
  for (char*& word : words) {
    word = next_word(&line);
    if (word == nullptr) return fail("index.txt, line %d: a row has %d words", number, int{kWords});
  }
  const int kind = index_of(words[kKind], kKindNames, FLASH_NUM_KINDS);
  const int dtype = index_of(words[kDtype], kDtypeNames, FLASH_NUM_DTYPES);
  const int family = index_of(words[kFamily], kFamilyNames, kNumFamilies);
  if (kind < 0) return fail("index.txt, line %d: unknown kind %s", number, words[kKind]);
  if (dtype < 0) return fail("index.txt, line %d: unknown dtype %s", number, words[kDtype]);
  if (family < 0) return fail("index.txt, line %d: unknown family %s", number, words[kFamily]);
  Kernel* kernel = kernel_of_symbol(words[kSymbol]);
  if (kernel == nullptr || kernel->num_images == kMaxImages) {
    return fail("index.txt, line %d: too many rows", number);
  }
  kernel->family = family;
  kernel->kind = kind;
  kernel->dtype = dtype;
  kernel->head_dim = atoi(words[kHeadDim]);
  Image& image = kernel->images[kernel->num_images++];
  image.file = words[kFile];
  image.arch = atoi(words[kArch]);
  image.is_exact = words[kArch][strlen(words[kArch]) - 1] == 'a';
  image.is_ptx = strcmp(words[kForm], "ptx") == 0;
  return true;
}

bool parse(char* text) {
  int number = 0;
  while (*text != '\0') {
    char* line = text;
    char* end = text + strcspn(text, "\n");
    text = *end == '\0' ? end : end + 1;
    *end = '\0';
    line[strcspn(line, "\r")] = '\0';
    ++number;
    if (number == 1) {
      if (strcmp(line, kHeader) != 0) return fail("index.txt does not begin with '%s'", kHeader);
    } else if (line[strspn(line, " \t")] != '\0' && !parse_row(line, number)) {
      return false;
    }
  }
  return number > 0 || fail("index.txt is empty");
}

bool serves(const Kernel& kernel, const Want& want) {
  return kernel.kind == want.kind && kernel.dtype == want.dtype &&
         (kernel.head_dim == 0 || kernel.head_dim >= want.head_dim) &&
         (want.family == kNumFamilies || kernel.family == want.family) &&
         (want.forward == nullptr ||
          takes(kernel.family, kernel.head_dim, *want.forward, want.num_sms)) &&
         (want.backward == nullptr || takes(kernel.family, *want.backward));
}

bool runs(const Kernel& kernel, int cc) {
  for (int i = 0; i < kernel.num_images; ++i) {
    if (may_run(kernel.images[i], cc)) return true;
  }
  return false;
}

Kernel* first_from(int index, const Want& want) {
  const int count = num_kernels();
  for (int i = index; i < count; ++i) {
    if (serves(g_kernels[i], want) && runs(g_kernels[i], want.cc)) return &g_kernels[i];
  }
  return nullptr;
}

}  // namespace

const char* kind_name(int kind) {
  return kind >= 0 && kind < FLASH_NUM_KINDS ? kKindNames[kind] : "unknown";
}

const char* dtype_name(int dtype) {
  return dtype >= 0 && dtype < FLASH_NUM_DTYPES ? kDtypeNames[dtype] : "unknown";
}

bool open_registry(const char* folder) {
  const Lock lock(g_mutex);
  if (g_ready.load(std::memory_order_relaxed)) {
    return strcmp(folder, g_folder) == 0 ||
           fail("kernels have been opened in %s; a process has one set of them", g_folder);
  }
  char path[sizeof(g_folder) + 16];
  const size_t length = strlen(folder);
  if (length >= sizeof(g_folder)) return fail("the kernel folder's path is too long");
  memcpy(g_folder, folder, length + 1);
  snprintf(path, sizeof(path), "%s/index.txt", folder);
  size_t size = 0;
  free(g_manifest);
  g_manifest = read_file(path, &size);
  if (g_manifest == nullptr) return fail("%s cannot be read", path);
  if (g_kernels == nullptr) {
    g_kernels = static_cast<Kernel*>(calloc(kMaxKernels, sizeof(Kernel)));
    if (g_kernels == nullptr) return fail("out of memory");
  }
  if (!parse(g_manifest)) {
    memset(static_cast<void*>(g_kernels), 0, kMaxKernels * sizeof(Kernel));
    g_num_kernels = 0;
    return false;
  }
  g_ready.store(true, std::memory_order_release);
  return true;
}

int num_kernels() { return g_ready.load(std::memory_order_acquire) ? g_num_kernels : 0; }

const Kernel& kernel(int index) { return g_kernels[index]; }

const char* registry_folder() { return g_folder; }

bool may_run(const Image& image, int cc) {
  if (image.is_exact) return image.arch == cc;
  if (image.is_ptx) return image.arch <= cc;
  return image.arch / 10 == cc / 10 && image.arch <= cc;
}

Kernel* find(const Want& want) {
  Kernel* found = first_from(0, want);
  if (found != nullptr) return found;
  Text& error = last_error();
  error.clear();
  explain(want, &error);
  return nullptr;
}

Kernel* find_behind(const Kernel& kernel, const Want& want) {
  return first_from(static_cast<int>(&kernel - g_kernels) + 1, want);
}

void explain(const Want& want, Text* text) {
  const char* kind = kind_name(want.kind);
  text->add("no %s kernel for head dim %d, %s, on cc %d.%d", kind, want.head_dim,
            dtype_name(want.dtype), want.cc / 10, want.cc % 10);
  const int count = num_kernels();
  int same_kind = 0;
  int widest = 0;
  bool has_dtype = false;
  const Kernel* elsewhere = nullptr;
  for (int i = 0; i < count; ++i) {
    const Kernel& candidate = g_kernels[i];
    if (candidate.kind != want.kind) continue;
    ++same_kind;
    has_dtype = has_dtype || candidate.dtype == want.dtype;
    if (candidate.head_dim > widest) widest = candidate.head_dim;
    if (elsewhere == nullptr && serves(candidate, want)) elsewhere = &candidate;
  }
  if (same_kind == 0) {
    text->add(": this build has %d kernels, none of kind %s", count, kind);
  } else if (!has_dtype) {
    text->add(": none of this build takes %s", dtype_name(want.dtype));
  } else if (elsewhere == nullptr && want.forward != nullptr && want.forward->has_qv) {
    text->add(": none of this build takes a second query against V");
  } else if (elsewhere == nullptr) {
    text->add(": the widest of this build is %d", widest);
  } else {
    text->add(": %s was built for", elsewhere->symbol);
    for (int i = 0; i < elsewhere->num_images; ++i) {
      const Image& image = elsewhere->images[i];
      text->add("%s %d.%d%s%s", i == 0 ? "" : ",", image.arch / 10, image.arch % 10,
                image.is_exact ? "a" : "", image.is_ptx ? " (PTX)" : "");
    }
  }
}

}  // namespace flash::host
