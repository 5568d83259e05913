// Device code of the sampler: fastlm/reference/sample.py to the bit, without sorting the vocabulary.
//
// A row belongs to a group of blocks, each with a contiguous part of the vocabulary, of which each warp takes a
// contiguous part again. A pass finds the maximum; for top_k a few passes find the k-th largest by the digits of its
// bits (radix selection), all digits of a histogram being counted by all blocks; as soon as few candidates are left,
// they move to a list, with which one block goes on alone. A pass sums the weights. The drawn token is found by
// descending into sums, so that with no filter there are two readings of the row and a sixteenth. top_p and min_p are
// decided by rejection as in the CPU's kernel. Sums are of integers, so their order, and with it the number of blocks,
// changes nothing.
#pragma once

#include "sample_row.cuh"

namespace fastlm {
namespace device {

template <typename T>
class Sampler {
 public:
  FASTLM_DEVICE Sampler(const SampleLaunch& launch_, SampleShared& shared_)
      : launch(launch_),
        shared(shared_),
        row(blockIdx.x / launch_.blocks),
        scratch(launch_.rows[row]),
        group{scratch.barrier, launch_.blocks, blockIdx.x % launch_.blocks},
        warp(int(threadIdx.x) / kWarp) {}

  // The row's token, or -1; the same in all threads of the group.
  FASTLM_DEVICE int64_t run() {
    const SampleArgs& a = launch.args;
    size = a.vocab;
    mine = Part{0, size}.part(group.rank, group.blocks);
    x.logits = reinterpret_cast<const T*>(a.logits) + row * a.row_stride;
    x.bias = a.bias == nullptr ? nullptr : a.bias + row * a.bias_stride;
    x.processed = nullptr;
    x.cut = 0;
    const uint64_t largest = find_maximum();
    x.maximum = of_key(largest);
    if (largest == kRefused || !(x.maximum > -INFINITY)) return -1;
    const double temperature = option(a.temperature, row);
    if (temperature == 0) return int64_t(~uint32_t(largest));
    const double scale = 1.4426950408889634 / temperature;
    x.scale = float(scale < 0x1p-126 ? 0x1p-126 : scale > 0x1.fffffep127 ? 0x1.fffffep127 : scale);
    const int64_t k = option(a.top_k, row);
    if (k > 0 && k < a.vocab && !select(k)) return -1;  // another block of the group goes on
    const int64_t drawn = draw();
    return size < a.vocab ? scratch.survivor_ids[drawn] : drawn;
  }

 private:
  // One pass over this block's elements.
  template <typename F>
  FASTLM_DEVICE void pass(F f) const {
    const Part part = mine.part(warp, kSampleWarps);
    each(part.begin, part.end, [this](int64_t i) { return x.at(i); }, f);
  }

  // What the group makes of one pair for each thread: the sum of all, or the larger.
  template <typename Join>
  FASTLM_DEVICE void combine(uint64_t value[2], Join join) {
#pragma unroll
    for (int k = 0; k < 2; ++k)
      for (int lanes = kWarp / 2; lanes > 0; lanes /= 2)
        value[k] = join(value[k], uint64_t(__shfl_xor_sync(kAll, value[k], lanes)));
    if (threadIdx.x % kWarp == 0) {
      for (int k = 0; k < 2; ++k) shared.sums[k][warp] = value[k];
      if (group.blocks > 1) scratch.within[round & 1][group.rank][warp] = value[1];
    }
    __syncthreads();
    for (int k = 0; k < 2; ++k) {
      value[k] = shared.sums[k][0];
      for (int w = 1; w < kSampleWarps; ++w) value[k] = join(value[k], shared.sums[k][w]);
    }
    if (group.blocks > 1) {
      // Two places in turn: a block may be here again while another still reads what it left.
      auto& partial = scratch.partial[round++ & 1];
      if (threadIdx.x == 0)
        for (int k = 0; k < 2; ++k) partial[group.rank][k] = value[k];
      group.sync();
      for (int k = 0; k < 2; ++k) {
        value[k] = partial[0][k];
        for (unsigned b = 1; b < group.blocks; ++b) value[k] = join(value[k], partial[b][k]);
      }
    } else {
      __syncthreads();  // the sums may be overwritten
    }
  }

