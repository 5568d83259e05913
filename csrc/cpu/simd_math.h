// exp, tanh and sigmoid on vectors, to a few units in the last place over the whole range of float.
//
// NaN stays NaN, infinities give the limits, results below the smallest normal number are rounded to denormals.
// test_math.cpp holds them to their bounds at every exponent.
#pragma once

#include "simd.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fastlm {
namespace FASTLM_ISA {

// x = n ln 2 + r with |r| <= ln 2 / 2: gives e^r - 1 and n. Adding 1.5 * 2^23 rounds to an integer and leaves that
// integer in the low bits, which needs no conversion instruction. ln 2 is split so that n * high is exact.
struct ExpParts {
  vf expm1_r;
  vi n;
};
FASTLM_INLINE ExpParts exp_parts(vf x) {
  const vf magic = broadcast(12582912.0f);
  const vf shifted = x * 1.44269504088896341f + magic;
  const vf n = shifted - magic;
  const vf r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  vf p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return {p * (r * r) + r, as_int(shifted) - as_int(magic)};
}

// 2^n for -126 <= n <= 127.
FASTLM_INLINE vf exp2_int(vi n) { return as_float((n + 127) << 23); }

// e^x for -104 <= x <= 89. In two factors, since 2^n leaves the range of normal numbers at both ends.
FASTLM_INLINE vf exp_bounded(vf x) {
  const ExpParts e = exp_parts(x);
  const vi half = e.n >> 1;
  return (e.expm1_r + 1.0f) * exp2_int(half) * exp2_int(e.n - half);
}

// The order of min's and max's operands lets NaN through, here and below.
FASTLM_INLINE vf exp(vf x) { return exp_bounded(min(broadcast(89.0f), max(broadcast(-104.0f), x))); }

// Correctly rounded.
FASTLM_INLINE vf sqrt(vf x) {
#if defined(__AVX512F__)
  return (vf)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
  return (vf)_mm256_sqrt_ps((__m256)x);
#else
  for (int i = 0; i < kLanes; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}

FASTLM_INLINE vf abs(vf x) { return as_float(as_int(x) & 0x7fffffff); }

// tanh |x| = -t / (2 + t) with t = e^(-2|x|) - 1, which stays accurate for small x, where 1 - 2 / (e^2x + 1) does not.
FASTLM_INLINE vf tanh(vf x) {
  const vf magnitude = min(broadcast(10.0f), abs(x));
  const ExpParts e = exp_parts(magnitude * -2.0f);
  const vf scale = exp2_int(e.n);
  const vf t = e.expm1_r * scale + (scale - 1.0f);
  const vf y = t / (t + 2.0f);
  return as_float((as_int(y) & 0x7fffffff) | (as_int(x) & (int32_t)0x80000000));
}

// e^-|x| never overflows, and for x < 0 the quotient keeps its relative accuracy down to the denormals.
FASTLM_INLINE vf sigmoid(vf x) {
  const vf e = exp_bounded(max(broadcast(-104.0f), as_float(as_int(x) | (int32_t)0x80000000)));
  return select(x < 0.0f, e, broadcast(1.0f)) / (e + 1.0f);
}

}  // namespace FASTLM_ISA
}  // namespace fastlm
