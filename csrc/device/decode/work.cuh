// How the work of a decode call is dealt out.
//
// Every CTA finds its share by itself: lengths are read on the device, so a captured call can run
// again with others. A CTA has a part of one (sequence, key-value head) pair where there are CTAs
// enough: it begins and ends once. Else, or where lengths are too unlike, the blocks of all pairs
// stand in one line, pair behind pair, which is cut into equal shares. Where there is a cluster for
// each pair, and lengths let each do it in time, parts are those that a cluster merges.
#pragma once

#include "attn/mask.cuh"
#include "attn/sequence.cuh"
#include "decode/config.h"
#include "ptx/memory.cuh"

namespace flash::decode {

constexpr uint32_t kAllLanes = 0xffffffffu;
constexpr int kPartsAtOnce = 16;  // that are merged

__device__ inline bool appends(const DecodeParams& params) { return params.added.k.ptr != nullptr; }

__device__ inline uint32_t ceil_div(uint32_t x, uint32_t y) { return (x + y - 1) / y; }

// x / y, rounded down, of numbers up to kMostQuick, in a third of the instructions.
constexpr uint32_t kMostQuick = 1 << 20;
__device__ inline uint32_t quick_div(uint32_t x, uint32_t y) {
  return static_cast<uint32_t>(__fdividef(x + 0.5f, static_cast<float>(y)));
}

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
    end = ceil_div(max(high, low), block_n);
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

  // The same for blocks of pairs of about one length: shares of a length that cuts no pair in vain,
  // if that is longer by little: by a 32nd where each is one pair, which neither goes on to another
  // nor is merged, else by a block.
  __device__ Deal(uint32_t num_ctas, uint32_t all, uint32_t num_pairs) : Deal(num_ctas, all) {
    const uint32_t of_pair = max(all / num_pairs, 1u);
    const uint32_t longest = each + (extra > 0);
    const uint32_t even = ceil_div(longest, of_pair) * of_pair;
    const uint32_t spare = longest / 32;
    if (even > longest + (even == of_pair ? spare : min(spare, 1u))) return;
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
};

// What a warp knows of all sequences: blocks of one head.
struct Survey {
  uint32_t each;           // sequences of a lane
  uint32_t mine, longest;  // of this lane's
  uint32_t all;

  // Whether clusters, of which each pair has one, would take no longer than other shares: each CTA
  // has few blocks, or they are as many as any share has.
  __device__ bool suits_clusters(const ForwardParams& call) const {
    const uint32_t few = kFewBlocks * call.cluster;
    const uint32_t b = call.seqs.b;
    return few > 0 && __all_sync(kAllLanes, longest <= few || longest * b <= all + all / 8);
  }
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
  // Of the line, and where the pair's first block is in it. Where each pair is cut by itself `each`
  // is 0, `extra` the number of parts, and the index that of this one: no register more.
  Deal deal;
  uint32_t index;
  bool is_clustered;  // the CTAs of a cluster have parts of one pair

  __device__ explicit Walk(const DecodeParams& params)
      : params(params), left(0), is_clustered(false) {
    const uint32_t share = blockIdx.x;
    Survey survey;
    uint32_t splits = params.call.num_splits;
    if (splits == 0) {
      survey = look_around();
      if (Cfg::kMayBeClustered && survey.suits_clusters(params.call)) splits = params.call.cluster;
    }
    if (splits > 0) {
      is_clustered = true;
      take_split(share, splits);
    } else {
      take_share(share, survey);
    }
  }

  // CTAs that merge in shared memory; 0: none do.
  __device__ int cluster() const {
    if (!Cfg::kHasClusters) return 0;
    return Cfg::kMayBeClustered && !is_clustered ? 0 : params.call.cluster;
  }

  // Blocks of the pair that are in the share.
  __device__ int here() const { return min(left, span.end - block); }

  __device__ bool is_whole() const { return here() == static_cast<int>(span.size()); }