  // The largest key. Applies the penalties on the way, to which the history's counts in global memory are put back to 0.
  FASTLM_DEVICE uint64_t find_maximum() {
    const SampleArgs& a = launch.args;
    const auto repetition = float(option(a.repetition_penalty, row));
    const auto presence = float(option(a.presence_penalty, row));
    const auto frequency = float(option(a.frequency_penalty, row));
    const bool penalised = a.history != nullptr && (repetition != 1 || presence != 0 || frequency != 0);
    uint64_t best[2] = {0, 0};
    if (!penalised) {
      pass([&](float v, int64_t i) { best[0] = larger(best[0], v < INFINITY ? rank_key(v, i) : kRefused); });
    } else {
      unsigned* const counts = launch.counts + row * a.vocab;
      float* const processed = launch.processed + row * a.vocab;
      const int64_t* const history = a.history + row * a.history_stride;
      const int64_t length = option(a.history_lengths, row), prompt = option(a.prompt_lengths, row);
      for (int64_t j = group.rank * kSampleThreads + threadIdx.x; j < length; j += group.blocks * kSampleThreads) {
        const int64_t id = history[j];
        if (id < 0 || id >= a.vocab) {
          best[0] = kRefused;
          continue;
        }
        atomicOr(&counts[id], 1u);
        if (j >= prompt) atomicAdd(&counts[id], 2u);
      }
      group.sync();
      const auto penalise = [&](int64_t i) {
        float v = x.raw(i);
        const unsigned count = counts[i];
        if (count > 0) {
          counts[i] = 0;
          v = v < 0 ? __fmul_rn(v, repetition) : __fdiv_rn(v, repetition);
          if (count > 1) {
            v = __fsub_rn(v, __fmul_rn(frequency, float(count >> 1)));
            v = __fsub_rn(v, presence);
          }
        }
        processed[i] = v;
        return v;
      };
      const Part part = mine.part(warp, kSampleWarps);
      each(part.begin, part.end, penalise,
           [&](float v, int64_t i) { best[0] = larger(best[0], v < INFINITY ? rank_key(v, i) : kRefused); });
      x.processed = processed;
    }
    combine(best, larger);
    return best[0];
  }

  FASTLM_DEVICE static uint64_t larger(uint64_t a, uint64_t b) { return a > b ? a : b; }
  FASTLM_DEVICE static uint64_t sum(uint64_t a, uint64_t b) { return a + b; }

  // Sets x.cut to the k-th largest key, or to one that no other key lies between. Once few are left above a cut, the
  // row becomes the list of them, with which the group's first block goes on; in the others this is false.
  FASTLM_DEVICE bool select(const int64_t wanted) {
    uint64_t prefix = 0, mask = 0;
    int64_t k = wanted;
    int levels = 0;
    for (bool more = true; more; ++levels) {
      const int shift = levels < kDigitLevels - 1 ? 64 - kDigitBits * (levels + 1) : 0;
      const uint64_t digits = levels < kDigitLevels - 1 ? kDigits - 1 : (kDigits - 1) >> 2;
      for (int d = threadIdx.x; d < kDigits; d += kSampleThreads) shared.histogram[d] = 0;
      __syncthreads();
      pass([&](float v, int64_t i) {
        const uint64_t key = rank_key(v, i);
        if ((key & mask) == prefix) atomicAdd(&shared.histogram[key >> shift & digits], 1u);
      });
      __syncthreads();
      if (group.blocks > 1) {
        unsigned* const counts = scratch.histogram[levels];
        for (int d = threadIdx.x; d < kDigits; d += kSampleThreads)
          if (shared.histogram[d] > 0) atomicAdd(&counts[d], shared.histogram[d]);
        group.sync();
        for (int d = threadIdx.x; d < kDigits; d += kSampleThreads) shared.histogram[d] = counts[d];
        __syncthreads();
      }
      if (warp == 0) find_digit(k);
      __syncthreads();
      prefix |= uint64_t{shared.digit} << shift;
      mask |= digits << shift;
      k = shared.remaining;
      more = shared.found != k;  // else all that share these digits are kept
      const int64_t survivors = wanted - k + shared.found;
      if (survivors > kMostSurvivors || survivors == size || size < launch.args.vocab) continue;
      gather(prefix);
      clear_histograms(levels + 1);
      if (group.rank > 0) return false;
      group.blocks = 1;
      size = survivors;
      mine = {0, size};
      x.processed = scratch.survivors;
      // What is still to be decided is decided anew, on the list.
      prefix = mask = 0;
      k = wanted;
      levels = -1;
    }
    x.cut = prefix;
    if (group.blocks > 1) {
      group.sync();  // all have read them once all have come here
      clear_histograms(levels);
    }
    return true;
  }

