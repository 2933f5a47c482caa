#include "emulator.h"

#include <stdarg.h>
#include <stdio.h>
#include <ucontext.h>

#include <algorithm>
#include <deque>
#include <map>
#include <memory>
#include <random>
#include <vector>

Dim threadIdx, blockIdx, gridDim;

namespace emulator {

unsigned char* g_smem;

namespace {

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  std::function<bool()> is_ready;
  const char* waits_for = "";
  uint64_t cluster_round = 0;  // that it arrived in last
  bool is_done = false;
};

struct Warp {
  Slots slots[2];
  int arrived[2] = {};
  int left[2] = {};
  uint64_t rounds[32] = {};
};

struct NamedBarrier {
  int arrived = 0;
  uint64_t generation = 0;
  bool all = true;       // of those who have arrived
  bool all_said = true;  // of the generation before
};

struct MBarrier {
  int count = 0, pending = 0;
  int64_t bytes = 0;
  uint32_t phase = 0;
};

struct Warpgroup {
  std::deque<Product> asked[128];  // of each thread, not yet done
  uint64_t num_asked[128] = {};
  std::deque<uint64_t> groups[128];  // num_asked where each group ended
  uint64_t num_done = 0;
};

// The copies by cp.async of one thread.
struct Copy {
  uint32_t smem;
  const void* gmem;
  uint32_t bytes;
};
struct CopyGroups {
  std::deque<std::vector<Copy>> committed;
  std::vector<Copy> open;
};

constexpr int kRankShift = 24;  // of a CTA's rank in addresses of shared memory
constexpr uint32_t kHere = (1u << kRankShift) - 1;
constexpr size_t kStackBytes = 256 * 1024;

struct Cluster;

struct Cta {
  unsigned block = 0;
  Cluster* cluster = nullptr;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  NamedBarrier named[16];
  std::map<uint32_t, MBarrier> mbarriers;
  std::vector<Warpgroup> warpgroups;
  std::vector<std::function<void()>> copies;   // asked for and not yet done
  std::map<unsigned, CopyGroups> copy_groups;  // of each thread
  std::map<unsigned, int> stores;              // of each thread, likewise
  std::vector<unsigned char> smem;             // while another one runs

  unsigned running() const {
    unsigned count = 0;
    for (const Fiber& fiber : fibers) count += !fiber.is_done;
    return count;
  }
  bool is_done() const { return running() == 0 && copies.empty(); }
};

struct Cluster {
  std::vector<Cta*> ctas;
  unsigned arrived = 0;
  uint64_t round = 0;

