// What the sampler is made of: a row's scratch, the order and weights of its elements, and its parts.
#pragma once

#include "device.cuh"
#include "fastlm/philox.h"
#include "fastlm/sample.h"

namespace fastlm {
namespace device {

constexpr int kSampleThreads = 512, kSampleWarps = kSampleThreads / kWarp;
constexpr int kDigitBits = 11, kDigits = 1 << kDigitBits, kDigitLevels = 6;
constexpr int kMostSampleBlocks = 64;  // a row
constexpr int kMostSurvivors = 2048;   // on the list: they are read from the level-1 cache
constexpr uint64_t kRefused = ~uint64_t{0};

// A row's scratch in global memory.
struct SampleScratch {
  unsigned barrier[4];
  uint64_t partial[2][kMostSampleBlocks][2];
  uint64_t within[2][kMostSampleBlocks][kSampleWarps];  // partial[...][1], warp by warp
  float survivors[kMostSurvivors];
  unsigned survivor_ids[kMostSurvivors];
  unsigned histogram[kDigitLevels][kDigits];  // zero between calls
};

struct SampleLaunch {
  SampleArgs args;
  SampleScratch* rows;  // [batch]
  float* processed;     // [batch, vocab] logits after bias and penalties
  unsigned* counts;     // [batch, vocab] of history, zero between calls
  unsigned blocks;      // a row
};

struct SampleShared {
  uint64_t sums[2][kSampleWarps];
  unsigned histogram[kDigits];
  unsigned digit, found;
  int64_t remaining;
};

FASTLM_DEVICE double option(const RealOption& o, int64_t row) { return o.rows ? o.rows[row] : o.value; }
FASTLM_DEVICE int64_t option(const IntegerOption& o, int64_t row) { return o.rows ? o.rows[row] : o.value; }

// Larger floats first, then lower ids; the zeros are one.
FASTLM_DEVICE uint64_t rank_key(float x, int64_t id) {
  const uint32_t bits = __float_as_uint(__fadd_rn(x, 0.0f));
  const uint32_t ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return uint64_t{ordered} << 32 | ~uint32_t(id);
}
FASTLM_DEVICE float of_key(uint64_t key) {
  const auto ordered = uint32_t(key >> 32);
  return __uint_as_float(ordered & 0x80000000u ? ordered & 0x7FFFFFFFu : ~ordered);
}

// 2^max(y, -40) by the specified polynomial, each operation rounding once.
FASTLM_DEVICE float relative_probability(float x, float maximum, float scale) {
  float y = __fmul_rn(__fsub_rn(x, maximum), scale);
  y = y > -40.0f ? y : -40.0f;
  const float rounded = __fadd_rn(y, 0x1.8p23f);
  const float f = __fsub_rn(y, __fsub_rn(rounded, 0x1.8p23f));
  float p = __fadd_rn(__fmul_rn(f, 0x1.5bba14p-10f), 0x1.3cea88p-7f);
  p = __fadd_rn(__fmul_rn(p, f), 0x1.c6b752p-5f);
  p = __fadd_rn(__fmul_rn(p, f), 0x1.ebf9bcp-3f);
  p = __fadd_rn(__fmul_rn(p, f), 0x1.62e42ap-1f);
  p = __fadd_rn(__fmul_rn(p, f), 1.0f);
  return __uint_as_float(__float_as_uint(p) + (__float_as_uint(rounded) << 23));
}
FASTLM_DEVICE uint64_t weight(float e) { return uint64_t(__float2ll_rn(__fmul_rn(e, 0x1p38f))); }

// The smallest integer that is not below `total` times top_p, of which 53 bits count.
FASTLM_DEVICE uint64_t share_of(double top_p, uint64_t total) {
  const auto share = uint64_t(__double2ll_rn(top_p * 0x1p53));
  const uint64_t low = share * total, rounded = low + ((uint64_t{1} << 53) - 1);
  return (__umul64hi(share, total) + (rounded < low)) << 11 | rounded >> 53;
}

template <typename T>
struct SampleRow {
  const T* logits;
  const float* bias;       // or null
  const float* processed;  // what replaces the two once penalties have been applied; or null
  float maximum, scale;
  uint64_t cut;  // the least key that top_k keeps

  FASTLM_DEVICE float raw(int64_t i) const {
    const float x = to_float(logits[i]);
    return bias == nullptr ? x : __fadd_rn(x, bias[i]);
  }
  FASTLM_DEVICE float at(int64_t i) const { return processed == nullptr ? raw(i) : processed[i]; }
  FASTLM_DEVICE float probability(float x) const { return relative_probability(x, maximum, scale); }
};

// All elements ahead of (e, index) in the order "larger e first, then lower id".
struct Prefix {
  float e;
  int64_t index;

  FASTLM_DEVICE bool has(float other, int64_t i) const { return other > e || (other == e && i < index); }
};

constexpr int kAhead = 6;  // loads that each thread has under way; with more, sm_80 spills

// f(x, id) for the elements [begin, end), by one warp.
template <typename Load, typename F>
FASTLM_DEVICE void each(int64_t begin, int64_t end, Load load, F f) {
  for (int64_t i = begin + threadIdx.x % kWarp; i < end; i += kAhead * kWarp) {
    float x[kAhead];
#pragma unroll
    for (int j = 0; j < kAhead; ++j)
      if (i + j * kWarp < end) x[j] = load(i + j * kWarp);
#pragma unroll
    for (int j = 0; j < kAhead; ++j)
      if (i + j * kWarp < end) f(x[j], i + j * kWarp);
  }
}

struct Part {
  int64_t begin, end;

  // One of `count` parts of whole warps' widths; the last ones may be empty.
  FASTLM_DEVICE Part part(int64_t index, int64_t count) const {
    const int64_t size = ((end - begin + count - 1) / count + kWarp - 1) / kWarp * kWarp;
    const int64_t from = begin + index * size;
    return {from < end ? from : end, from + size < end ? from + size : end};
  }
};

}  // namespace device
}  // namespace fastlm
