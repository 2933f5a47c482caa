// How the work of a decode call is dealt out: equal shares of all blocks of keys.
//
// The blocks of all (sequence, key-value head) pairs stand in one line, pair behind pair. Every CTA
// finds its share of the line by itself: lengths are read on the device, so a captured call can run
// again with others. Where there is a cluster for each pair, and lengths turn out to be about
// equal, shares are the parts of pairs that clusters merge.
#pragma once

#include "attn/mask.cuh"
#include "attn/sequence.cuh"
#include "decode/config.h"
#include "ptx/memory.cuh"

namespace flash::decode {

constexpr uint32_t kAllLanes = 0xffffffffu;
constexpr int kPartsAtOnce = 16;  // that are merged

__device__ inline bool appends(const DecodeParams& params) { return params.added.k.ptr != nullptr; }

// Slots of the cache that a sequence's queries see, or that its new keys fill, in blocks.
struct Span {
  int begin, end;

  __device__ Span() {}

  __device__ Span(const DecodeParams& params, const attn::Sequence& seq, int block_n) {
    const attn::Mask mask(params.call.scores, seq.sq, seq.sk);
    int low = seq.skip;
    int high = seq.skip;
    if (seq.sq > 0) {
      low += mask.lowest(0);
      high += mask.highest(seq.sq - 1);
    }
    if (appends(params)) {
      low = min(low, max(params.call.seqs.seqused_k[seq.index], 0));
      high = seq.skip + seq.sk;
    }
    begin = low / block_n;
    end = (max(high, low) + block_n - 1) / block_n;
    // Without keys the results are written all the same.
    if (end == begin && seq.sq > 0) ++end;
  }

  __device__ uint32_t size() const { return end - begin; }
};

// Equal shares: the first `extra` have one block more than the others, and the last may have less.
struct Deal {
  uint32_t num, each, extra;

  __device__ Deal() {}

  __device__ Deal(uint32_t num_ctas, uint32_t all) : num(min(num_ctas, all)), each(1), extra(0) {
    if (all <= num_ctas) return;
    each = all / num;
    extra = all - each * num;
  }

  // The same for blocks of pairs of about one length. A part takes time of its own, to leave and to
  // be merged: so shares are longer where many rows are merged, and of a length that cuts no pair
  // in vain, if that is no longer than the longest, or by little.
  __device__ Deal(uint32_t num_ctas, uint32_t all, uint32_t num_pairs, uint32_t rows)
      : Deal(num_ctas, all) {
    constexpr uint32_t kManyRows = 8;
    constexpr float kRowsOfBlock = 32.0f;  // that are merged while a block is read
    if (all == 0 || (all <= num_ctas && rows < kManyRows)) return;
    const uint32_t of_pair = max(all / num_pairs, 1u);
    const uint32_t least = min(static_cast<uint32_t>(sqrtf(of_pair * rows / kRowsOfBlock)),
                               ceil_div(of_pair, kPartsAtOnce));
    const uint32_t longest = max(each + (extra > 0), least);
    const uint32_t even = longest < of_pair ? ceil_div(of_pair, of_pair / longest)
                                            : ceil_div(longest, of_pair) * of_pair;
    if (least <= each && even > longest + min(longest / 32, 1u)) return;
    each = even;
    extra = 0;
    num = ceil_div(all, each);
  }

  __device__ uint32_t first_of(uint32_t share) const { return share * each + min(share, extra); }

  // Blocks of a share, of all of them.
  __device__ uint32_t size_of(uint32_t share, uint32_t all) const {
    return min(each + (share < extra), all - first_of(share));
  }

  // Who has a block.
  __device__ uint32_t owner_of(uint32_t block) const {
    if (each == 1 && extra == 0) return block;
    const uint32_t longer = extra * (each + 1);  // blocks of longer shares
    const bool is_longer = block < longer;
    return (is_longer ? block : block - longer) / (each + is_longer) + (is_longer ? 0 : extra);
  }

 private:
  __device__ static uint32_t ceil_div(uint32_t x, uint32_t y) { return (x + y - 1) / y; }
};

// Who shares a pair with whom: every `stride`-th share from `first` on.
struct Parts {
  int first;  // share with the pair's first block
  int count;
  int index;  // of this share's part
  int stride = 1;

  // What clusters of a power of two make of them. Its CTAs have each a piece of the rows, and meet
  // the CTAs with that piece of other clusters.
  __device__ Parts of_clusters(int size) const {
    const int shift = __ffs(size) - 1;
    const int rank = index & (size - 1);
    return {first + rank, (count + size - 1) >> shift, index >> shift, size};
  }
};

// Walks over a CTA's share, pair by pair.
template <class Cfg>
struct Walk {
  const DecodeParams& params;
  attn::Sequence seq;
  Span span;
  int head;
  int block;  // the next one, of those of the pair
  int left;   // blocks of the share from there on
  Deal deal;
  // Of the pair's first block in the line; of the part, where each pair is cut into as many.
  uint32_t index;
  bool is_equal;  // sequences are about as long as one another, and each pair has a cluster