  __device__ Parts parts() const {
    const int share = blockIdx.x;
    if (deal.each == 0) {
      const int part = index;
      return {share - part, static_cast<int>(deal.extra), part};
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

  // One of `num` parts of the pair, or of fewer if it has fewer blocks.
  __device__ void take_part(uint32_t part, uint32_t num) {
    const Deal parts(num, span.size());
    if (part >= parts.num) return;
    deal.each = 0;
    deal.extra = parts.num;
    index = part;
    block = span.begin + parts.first_of(part);
    left = parts.size_of(part, span.size());
  }

  // Each pair in as many parts.
  __device__ void take_split(uint32_t share, uint32_t splits) {
    const uint32_t pair = share / splits;
    const uint32_t sequence = pair / params.call.hk;
    if (Cfg::kMayBeClustered && sequence >= params.call.seqs.b) return;
    head = pair - sequence * params.call.hk;
    find(sequence);
    take_part(share - pair * splits, num_parts(splits));
  }

  // Fewer if clusters would have CTAs without work: all of them are full, or there is one.
  __device__ uint32_t num_parts(uint32_t splits) const {
    const uint32_t cluster = params.call.cluster;
    if (cluster == 0) return splits;
    if (span.size() <= few_blocks(params.call.hk * cluster) * cluster) return cluster;
    return min(splits, span.size() / cluster * cluster);
  }

  // Every warp does the same: each lane has a few sequences, in their order.
  __device__ Survey look_around() {
    const uint32_t b = params.call.seqs.b;
    Survey survey = {ceil_div(b, 32), 0, 0, 0};
    const uint32_t begin = threadIdx.x % 32 * survey.each;
    const uint32_t end = min(b, begin + survey.each);
#pragma unroll 1
    for (uint32_t i = begin; i < end; ++i) {
      find(i);
      survey.mine += span.size();
      survey.longest = max(survey.longest, span.size());
    }
    survey.all = __reduce_add_sync(kAllLanes, survey.mine);
    return survey;
  }

  // A part of a pair that is cut by itself, else what a share of the line begins with.
  __device__ void take_share(uint32_t share, const Survey& survey) {
    const uint32_t hk = params.call.hk;
    const uint32_t all = survey.all * hk;
    const uint32_t length = length_of_parts(survey);
    uint32_t mine = survey.mine;
    uint32_t first = share;
    if (length > 0) {
      mine = num_parts_of(mine, length);
      if (share >= __reduce_add_sync(kAllLanes, mine) * hk) return;
    } else {
      deal = Deal(gridDim.x, all, params.call.seqs.b * hk);
      if (share >= deal.num) return;
      first = deal.first_of(share);
      left = deal.size_of(share, all);
    }
    const uint32_t of_sequence = find_sequence(first, mine * hk, survey.each);
    const uint32_t of_pair = length > 0 ? num_parts_of(span.size(), length) : span.size();
    head = of_sequence / of_pair;
    const uint32_t of_head = of_sequence - head * of_pair;
    if (length > 0) {
      take_part(of_head, of_pair);
    } else {
      block = span.begin + of_head;
      index = first - of_head;
    }
  }

  __device__ static uint32_t num_parts_of(uint32_t blocks, uint32_t length) {
    return quick_div(blocks + length - 1, length);
  }

  // Blocks of a part where each pair is cut by itself: the shortest that leaves a CTA for each
  // part. 0: that would be nearly twice a CTA's share of all, or idle CTAs would cost more than
  // shares do that go from pair to pair.
  __device__ uint32_t length_of_parts(const Survey& survey) const {
    constexpr int kTries = 4;
    constexpr uint32_t kNextPair = 3;  // blocks that are read while a share goes on to one
    const uint32_t hk = params.call.hk;
    const uint32_t all = survey.all * hk;
    if (survey.each > 1 || params.call.seqs.b * hk > gridDim.x || all > kMostQuick) return 0;
    const uint32_t fair = num_parts_of(all, gridDim.x);
    uint32_t length = max(fair, least_length(survey.all));
#pragma unroll 1
    for (int tries = 0; tries < kTries; ++tries) {
      const uint32_t parts = __reduce_add_sync(kAllLanes, num_parts_of(survey.mine, length)) * hk;
      if (parts <= gridDim.x) {
        return (gridDim.x - parts) * fair <= kNextPair * gridDim.x ? length : 0;
      }
      length += ceil_div(length, 4);
    }
    return 0;
  }

  // A part takes time of its own, to leave and to be merged: that is as long as reading it, or as
  // leaves parts that are merged at once. `all`: blocks of a head.
  __device__ uint32_t least_length(uint32_t all) const {
    constexpr float kRowsOfBlock = 32.0f;  // that are merged while a block is read
    const uint32_t of_pair = quick_div(all, params.call.seqs.b);
    const uint32_t rows = params.group * params.call.seqs.sq;
    const auto even = static_cast<uint32_t>(sqrtf(of_pair * rows / kRowsOfBlock));
    return max(min(even, ceil_div(of_pair, kPartsAtOnce)), 1u);
  }

  // Of what all pairs have, blocks or parts, `mine` of it in this lane's: finds the sequence with
  // number `wanted`, and returns which of the sequence's that is. Only of blocks a lane may have
  // several sequences.
  __device__ uint32_t find_sequence(uint32_t wanted, uint32_t mine, uint32_t each) {
    uint32_t up_to_here = mine;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const uint32_t other = __shfl_up_sync(kAllLanes, up_to_here, step);
      if (threadIdx.x % 32 >= step) up_to_here += other;
    }
    const int source = __ffs(__ballot_sync(kAllLanes, up_to_here > wanted)) - 1;
    wanted -= __shfl_sync(kAllLanes, up_to_here - mine, source);
    if (each == 1) {
      take_from(source);
      return wanted;
    }
    for (int i = source * each;; ++i) {
      find(i);
      const uint32_t here = params.call.hk * span.size();
      if (wanted < here) return wanted;
      wanted -= here;
    }
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
