// The weights that sample.cpp draws by: exactly, as fastlm/reference/sample.py defines them, and nearly, in half the
// time, with a bound on how far off the sums are.
//
// Included by sample.cpp alone, which is compiled without fusing what is written as two operations.
#pragma once

#include <cstring>

#include "simd.h"

namespace fastlm {
namespace FASTLM_ISA {
namespace {

constexpr int kGroupVectors = 32;
constexpr int64_t kGroup = kGroupVectors * kLanes;  // elements
constexpr float kInfinity = __builtin_inff();

FASTLM_INLINE int64_t groups_of(int64_t n) { return (n + kGroup - 1) / kGroup; }
FASTLM_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Group g of the row, kGroup elements: the last one is copied to `padded`, with -inf for what is not there.
FASTLM_INLINE const float* group_of(const float* x, int64_t n, int64_t g, float* padded) {
  const int64_t begin = g * kGroup;
  if (begin + kGroup <= n) return x + begin;
  for (int64_t i = 0; i < kGroup; ++i) padded[i] = begin + i < n ? x[begin + i] : -kInfinity;
  return padded;
}

// Adding 1.5 * 2^23 rounds a float to an integer, half to even, and leaves it in the low bits.
constexpr float kRound = 0x1.8p23f;

// 2^y for -40 <= y <= 0. The exponent is added as an integer.
FASTLM_INLINE vf exp2(vf y) {
  const vf rounded = y + kRound;
  const vf f = y - (rounded - kRound);
  vf p = f * 0x1.5bba14p-10f + 0x1.3cea88p-7f;
  p = p * f + 0x1.c6b752p-5f;
  p = p * f + 0x1.ebf9bcp-3f;
  p = p * f + 0x1.62e42ap-1f;
  p = p * f + 1.0f;
  return (vf)((vu)p + ((vu)rounded << 23));
}

// The sum of weights, e * 2^38 rounded half to even. Adding 16 leaves e in units of 2^-19 in the low bits; adding
// 1.5 * 2^-15 to what that rounded off leaves the rest in units of 2^-38. The constants' own bits are taken off at the
// end; up to 2^12 additions cannot overflow.
struct WeightSum {
  vu high{}, low{};
  uint32_t additions = 0;

  __attribute__((always_inline)) void add(vf e) {
    const vf coarse = e + 16.0f;
    const vf fine = (e - (coarse - 16.0f)) + 0x1.8p-15f;
    high += (vu)coarse;
    low += (vu)fine;
    ++additions;
  }
  __attribute__((always_inline)) int64_t total() const {
    const uint32_t count = additions * kLanes;
    const uint32_t coarse = reduce_add(high) - count * bits_of(16.0f);
    const int32_t fine = int32_t(reduce_add(low) - count * bits_of(0x1.8p-15f));
    return (int64_t(coarse) << 19) + fine;
  }
};

int64_t weight_of(float e) {
  const double rounded = double(e) * 0x1p38 + 0x1.8p52;
  int64_t bits;
  std::memcpy(&bits, &rounded, 8);
  return bits - 0x4338000000000000;
}

// Nearly the sums of weights. The logarithm y is the reference's to the bit; 2^y has its polynomial with one rounding
// a step in place of two and is summed in float. With u = 2^-24: e is within 3 u of the reference's (2^y lies in
// [0.7, 1.42] before its exponent is added: half a unit in the last place there for each of both, and a third of that
// for the step before), and a sum within a group within 9 u of its own terms': 7 additions to each of 4 sums, 2 to
// join them; across the lanes it is of doubles. Together less than this share of a group's weight:
constexpr double kNearError = 14 * 0x1p-24;
// besides, what an integer rounds off and what the reference has no weight for: less than 2 for each element.

#if defined(__AVX512DQ__)
FASTLM_INLINE vf multiply_add(vf a, vf b, vf c) { return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
FASTLM_INLINE double sum_of(vf v) {
  const __m256 low = _mm512_castps512_ps256((__m512)v), high = _mm512_extractf32x8_ps((__m512)v, 1);
  return _mm512_reduce_add_pd(_mm512_add_pd(_mm512_cvtps_pd(low), _mm512_cvtps_pd(high)));
}
#elif defined(__FMA__)
FASTLM_INLINE vf multiply_add(vf a, vf b, vf c) { return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
#else
FASTLM_INLINE vf multiply_add(vf a, vf b, vf c) { return a * b + c; }
#endif
#if !defined(__AVX512DQ__)
FASTLM_INLINE double sum_of(vf v) {
  double sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += double(v[i]);
  return sum;
}
#endif

// 2^y for y <= 0, -inf too; less than 2^-39 is 2^-40 or less.
FASTLM_INLINE vf near_exp2(vf y) {
#if defined(__AVX512DQ__)
  const vf f = (vf)_mm512_reduce_ps((__m512)y, 0);  // y less the nearest integer; 0 of -inf
  const vf n = y - f;
#else
  y = y > -40.0f ? y : broadcast(-40.0f);
  const vf rounded = y + kRound;
  const vf f = y - (rounded - kRound);
#endif
  vf p = multiply_add(f, broadcast(0x1.5bba14p-10f), broadcast(0x1.3cea88p-7f));
  p = multiply_add(p, f, broadcast(0x1.c6b752p-5f));
  p = multiply_add(p, f, broadcast(0x1.ebf9bcp-3f));
  p = multiply_add(p, f, broadcast(0x1.62e42ap-1f));
  p = multiply_add(p, f, broadcast(1.0f));
#if defined(__AVX512DQ__)
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  return (vf)((vu)p + ((vu)rounded << 23));
#endif
}

// The sum of term(i) for each vector of a group, i its first element.
template <typename Term>
FASTLM_INLINE int64_t near_sum(const Term& term) {
  vf sums[4] = {};
  for (int64_t i = 0; i < kGroup; i += 4 * kLanes) {
    sums[0] += term(i);
    sums[1] += term(i + kLanes);
    sums[2] += term(i + 2 * kLanes);
    sums[3] += term(i + 3 * kLanes);
  }
  return int64_t(sum_of((sums[0] + sums[1]) + (sums[2] + sums[3])) * 0x1p38);
}

}  // namespace
}  // namespace FASTLM_ISA
}  // namespace fastlm
