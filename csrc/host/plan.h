// How a call is cut into tiles: from the tables that the kernels read too.
#pragma once

#include "host/driver.h"
#include "host/flash.h"

namespace flash::host {

// Designs of kernels, as flash_attn/_support.py names them.
enum Family : int {
  kSm80,
  kSm90Wide,
  kSm90,
  kSm90Scored,
  kSm90Fp8Wide,
  kSm90Fp8,
  kSm90Fp8Scored,
  kDecode,
  kDecodeWide,
  kCommon,
  kNumFamilies
};

// Tile and CTA of a kernel.
struct Shape {
  int block_m;  // rows of a CTA, or of a step
  int block_n;
  int threads;
  int smem_bytes;
  int box_m;  // rows in one copy of Q, forward, or of dK, by TMA; 0: there are no tensor maps
  bool makes_sums = false;    // backward: dQ is added up in memory; else it has a kernel of its own
  int ctas = 0;               // an SM, of kernels whose CTAs have shares of the work
  bool has_clusters = false;  // may run in clusters, on devices that have them
  bool waits = false;         // by itself for the kernel in front, and begins beside its end
  int element_bytes = 2;      // of Q, K and V
  bool may_pair = false;      // two CTAs with neighbouring rows may load K and V together
};

// How many clusters of 16, 8, 4 and 2 CTAs of a kernel a device holds at once.
struct Clusters {
  int count[4];
};

// The shape of a kernel built for head dim `head_dim` and architecture `arch` (80 for 8.0).
Shape shape_of(int family, int kind, int head_dim, int arch);

// Whether kernels of a family do what a call asks for.
bool takes(int family, const ForwardParams& params, int num_sms);
bool takes(int family, const BackwardParams& params);

// Whether sequences have lengths of their own.
bool has_lengths(const Sequences& seqs);

inline int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }

// Whether decode kernels can run a call: rows of queries and heads of a group that a tile holds.
bool fits_decode(const ForwardParams& params);

// Whether they are the ones for it: there are keys of a cache, or many.
bool prefers_decode(const ForwardParams& params);

// What such a tile holds.
int most_decode_rows();

// Query heads of a group that share tiles: all of them, where queries are so few that tiles of one
// head would be empty for the most part; else 1. `shape`: of who takes the call otherwise.
int choose_heads_of_tile(const ForwardParams& params, const Shape& shape);

// `wanted` parts, or fewer where some would have no keys.
int limit_splits(int wanted, const ForwardParams& params, const Shape& shape);

// The same; for 0 as many as let a call with few rows fill the device.
int splits_of(int wanted, const ForwardParams& params, const Shape& shape, const Device& device);

// Query heads that run together, so that their keys and values stay in L2.
int choose_section(const ForwardParams& params, const Shape& shape, const Device& device);

// The section that has all heads behind it too: enough of them that CTAs end at about one time.
uint32_t last_section(const ForwardParams& params, const Shape& shape, const Device& device);

// Whether CTAs run in pairs that load K and V together: of a causal call, in which few CTAs read
// the same keys at one time, and where no CTA of a pair would be left without rows.
bool is_paired(const ForwardParams& params, const Shape& shape, const Device& device);

// Whether CTAs take tile after tile from a counter.
bool shares_tiles(const ForwardParams& params, const Shape& shape, const Device& device);

// Key-value heads that run together: a wave of CTAs, of a size that leaves no short last section.
int choose_section(const BackwardParams& params, const Shape& shape, const Device& device);

// Columns of CTAs that a deterministic backward call has, each with its own sums for dQ.
int choose_columns(const BackwardParams& params, const Shape& shape, const Device& device);

int64_t num_ctas(const ForwardParams& params, const Shape& shape, const Device& device);
// Shares of a decode call: CTAs, and rooms for what they have of sequences that are cut.
int64_t num_shares(const ForwardParams& params, const Shape& shape, const Device& device);

// Cuts the keys of a decode call into as many parts as fill the device, in clusters that merge
// them: if there is one sequence, whose heads are all as long. Of several with a cluster for each
// head, the device alone knows whether they are: then it takes the cluster as the parts, else it
// goes without. Other calls stay as they are.
void choose_clusters(ForwardParams* params, const Shape& shape, const Device& device,
                     const Clusters& clusters);

// Whether CTAs take block after block of keys from a counter.
bool shares_blocks(const BackwardParams& params, const Shape& shape, const Device& device);

int64_t num_ctas(const BackwardParams& params, const Shape& shape, const Device& device);
int64_t num_ctas_of_dq(const BackwardParams& params, const Shape& shape, const Device& device);

}  // namespace flash::host