  FASTLM_DEVICE void clear_histograms(int levels) const {
    unsigned* const counts = scratch.histogram[0];
    if (group.blocks > 1 && group.rank == 0)
      for (int d = threadIdx.x; d < levels * kDigits; d += kSampleThreads) counts[d] = 0;
  }

  // Lists all elements whose keys are at least `cut`, in the order of their ids. Ends with the group's blocks together.
  FASTLM_DEVICE void gather(uint64_t cut) {
    uint64_t count[2] = {0, 0};
    pass([&](float v, int64_t i) { count[0] += rank_key(v, i) >= cut; });
    combine(count, sum);
    uint64_t at = 0;
    if (group.blocks > 1)
      for (unsigned b = 0; b < group.rank; ++b) at += scratch.partial[(round - 1) & 1][b][0];
    for (int w = 0; w < warp; ++w) at += shared.sums[0][w];
    const Part part = mine.part(warp, kSampleWarps);
    const int lane = threadIdx.x % kWarp;
    for (int64_t begin = part.begin; begin < part.end; begin += kAhead * kWarp) {
      float v[kAhead];
#pragma unroll
      for (int j = 0; j < kAhead; ++j)
        if (const int64_t i = begin + j * kWarp + lane; i < part.end) v[j] = x.at(i);
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        const int64_t i = begin + j * kWarp + lane;
        const bool kept = i < part.end && rank_key(v[j], i) >= cut;
        const unsigned all = __ballot_sync(kAll, kept);
        if (kept) {
          const uint64_t place = at + __popc(all & ((1u << lane) - 1));
          scratch.survivors[place] = v[j];
          scratch.survivor_ids[place] = unsigned(i);
        }
        at += __popc(all);
      }
    }
    group.sync();
  }

  // By one warp: the highest digit at which at least k elements have been passed, how many have it, and how many of
  // those are wanted.
  FASTLM_DEVICE void find_digit(int64_t k) {
    constexpr int kEach = kDigits / kWarp;
    const int lane = threadIdx.x % kWarp, top = kDigits - 1 - lane * kEach;
    unsigned own = 0;
    for (int d = 0; d < kEach; ++d) own += shared.histogram[top - d];
    unsigned passed = own;  // by this lane and those before it, whose digits are higher
    for (int lanes = 1; lanes < kWarp; lanes *= 2) {
      const unsigned before = __shfl_up_sync(kAll, passed, unsigned(lanes));
      if (lane >= lanes) passed += before;
    }
    int64_t wanted = k - int64_t(passed - own);
    if (wanted < 1 || wanted > int64_t{own}) return;
    int d = top;
    for (; wanted > int64_t{shared.histogram[d]}; --d) wanted -= shared.histogram[d];
    shared.digit = unsigned(d);
    shared.found = shared.histogram[d];
    shared.remaining = wanted;
  }

  // This warp's share of the weights in `part`: of all that top_k keeps, and of those within the prefix.
  FASTLM_DEVICE void weigh(const Part& part, const Prefix& prefix, uint64_t total[2]) const {
    total[0] = total[1] = 0;
    each(part.begin, part.end, [this](int64_t i) { return x.at(i); }, [&](float v, int64_t i) {
      if (rank_key(v, i) < x.cut) return;
      const float e = x.probability(v);
      const uint64_t w = weight(e);
      total[0] += w;
      if (prefix.has(e, i)) total[1] += w;
    });
  }

