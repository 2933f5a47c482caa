// Families of kernels: their tiles, from the tables that the kernels read too, and what calls they
// take.
#pragma once

#include "host/flash.h"
#include "host/numbers.h"

namespace flash::host {

// Designs of kernels, as flash_attn/_support.py names them.
enum Family : int {
  kSm80,
  kSm90Wide,
  kSm90Narrow,
  kSm90,
  kSm90Scored,
  kSm90Fp8Wide,
  kSm90Fp8,
  kSm90Fp8Scored,
  kSm90Latent,
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
  bool takes_blocks = false;  // backward: a CTA may take one block after another
  bool may_pair = false;  // two CTAs may load K and V together: with neighbouring rows, or heads
};

// How many clusters of 16, 8, 4 and 2 CTAs of a kernel a device holds at once.
struct Clusters {
  int count[4];
};

// The shape of a kernel built for head dim `head_dim` and architecture `arch` (80 for 8.0).
Shape shape_of(int family, int kind, int head_dim, int arch);

// Whether kernels of a family, built for head dim `head_dim`, do what a call asks for.
bool takes(int family, int head_dim, const ForwardParams& params, int num_sms);
bool takes(int family, const BackwardParams& params);

// Whether some scores are hidden, other than behind the ends of sequences.
bool has_mask(const Scores& scores);

// Whether keys stand in pages that can be copied in pieces of rows, from their first key on.
bool has_whole_pieces(const Sequences& seqs);

// Whether sequences have lengths of their own.
bool has_lengths(const Sequences& seqs);

// Queries times heads of a group, and how many of them the largest tile of decode kernels holds.
int64_t decode_rows(const ForwardParams& params);
int most_decode_rows();

// Whether a call is one of attention over a latent: V is wide, or has a query of its own.
bool is_latent(const ForwardParams& params);

// Whether decode kernels can run a call.
bool fits_decode(const ForwardParams& params);

}  // namespace flash::host
