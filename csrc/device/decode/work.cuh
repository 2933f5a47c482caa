// How the work of a decode call is dealt out: equal shares of all blocks of keys.
//
// The blocks of all (sequence, key-value head) pairs stand in one line, pair behind pair. Every CTA
// finds its share of the line by itself: lengths are read on the device, so a captured call can run
// again with others.
#pragma once

#include "attn/mask.cuh"
#include "attn/sequence.cuh"

namespace flash::decode {

constexpr uint32_t kAllLanes = 0xffffffffu;

__device__ inline bool appends(const DecodeParams& params) { return params.added.k.ptr != nullptr; }

// Slots of the cache that a sequence's queries see, or that its new keys fill, in blocks.
struct Span {
  int begin, end;

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

  __device__ int size() const { return end - begin; }
};

// The first `extra` of `num` shares have one block more than the others.
struct Deal {
  int num, each, extra;

  __device__ Deal(int num_ctas, int num_blocks)
      : num(min(num_ctas, max(num_blocks, 1))), each(num_blocks / num), extra(num_blocks % num) {}

  __device__ int first_of(int share) const { return share * each + min(share, extra); }

  // Who has a block.
  __device__ int owner_of(int block) const {
    const int in_front = extra * (each + 1);
    return block < in_front ? block / (each + 1) : extra + (block - in_front) / each;
  }
};

// Who shares a pair with whom.
struct Parts {
  int first;  // share with the pair's first block
  int count;
  int index;  // of this share's part
};

// Walks over a CTA's share, pair by pair.
template <int kBlockN>
struct Walk {
  const DecodeParams& params;
  attn::Sequence seq;
  Span span;
  int head;
  int block;  // the next one, of those of the pair
  int left;   // blocks of the share from there on
  Deal deal;
  int index;  // of the pair's first block in the line

  __device__ explicit Walk(const DecodeParams& params)
      : params(params),
        seq(params.call.seqs, 0),
        span(params, seq, kBlockN),
        head(0),
        block(0),
        left(0),
        deal(1, 0),
        index(0) {
    if (params.call.num_splits > 0) {
      take_split();
    } else {
      take_share();
    }
  }

  // Blocks of the pair that are in the share.
  __device__ int here() const { return min(left, span.end - block); }

  __device__ bool is_whole() const { return here() == span.size(); }

  __device__ Parts parts() const {
    const int splits = params.call.num_splits;
    if (splits > 0) {
      const int each = (span.size() + splits - 1) / splits;
      const int split = (block - span.begin) / each;
      return {static_cast<int>(blockIdx.x) - split, (span.size() + each - 1) / each, split};
    }
    const int first = deal.owner_of(index);
    const int last = deal.owner_of(index + span.size() - 1);
    return {first, last - first + 1, static_cast<int>(blockIdx.x) - first};
  }

  // Behind `count` blocks of the pair, which are all of them or the last of the share.
  __device__ void advance(int count) {
    block += count;
    left -= count;
    if (left == 0 || block < span.end) return;
    index += span.size();
    if (++head == params.call.hk) {
      head = 0;
      do {
        find(seq.index + 1);
      } while (span.size() == 0);
    }
    block = span.begin;
  }

 private:
  __device__ void find(int sequence) {
    seq = attn::Sequence(params.call.seqs, sequence);
    span = Span(params, seq, kBlockN);
  }

  // Blocks of one head.
  __device__ int blocks_of(int sequence) const {
    const attn::Sequence it(params.call.seqs, sequence);
    return Span(params, it, kBlockN).size();
  }

  // One of num_splits parts of a pair.
  __device__ void take_split() {
    const int splits = params.call.num_splits;
    const int pair = blockIdx.x / splits;
    const int split = blockIdx.x % splits;
    head = pair % params.call.hk;
    find(pair / params.call.hk);
    const int each = (span.size() + splits - 1) / splits;
    block = span.begin + split * each;
    left = max(min(each, span.end - block), 0);
  }

  // Every warp does the same, a sequence a lane.
  __device__ void take_share() {
    const int b = params.call.seqs.b;
    const int lane = threadIdx.x % 32;
    int total = 0;
#pragma unroll 4
    for (int i = lane; i < b; i += 32) total += blocks_of(i);
#pragma unroll
    for (int step = 1; step < 32; step *= 2) total += __shfl_xor_sync(kAllLanes, total, step);
    deal = Deal(gridDim.x, total * params.call.hk);
    const int share = blockIdx.x;
    const int first = deal.first_of(share);
    left = share < deal.num ? deal.first_of(share + 1) - first : 0;
    if (left == 0) return;
    // The sequence that has the share's first block.
    int sequence = lane;
    int behind = 0;  // blocks up to this lane's sequence and with it
    uint32_t found = 0;
    for (;; sequence += 32) {
      int sum = sequence < b ? blocks_of(sequence) * params.call.hk : 0;
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        const int other = __shfl_up_sync(kAllLanes, sum, step);
        if (lane >= step) sum += other;
      }
      behind += sum;
      found = __ballot_sync(kAllLanes, behind > first);
      if (found != 0) break;
      behind = __shfl_sync(kAllLanes, behind, 31);
    }
    const int source = __ffs(found) - 1;
    find(__shfl_sync(kAllLanes, sequence, source));
    const int size = span.size();
    const int at = first - (__shfl_sync(kAllLanes, behind, source) - size * params.call.hk);
    head = at / size;
    block = span.begin + at % size;
    index = first - at % size;
  }
};

}  // namespace flash::decode