  // The first id at which the running sum of weights within the prefix exceeds the target, after total_within(prefix),
  // which has left the sums of blocks and warps. All blocks of the group look for it, wherever it is, so that none has
  // to wait for another.
  FASTLM_DEVICE int64_t find(const Prefix& prefix, uint64_t target) {
    Part part{0, size};
    const uint64_t* sums = shared.sums[1];
    if (group.blocks > 1) {
      const auto& partial = scratch.partial[(round - 1) & 1];
      unsigned b = 0;
      for (; b + 1 < group.blocks && target >= partial[b][1]; ++b) target -= partial[b][1];
      part = part.part(b, group.blocks);
      sums = scratch.within[(round - 1) & 1][b];
    }
    int warp_of_it = 0;
    for (; warp_of_it + 1 < kSampleWarps && target >= sums[warp_of_it]; ++warp_of_it) target -= sums[warp_of_it];
    part = part.part(warp_of_it, kSampleWarps);
    __syncthreads();  // the sums may be overwritten
    while (part.end - part.begin > kWarp) {
      uint64_t total[2];
      weigh(part.part(warp, kSampleWarps), prefix, total);
      total[1] = warp_sum(total[1]);
      if (threadIdx.x % kWarp == 0) shared.sums[1][warp] = total[1];
      __syncthreads();
      int w = 0;
      for (; w + 1 < kSampleWarps && target >= shared.sums[1][w]; ++w) target -= shared.sums[1][w];
      part = part.part(w, kSampleWarps);
      __syncthreads();
    }
    const int lane = threadIdx.x % kWarp;
    uint64_t running[2];
    weigh(part, prefix, running);  // of one element
    for (int lanes = 1; lanes < kWarp; lanes *= 2) {
      const uint64_t before = __shfl_up_sync(kAll, running[1], unsigned(lanes));
      if (lane >= lanes) running[1] += before;
    }
    return part.begin + __ffs(int(__ballot_sync(kAll, target < running[1]))) - 1;
  }

  FASTLM_DEVICE uint64_t total_within(const Prefix& prefix, uint64_t* of_all) {
    uint64_t total[2];
    weigh(mine.part(warp, kSampleWarps), prefix, total);
    combine(total, sum);
    *of_all = total[0];
    return total[1];
  }

  FASTLM_DEVICE int64_t draw() {
    const SampleArgs& a = launch.args;
    const double top_p = option(a.top_p, row);
    const auto min_p = float(option(a.min_p, row));
    const auto seed = uint64_t(option(a.seed, row)), sequence = uint64_t(option(a.sequence, row));
    const auto position = uint32_t(option(a.position, row));
    Prefix prefix = min_p > 0 ? Prefix{min_p, size} : Prefix{-1, 0};
    uint64_t all;
    uint64_t total = total_within(prefix, &all);
    const uint64_t wanted = share_of(top_p, all);
    for (uint32_t lane = 0;; ++lane) {
      const int64_t drawn = find(prefix, __umul64hi(random64(seed, sequence, position, lane), total));
      if (top_p >= 1) return drawn;
      prefix = {x.probability(x.at(drawn)), drawn};
      total = total_within(prefix, &all);
      if (total < wanted || total == 0) return drawn;
    }
  }

  const SampleLaunch& launch;
  SampleShared& shared;
  const int64_t row;
  SampleScratch& scratch;
  Group group;
  const int warp;
  int64_t size = 0;  // elements of the row: the vocabulary, or the survivors of top_k
  Part mine{};
  SampleRow<T> x{};
  int round = 0;
};

template <typename T>
__global__ void __launch_bounds__(kSampleThreads) sample_kernel(SampleLaunch launch) {
  FASTLM_SHARED(SampleShared, shared);
  Sampler<T> sampler(launch, shared);
  const int64_t row = blockIdx.x / launch.blocks;
  const int64_t token = sampler.run();
  if (threadIdx.x == 0 && blockIdx.x % launch.blocks == 0) launch.args.tokens[row] = token;
}

}  // namespace device
}  // namespace fastlm