  // Ends the round if all threads that have not ended have arrived.
  void end_round_if_due() {
    unsigned running = 0;
    for (const Cta* cta : ctas) running += cta->running();
    if (arrived == 0 || arrived < running) return;
    arrived = 0;
    ++round;
  }
};

ucontext_t g_scheduler;
// Those that run side by side: they take turns, each with shared memory at the same place.
std::vector<std::unique_ptr<Cta>> g_ctas;
Cta* g_cta;  // whose turn it is
unsigned g_current;
const std::function<void()>* g_kernel;
unsigned seed() {
  const char* text = getenv("EMULATOR_SEED");
  return text != nullptr ? static_cast<unsigned>(atoi(text)) : 1;
}
std::mt19937 g_random(seed());
unsigned g_sleeper = 0, g_sleepers = 32;  // the first thread that stands still, and how many do

bool one_in(unsigned n) { return g_random() % n == 0; }

Fiber& current() { return g_cta->fibers[g_current]; }

void enter() {
  (*g_kernel)();
  current().is_done = true;
  swapcontext(&current().context, &g_scheduler);
}

MBarrier& mbarrier(uint32_t address) {
  const auto found = g_cta->mbarriers.find(address);
  if (found == g_cta->mbarriers.end()) stop("the barrier at %u was never initialised", address);
  return found->second;
}

void end_phase_if_due(MBarrier& barrier) {
  if (barrier.pending != 0 || barrier.bytes != 0) return;
  ++barrier.phase;
  barrier.pending = barrier.count;
}

// Another CTA, which must still be there.
Cta& running_cta(unsigned rank) {
  Cta& cta = *g_cta->cluster->ctas[rank];
  if (cta.running() == 0) stop("CTA %u of the cluster has ended", rank);
  return cta;
}

// The tensor map of tests/build_tools/stub_driver.cpp.
struct Map {
  unsigned char* base;
  int64_t dims[4];
  int64_t strides[4];  // bytes
  int box[3];          // columns, rows, heads
};

Map read_map(const flash::TensorMap& map) {
  const uint64_t* w = map.words;
  Map read = {reinterpret_cast<unsigned char*>(w[0]), {}, {}, {}};
  for (int i = 0; i < 4; ++i) read.dims[i] = static_cast<int64_t>(w[1 + i]);
  read.strides[0] = 2;
  for (int i = 0; i < 3; ++i) read.strides[1 + i] = static_cast<int64_t>(w[5 + i]);
  read.box[0] = static_cast<int>(w[8]);
  read.box[1] = static_cast<int>(w[9]);
  read.box[2] = static_cast<int>(w[12]);
  return read;
}

uint32_t swizzle(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

// Between a box in memory and 128-byte rows in shared memory.
void copy_box(const Map& map, const int (&place)[4], uint32_t smem, bool loads) {
  if (smem % 1024 != 0) stop("a box at %u does not begin at a multiple of 1024 bytes", smem);
  for (int row = 0; row < map.box[1] * map.box[2]; ++row) {
    for (int col = 0; col < map.box[0]; ++col) {
      unsigned char* in_smem = at(swizzle(smem + row * 128 + col * 2), 2);
      const int64_t where[] = {place[0] + col, place[1] + row % map.box[1],
                               place[2] + row / map.box[1], place[3]};
      unsigned char* in_memory = map.base;
      bool is_inside = true;
      for (int i = 0; i < 4; ++i) {
        is_inside = is_inside && where[i] >= 0 && where[i] < map.dims[i];
        in_memory += where[i] * map.strides[i];
      }
      if (loads && is_inside) memcpy(in_smem, in_memory, 2);
      if (loads && !is_inside) memset(in_smem, 0, 2);
      if (!loads && is_inside) memcpy(in_memory, in_smem, 2);
    }
  }
}

float element(uint64_t descriptor, int across, int depth, bool by_columns, Format format) {
  if (descriptor >> 62 != 1) stop("a descriptor has another swizzle than 128 bytes");
  const uint32_t start = (descriptor & 0x3FFF) << 4;
  const uint32_t lead = (descriptor >> 16 & 0x3FFF) << 4;
  const uint32_t stride = (descriptor >> 32 & 0x3FFF) << 4;
  const uint32_t bytes = bytes_of(format);
  if (by_columns && bytes == 1) stop("8-bit elements lie by rows");
  const uint32_t address =
      by_columns
          ? start + across / 64 * lead + across % 64 * 2 + depth % 8 * 128 + depth / 8 * stride
          : start + across / 8 * stride + across % 8 * 128 + depth * bytes;
  uint16_t bits = 0;
  memcpy(&bits, at(swizzle(address), bytes), bytes);
  return to_float(bits, format);
}

// Does the oldest product that all threads of a warpgroup have asked for.
bool do_product(Warpgroup& group) {
  for (const auto& asked : group.asked) {
    if (asked.empty()) return false;
  }
  const Product first = group.asked[0].front();
  const int packed = 4 / bytes_of(first.format);  // elements of a register
  const int depth = 8 * packed;
  float a[64][32];
  for (int row = 0; row < 64; ++row) {
    for (int k = 0; k < depth; ++k) {
      if (first.a == nullptr) {
        a[row][k] = element(first.a_descriptor, row, k, false, first.format);
      } else {
        const int thread = row / 16 * 32 + row % 8 * 4 + k / packed % 4;
        const uint32_t bits = group.asked[thread].front().a[k / packed / 4 * 2 + row % 16 / 8];
        a[row][k] = element_of(bits, k % packed, first.format);
      }
    }
  }
  std::vector<float> b(static_cast<size_t>(depth * first.n));
  for (int n = 0; n < first.n; ++n) {
    for (int k = 0; k < depth; ++k) {
      b[n * depth + k] = element(first.b_descriptor, n, k, first.b_by_columns, first.format);
    }
  }
  for (int thread = 0; thread < 128; ++thread) {
    const Product& product = group.asked[thread].front();
    if (product.n != first.n || product.b_descriptor != first.b_descriptor ||
        product.a_descriptor != first.a_descriptor || product.adds != first.adds) {
      stop("threads of a warpgroup ask for different products");
    }
    for (int i = 0; i < first.n / 2; ++i) {
      const int row = thread / 32 * 16 + thread % 32 / 4 + i % 4 / 2 * 8;
      const int col = i / 4 * 8 + thread % 4 * 2 + i % 2;
      float sum = first.adds ? product.c[i] : 0.0f;
      for (int k = 0; k < depth; ++k) sum += a[row][k] * b[col * depth + k];
      product.c[i] = sum;
    }
  }
  for (auto& asked : group.asked) asked.pop_front();
  ++group.num_done;
  return true;
}

void do_copy(const Copy& copy) {
  unsigned char* to = at(copy.smem, copy.bytes);
  if (copy.gmem == nullptr) {
    memset(to, 0, copy.bytes);
  } else {
    memcpy(to, copy.gmem, copy.bytes);
  }
}

bool do_copy() {
  if (g_cta->copies.empty()) return false;
  const size_t chosen = g_random() % g_cta->copies.size();
  const auto copy = g_cta->copies[chosen];
  g_cta->copies.erase(g_cta->copies.begin() + static_cast<std::ptrdiff_t>(chosen));
  copy();
  return true;
}

// What no thread does; true if something was done.
bool do_asynchronous(bool all) {
  bool any = false;
  for (Warpgroup& group : g_cta->warpgroups) {
    if (all || one_in(4)) any = do_product(group) || any;
  }
  if (all || one_in(4)) any = do_copy() || any;
  return any;
}

// But for `all`, a warp or a lane stands still: for long, so that others get as far ahead as they
// can.
bool run_ready_fibers(bool all) {
  bool any = false;
  const unsigned count = static_cast<unsigned>(g_cta->fibers.size());
  const unsigned first = g_random() % count;
  if (one_in(64)) {
    g_sleepers = one_in(2) ? 1 : 32;
    g_sleeper = g_random() % count / g_sleepers * g_sleepers;
  }
  for (unsigned i = 0; i < count; ++i) {
    g_current = (first + i) % count;
    Fiber& fiber = current();
    if (fiber.is_done || (!all && g_current - g_sleeper < g_sleepers)) continue;
    if (fiber.is_ready && !fiber.is_ready()) continue;
    fiber.is_ready = nullptr;
    threadIdx.x = g_current;
    swapcontext(&g_scheduler, &fiber.context);
    any = true;
  }
  return any;
}

}  // namespace

void stop(const char* what, ...) {
  va_list arguments;
  va_start(arguments, what);
  fprintf(stderr, "emulator: CTA %u of %u, thread %u: ", blockIdx.x, gridDim.x, threadIdx.x);
  vfprintf(stderr, what, arguments);
  fprintf(stderr, "\n");
  exit(3);
}

void wait_until(const std::function<bool()>& is_true, const char* what) {
  if (is_true() && !one_in(8)) return;
  Fiber& fiber = current();
  fiber.is_ready = is_true;
  fiber.waits_for = what;
  swapcontext(&fiber.context, &g_scheduler);
}

unsigned char* at(uint32_t smem, uint32_t bytes) {
  if (smem < kSmemBase || smem + bytes > kSmemBase + kSmemBytes) {
    stop("address %u is outside shared memory", smem);
  }
  return g_smem + (smem - kSmemBase);
}

const Slots& exchange(const uint64_t (&mine)[8]) {
  Warp& warp = g_cta->warps[threadIdx.x / 32];
  const int lane = threadIdx.x % 32;
  const uint64_t round = warp.rounds[lane]++;
  const int side = static_cast<int>(round % 2);
  if (warp.arrived[side] == 32) warp.arrived[side] = 0;  // of two rounds ago
  memcpy(warp.slots[side].of[lane], mine, sizeof(mine));
  ++warp.arrived[side];
  wait_until([&warp, side] { return warp.arrived[side] == 32; }, "its warp");
  return warp.slots[side];
}

void barrier_arrive(int id, int count) {
  NamedBarrier& barrier = g_cta->named[id];
  if (id == 0) count = static_cast<int>(g_cta->fibers.size());
  if (++barrier.arrived < count) return;
  barrier.arrived = 0;
  barrier.all_said = barrier.all;
  barrier.all = true;
  ++barrier.generation;
}

void barrier_sync(int id, int count) {
  NamedBarrier& barrier = g_cta->named[id];
  const uint64_t generation = barrier.generation;
  barrier_arrive(id, count);
  wait_until([&barrier, generation] { return barrier.generation != generation; },
             "a named barrier");
}

bool barrier_all(int id, int count, bool x) {
  NamedBarrier& barrier = g_cta->named[id];
  barrier.all = barrier.all && x;
  barrier_sync(id, count);
  return barrier.all_said;
}

void mbarrier_init(uint32_t barrier, int count) {
  g_cta->mbarriers[barrier] = {count, count, 0, 0};
}

void mbarrier_arrive(uint32_t address, int bytes) {
  MBarrier& barrier = mbarrier(address);
  if (barrier.pending == 0) stop("the barrier at %u has too many arrivals", address);
  barrier.bytes += bytes;
  --barrier.pending;
  end_phase_if_due(barrier);
}

void mbarrier_wait(uint32_t address, uint32_t parity) {
  const MBarrier& barrier = mbarrier(address);
  wait_until([&barrier, parity] { return (barrier.phase & 1) != parity; }, "a barrier");
}

bool mbarrier_has_ended(uint32_t address, uint32_t parity) {
  return (mbarrier(address).phase & 1) != parity;
}

void cp_async(uint32_t smem, const void* gmem, uint32_t bytes) {
  if (smem % bytes != 0 || reinterpret_cast<uintptr_t>(gmem) % bytes != 0) {
    stop("a copy to %u is not of whole %u bytes", smem, bytes);
  }
  const Copy copy = {smem, gmem, bytes};
  if (one_in(3)) do_copy(copy);  // as soon as that: what is there must not be needed any more
  g_cta->copy_groups[threadIdx.x].open.push_back(copy);
}

void cp_async_commit() {
  CopyGroups& mine = g_cta->copy_groups[threadIdx.x];
  mine.committed.push_back(std::move(mine.open));
  mine.open.clear();
}

void cp_async_wait(int pending) {
  CopyGroups& mine = g_cta->copy_groups[threadIdx.x];
  while (mine.committed.size() > static_cast<size_t>(pending)) {
    for (const Copy& copy : mine.committed.front()) do_copy(copy);
    mine.committed.pop_front();
  }
}

void cp_async_arrive(uint32_t address) {
  std::vector<Copy>& open = g_cta->copy_groups[threadIdx.x].open;
  g_cta->copies.push_back([copies = std::move(open), address] {
    for (const Copy& copy : copies) do_copy(copy);
    mbarrier_arrive(address, 0);
  });
  open.clear();
}

void bulk_load(uint32_t smem, const void* gmem, int bytes, uint32_t address) {
  if (smem % 16 != 0 || reinterpret_cast<uintptr_t>(gmem) % 16 != 0 || bytes % 16 != 0) {
    stop("a copy of %d bytes to %u is not of whole 16 bytes", bytes, smem);
  }
  g_cta->copies.push_back([=] {
    memcpy(at(smem, static_cast<uint32_t>(bytes)), gmem, static_cast<size_t>(bytes));
    MBarrier& barrier = mbarrier(address);
    barrier.bytes -= bytes;
    end_phase_if_due(barrier);
  });
}

void tma_load(uint32_t smem, const flash::TensorMap& map, uint32_t address, const int (&place)[4],
              unsigned ctas) {
  const Map read = read_map(map);
  const std::vector<int> where(place, place + 4);
  const auto copy = [=] {
    copy_box(read, {where[0], where[1], where[2], where[3]}, smem, true);
    MBarrier& barrier = mbarrier(address);
    barrier.bytes -= int64_t{2} * read.box[0] * read.box[1] * read.box[2];
    end_phase_if_due(barrier);
  };
  if (ctas == 0) g_cta->copies.push_back(copy);
  for (unsigned rank = 0; rank < ctas; ++rank) running_cta(rank).copies.push_back(copy);
}

namespace {

// What leaves shared memory some turns later; a thread may wait for its own.
template <class Copy>
void start_store(Copy copy) {
  const unsigned thread = threadIdx.x;
  ++g_cta->stores[thread];
  g_cta->copies.push_back([=] {
    copy();
    --g_cta->stores[thread];
  });
}

template <class Copy>
void start_bulk_store(void* gmem, uint32_t smem, int bytes, Copy copy) {
  if ((reinterpret_cast<uintptr_t>(gmem) | smem | bytes) % 16 != 0) {
    stop("what leaves shared memory at once is not aligned");
  }
  start_store(copy);
}

}  // namespace

void tma_store(uint32_t smem, const flash::TensorMap& map, const int (&place)[4]) {
  const Map read = read_map(map);
  const std::vector<int> where(place, place + 4);
  start_store([=] { copy_box(read, {where[0], where[1], where[2], where[3]}, smem, false); });
}

void bulk_add(float* gmem, uint32_t smem, int bytes) {
  start_bulk_store(gmem, smem, bytes, [=] {
    for (int i = 0; i < bytes / 4; ++i) {
      float x;
      memcpy(&x, at(smem + 4 * i, 4), 4);
      gmem[i] += x;
    }
  });
}

void bulk_store(void* gmem, uint32_t smem, int bytes) {
  start_bulk_store(gmem, smem, bytes, [=] { memcpy(gmem, at(smem, bytes), bytes); });
}

void tma_store_wait() {
  const unsigned thread = threadIdx.x;
  wait_until([thread] { return g_cta->stores[thread] == 0; }, "its stores");
}

void start(const Product& product) {
  Warpgroup& group = g_cta->warpgroups[threadIdx.x / 128];
  group.asked[threadIdx.x % 128].push_back(product);
  ++group.num_asked[threadIdx.x % 128];
}

void commit() {
  Warpgroup& group = g_cta->warpgroups[threadIdx.x / 128];
  group.groups[threadIdx.x % 128].push_back(group.num_asked[threadIdx.x % 128]);
}

void wait_products(int pending) {
  Warpgroup& group = g_cta->warpgroups[threadIdx.x / 128];
  std::deque<uint64_t>& groups = group.groups[threadIdx.x % 128];
  while (groups.size() > static_cast<size_t>(pending)) {
    const uint64_t due = groups.front();
    groups.pop_front();
    wait_until([&group, due] { return group.num_done >= due; }, "products");
  }
}

float e4m3_to_float(uint16_t x) {
  const int exponent = x >> 3 & 15;
  const int mantissa = x & 7;
  if ((x & 127) == 127) return NAN;
  const float size = exponent == 0 ? ldexpf(static_cast<float>(mantissa), -9)
                                   : ldexpf(static_cast<float>(8 + mantissa), exponent - 10);
  return x >> 7 ? -size : size;
}

// To the nearest, of two as near the even one; 448 where it is larger.
uint16_t round_to_e4m3(float x) {
  if (x != x) return 127;
  const uint16_t sign = signbit(x) ? 128 : 0;
  const float size = fminf(fabsf(x), 448.0f);
  const int exponent = size < 0x1p-6f ? -6 : ilogbf(size);
  const int steps = static_cast<int>(rintf(ldexpf(size, 3 - exponent)));
  return static_cast<uint16_t>(sign | (steps + ((exponent + 6) << 3)));
}

float to_float(uint16_t x, Format format) {
  if (format == kE4m3) return e4m3_to_float(x);
  if (format == kBf16) return from_bits<float>(uint64_t{x} << 16);
  return static_cast<float>(from_bits<_Float16>(x));
}

float element_of(uint64_t packed, int index, Format format) {
  const int bits = 8 * bytes_of(format);
  return to_float(static_cast<uint16_t>(packed >> (bits * index) & ((1u << bits) - 1)), format);
}

uint16_t round_to(float x, Format format) {
  if (format == kE4m3) return round_to_e4m3(x);
  if (format == kHalf) return static_cast<uint16_t>(bits_of<_Float16>(x));
  const uint32_t bits = static_cast<uint32_t>(bits_of<float>(x));
  if (x != x) return 0x7FFF;
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

void cluster_arrive() {
  current().cluster_round = g_cta->cluster->round;
  ++g_cta->cluster->arrived;
}

void cluster_wait() {
  const uint64_t mine = current().cluster_round;
  Cluster& cluster = *g_cta->cluster;
  const auto is_over = [&cluster, mine] {
    cluster.end_round_if_due();
    return cluster.round != mine;
  };
  wait_until(is_over, "its cluster");
}

int cluster_size() { return static_cast<int>(g_cta->cluster->ctas.size()); }

int cluster_rank() { return static_cast<int>(blockIdx.x) % cluster_size(); }

uint32_t of_cta(uint32_t smem, unsigned rank) {
  if (rank >= g_cta->cluster->ctas.size()) stop("CTA %u is not in the cluster", rank);
  return smem | (rank + 1) << kRankShift;
}

void arrive_there(uint32_t barrier) {
  running_cta((barrier >> kRankShift) - 1).copies.push_back([=] {
    mbarrier_arrive(barrier & kHere, 0);
  });
}

void send(uint32_t to, const void* bytes, int count, uint32_t barrier) {
  const unsigned rank = (to >> kRankShift) - 1;
  if (barrier >> kRankShift != rank + 1) stop("a barrier of another CTA counts what is sent");
  if (to % static_cast<uint32_t>(count) != 0) stop("%d bytes to %u are not aligned", count, to);
  Cta& cta = running_cta(rank);
  const auto* first = static_cast<const unsigned char*>(bytes);
  const std::vector<unsigned char> sent(first, first + count);
  cta.copies.push_back([=] {
    memcpy(at(to & kHere, static_cast<uint32_t>(count)), sent.data(), sent.size());
    MBarrier& counting = mbarrier(barrier & kHere);
    counting.bytes -= count;
    end_phase_if_due(counting);
  });
}

namespace {

void prepare(Cta& cta, unsigned block, unsigned threads) {
  cta.block = block;
  cta.warps.assign((threads + 31) / 32, {});
  cta.warpgroups.assign((threads + 127) / 128, {});
  cta.mbarriers.clear();
  cta.copy_groups.clear();
  for (NamedBarrier& barrier : cta.named) barrier = {};
  // NaN in every format, or NaN and the largest numbers; as integers negative, or large.
  cta.smem.assign(kSmemBytes, g_random() % 2 ? 0xFF : 0x7F);
  if (cta.fibers.size() != threads) cta.fibers = std::vector<Fiber>(threads);
  for (Fiber& fiber : cta.fibers) {
    if (!fiber.stack) fiber.stack.reset(new char[kStackBytes]);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
    fiber.is_ready = nullptr;
    fiber.is_done = false;
  }
}

// Lets a CTA run until it waits for others, ends, or has had so many rounds; true if it did
// anything.
bool run_turn(Cta& cta, unsigned rounds) {
  g_cta = &cta;
  blockIdx.x = cta.block;
  memcpy(g_smem, cta.smem.data(), kSmemBytes);
  bool any = false;
  for (unsigned i = 0; i < rounds && !cta.is_done(); ++i) {
    const bool ran = run_ready_fibers(false) || run_ready_fibers(true);
    const bool did = do_asynchronous(!ran);
    if (!ran && !did) break;
    any = true;
  }
  memcpy(cta.smem.data(), g_smem, kSmemBytes);
  return any;
}

// Runs CTAs side by side, to their ends.
void run_ctas(unsigned first, unsigned count, unsigned cluster_size, unsigned threads) {
  constexpr unsigned kMostRounds = 8;
  while (g_ctas.size() < count) g_ctas.emplace_back(new Cta);
  std::vector<Cluster> clusters(count / cluster_size);
  for (unsigned i = 0; i < count; ++i) {
    prepare(*g_ctas[i], first + i, threads);
    g_ctas[i]->cluster = &clusters[i / cluster_size];
    g_ctas[i]->cluster->ctas.push_back(g_ctas[i].get());
  }
  for (;;) {
    bool any = false;
    bool is_done = true;
    const unsigned start = g_random() % count;
    for (unsigned i = 0; i < count; ++i) {
      Cta& cta = *g_ctas[(start + i) % count];
      any = run_turn(cta, count == cluster_size ? ~0u : 1 + g_random() % kMostRounds) || any;
      is_done = is_done && cta.is_done();
    }
    if (is_done) return;
    if (any) continue;
    for (unsigned i = 0; i < count; ++i) {
      const std::vector<Fiber>& fibers = g_ctas[i]->fibers;
      for (unsigned thread = 0; thread < threads; thread += 32) {
        if (fibers[thread].is_done) continue;
        fprintf(stderr, "CTA %u, thread %u waits for %s\n", first + i, thread,
                fibers[thread].waits_for);
      }
    }
    stop("nothing moves any more");
  }
}

}  // namespace

void run_grid(unsigned grid, unsigned cluster, unsigned threads, unsigned most,
              const std::function<void()>& kernel) {
  gridDim.x = grid;
  g_kernel = &kernel;
  for (unsigned first = 0, count = 0; first < grid; first += count) {
    const unsigned clusters = std::min(most / cluster, (grid - first) / cluster);
    count = cluster * (clusters < 2 ? 1 : 1 + g_random() % clusters);
    run_ctas(first, count, cluster, threads);
  }
}

}  // namespace emulator