  __device__ explicit Walk(const DecodeParams& params) : params(params), left(0), is_equal(false) {
    const uint32_t share = blockIdx.x;
    if (params.call.num_splits > 0) {
      take_split(share);
    } else {
      take_share(share);
    }
  }

  // Parts of each pair; 0: pairs are cut where shares end.
  __device__ uint32_t splits() const {
    return Cfg::kMayBeEqual && is_equal ? params.call.cluster : params.call.num_splits;
  }

  // CTAs that merge in shared memory; 0: none do.
  __device__ int cluster() const {
    if (!Cfg::kHasClusters) return 0;
    return Cfg::kMayBeEqual && splits() == 0 ? 0 : params.call.cluster;
  }

  // Blocks of the pair that are in the share.
  __device__ int here() const { return min(left, span.end - block); }

  __device__ bool is_whole() const { return here() == static_cast<int>(span.size()); }

  __device__ Parts parts() const {
    const int share = blockIdx.x;
    if (splits() > 0) {
      const int part = index;
      return {share - part, static_cast<int>(min(num_parts(), span.size())), part};
    }
    const int first = deal.owner_of(index);
    const int last = deal.owner_of(index + span.size() - 1);
    return {first, last - first + 1, share - first};
  }

  // Behind `count` blocks of the pair, which are all of them or the last of the share. Returns
  // whether another pair follows.
  __device__ bool advance(int count) {
    block += count;
    left -= count;
    if (left == 0 || block < span.end) return false;
    index += span.size();
    if (++head == params.call.hk) {
      head = 0;
      do {
        find(seq.index + 1);
      } while (span.size() == 0);
    }
    block = span.begin;
    return true;
  }

 private:
  __device__ void find(int sequence) {
    seq = attn::Sequence(params.call.seqs, sequence);
    span = Span(params, seq, Cfg::kBlockN);
  }

  // One of `splits` parts of a pair, or of fewer if clusters would have CTAs without work: all of
  // them are full, or there is one.
  __device__ void take_split(uint32_t share) {
    const uint32_t splits = this->splits();
    const uint32_t pair = share / splits;
    const uint32_t sequence = pair / params.call.hk;
    if (Cfg::kMayBeEqual && sequence >= params.call.seqs.b) return;
    head = pair - sequence * params.call.hk;
    find(sequence);
    const Deal parts(num_parts(), span.size());
    index = share - pair * splits;
    if (index >= parts.num) return;
    block = span.begin + parts.first_of(index);
    left = parts.size_of(index, span.size());
  }

  __device__ uint32_t num_parts() const {
    const uint32_t cluster = params.call.cluster;
    if (cluster == 0) return splits();
    if (span.size() <= kFewBlocks * cluster) return cluster;
    return min(splits(), span.size() / cluster * cluster);
  }

  // Blocks of the sequence's pairs.
  __device__ uint32_t num_blocks() const { return span.size() * params.call.hk; }

  // Every warp does the same: each lane counts the blocks of a few sequences, in their order.
  __device__ void take_share(uint32_t share) {
    const int b = params.call.seqs.b;
    const int lane = threadIdx.x % 32;
    const int each = (b + 31) / 32;
    uint32_t mine = 0;
    uint32_t longest = 0;
#pragma unroll 1
    for (int i = lane * each; i < min(b, (lane + 1) * each); ++i) {
      find(i);
      mine += num_blocks();
      longest = max(longest, num_blocks());
    }
    uint32_t up_to_here = mine;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const uint32_t other = __shfl_up_sync(kAllLanes, up_to_here, step);
      if (lane >= step) up_to_here += other;
    }
    const uint32_t rows = params.group * params.call.seqs.sq;
    const uint32_t all = __shfl_sync(kAllLanes, up_to_here, 31);
    if (Cfg::kMayBeEqual && params.call.cluster > 0 &&
        __all_sync(kAllLanes, longest * b <= all + all / 8)) {
      is_equal = true;
      take_split(share);
      return;
    }
    deal = Deal(gridDim.x, all, b * params.call.hk, rows);
    if (share >= deal.num) return;
    const uint32_t first = deal.first_of(share);
    left = deal.size_of(share, all);
    const int source = __ffs(__ballot_sync(kAllLanes, up_to_here > first)) - 1;
    uint32_t in_front = __shfl_sync(kAllLanes, up_to_here - mine, source);
    if (each == 1) {
      take_from(source);
    } else {
      find(source * each);
      while (in_front + num_blocks() <= first) {
        in_front += num_blocks();
        find(seq.index + 1);
      }
    }
    head = (first - in_front) / span.size();
    const uint32_t of_head = first - in_front - head * span.size();
    block = span.begin + of_head;
    index = first - of_head;
  }

  // The sequence that lane `source` has found.
  __device__ void take_from(int source) {
    seq.index = source;
    seq.first_q = __shfl_sync(kAllLanes, seq.first_q, source);
    seq.first_k = __shfl_sync(kAllLanes, seq.first_k, source);
    for (int* x : {&seq.cache_row, &seq.sq, &seq.sk, &seq.skip, &span.begin, &span.end}) {
      *x = __shfl_sync(kAllLanes, *x, source);
    }
  }
};

}  // namespace flash::decode
