// Selecting the k largest of many floats without sorting them: a threshold by bisection over the bits of a float, then
// the exact k-th of the few that reach it by radix.
#pragma once

#include <cfloat>
#include <cstdint>

#include "simd.h"

namespace fastlm {
namespace FASTLM_ISA {
namespace {

// Floats as integers in the same order; the zeros are one.
FASTLM_INLINE int32_t ordered(float x) {
  const int32_t bits = int32_t(bits_of(x + 0.0f));
  return bits ^ ((bits >> 31) & INT32_MAX);
}
FASTLM_INLINE float unordered(int32_t key) { return float_of(uint32_t(key ^ ((key >> 31) & INT32_MAX))); }

int64_t count_at_least(const float* x, int64_t n, float threshold) {
  vi count{};
  for (int64_t i = 0; i < n; i += kLanes) count -= load_until(x, i, n, -__builtin_inff()) >= threshold;
  int64_t total = 0;
  for (int lane = 0; lane < kLanes; ++lane) total += count[lane];
  return total;
}

// A threshold that at least k elements of x reach, a few more at most unless equal; the lowest float if no k do.
float threshold_for(const float* x, int64_t n, float maximum, int64_t k) {
  int32_t low = ordered(-FLT_MAX), high = ordered(maximum);
  if (count_at_least(x, n, unordered(low)) < k) return unordered(low);
  while (low < high) {
    const int32_t middle = int32_t(high - (int64_t(high) - low) / 2);
    const int64_t count = count_at_least(x, n, unordered(middle));
    if (count >= k)
      low = middle;
    else
      high = middle - 1;
    if (count >= k && count <= k + k / 8) break;
  }
  return unordered(low);
}

// A key in the order "larger first, then lower id", the first being the largest.
FASTLM_INLINE uint64_t rank_key(float x, uint32_t id) {
  return uint64_t(uint32_t(ordered(x)) ^ 0x80000000u) << 32 | ~id;
}

// The k-th largest of n > k different keys, by their digits from the highest. Overwrites the keys.
uint64_t kth_largest(uint64_t* keys, int64_t n, int64_t k) {
  for (int shift = 56; n > 1; shift -= 8) {
    int64_t histogram[256] = {};
    for (int64_t i = 0; i < n; ++i) ++histogram[keys[i] >> shift & 255];
    uint64_t digit = 255;
    while (k > histogram[digit]) k -= histogram[digit--];
    int64_t left = 0;
    for (int64_t i = 0; i < n; ++i)
      if ((keys[i] >> shift & 255) == digit) keys[left++] = keys[i];
    n = left;
  }
  return keys[0];
}

}  // namespace
}  // namespace FASTLM_ISA
}  // namespace fastlm
