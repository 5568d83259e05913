// The weight formats of GGUF in vector registers: conversion to float, and integer dot products of interleaved rows.
#pragma once

#include <type_traits>

#include "convert.h"
#include "fastlm/linear.h"

namespace fastlm {
namespace FASTLM_ISA {

constexpr int kVectors = kBlock / kLanes;  // float vectors in a block

typedef int8_t vbyte __attribute__((vector_size(kLanes * 4)));
typedef int16_t vshort __attribute__((vector_size(kLanes * 4)));
typedef int8_t vbyte16 __attribute__((vector_size(16)));


// --- Half precision ---------------------------------------------------------------------------------------------

// The half at p in every lane.
FASTLM_INLINE vf broadcast_half(const uint8_t* p) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps(_mm256_set1_epi16(load_as<int16_t>(p)));
#elif defined(__F16C__)
  return (vf)_mm256_cvtph_ps(_mm_set1_epi16(load_as<int16_t>(p)));
#else
  return from_half(vi{} + load_as<uint16_t>(p));
#endif
}

// --- To float ---------------------------------------------------------------------------------------------------

// 16 signed bytes as floats. By intrinsics where there are any: GCC 12 takes the generic conversion apart into scalars.
FASTLM_INLINE void bytes_to_float(vbyte16 b, vf (&out)[kVectors], int first) {
#if defined(__AVX512F__)
  out[first] = to_float((vi)_mm512_cvtepi8_epi32((__m128i)b));
#elif defined(__AVX2__)
  out[first] = to_float((vi)_mm256_cvtepi8_epi32((__m128i)b));
  out[first + 1] = to_float((vi)_mm256_cvtepi8_epi32(_mm_unpackhi_epi64((__m128i)b, (__m128i)b)));
#else
  typedef int8_t four __attribute__((vector_size(4)));
  for (int i = 0; i < 4; ++i)
    out[first + i] =
        to_float(__builtin_convertvector(load_as<four>(reinterpret_cast<const char*>(&b) + 4 * i), vi));
#endif
}

// A vector of weights of a kind of floats.
template <WeightKind kind>
FASTLM_INLINE vf load_floats(const uint8_t* p) {
  if constexpr (kind == WeightKind::kF32) return load_as<vf>(p);
  return kind == WeightKind::kF16 ? load_halves(p) : load_bfloats(p);
}

// 32 weights, exactly as fastlm.reference.quantized.dequantize has them.
template <WeightKind kind>
FASTLM_INLINE void decode(const uint8_t* block, vf (&w)[kVectors]) {
  if constexpr (!is_quantized(kind)) {
    for (int i = 0; i < kVectors; ++i) w[i] = load_floats<kind>(block + weight_bytes(kind, i * kLanes));
  } else if constexpr (kind == WeightKind::kQ8_0) {
    const vf scale = broadcast_half(block);
    bytes_to_float(load_as<vbyte16>(block + 2), w, 0);
    bytes_to_float(load_as<vbyte16>(block + 18), w, kVectors / 2);
    for (int i = 0; i < kVectors; ++i) w[i] *= scale;
  } else {
    const vbyte16 packed = load_as<vbyte16>(block + (kind == WeightKind::kQ4_1 ? 4 : 2));
    const vf scale = broadcast_half(block);
    const vbyte16 offset = vbyte16{} + static_cast<int8_t>(kind == WeightKind::kQ4_0 ? 8 : 0);
    bytes_to_float((packed & 15) - offset, w, 0);
    bytes_to_float(((packed >> 4) & 15) - offset, w, kVectors / 2);
    if constexpr (kind == WeightKind::kQ4_1) {
      const vf minimum = broadcast_half(block + 2);
      for (int i = 0; i < kVectors; ++i) w[i] = w[i] * scale + minimum;
    } else {
      for (int i = 0; i < kVectors; ++i) w[i] *= scale;
    }
  }
}

// --- Integer dot products ---------------------------------------------------------------------------------------

// In an interleaved weight (linear.h) lane i of a byte vector has 4 codes of row i. They are unsigned but for those of
// Q8_0, which become so where vpdpbusd, which takes one side unsigned, is used. What that adds to them:
#if defined(__AVX512VNNI__)
constexpr int kAddedToBytes = 128;
#else
constexpr int kAddedToBytes = 0;
#endif
constexpr int added_to_codes(WeightKind kind) {
  return kind == WeightKind::kQ8_0 ? kAddedToBytes : kind == WeightKind::kQ4_0 ? 8 : 0;
}

// 4 codes of an input, for every lane.
FASTLM_INLINE vbyte broadcast_codes(const int8_t* p) { return (vbyte)(vi{} + load_as<int32_t>(p)); }

#if defined(__AVX2__) && !defined(__AVX512VNNI__)
FASTLM_INLINE vshort multiply_pairs(vbyte unsigned_side, vbyte signed_side) {
  return (vshort)_mm256_maddubs_epi16((__m256i)unsigned_side, (__m256i)signed_side);
}
FASTLM_INLINE vi add_pairs(vshort x) { return (vi)_mm256_madd_epi16((__m256i)x, _mm256_set1_epi16(1)); }
FASTLM_INLINE vbyte magnitudes(vbyte x) { return (vbyte)_mm256_abs_epi8((__m256i)x); }
FASTLM_INLINE vbyte with_sign_of(vbyte x, vbyte signs) { return (vbyte)_mm256_sign_epi8((__m256i)x, (__m256i)signs); }
#elif defined(__SSSE3__) && !defined(__AVX512VNNI__)
FASTLM_INLINE vshort multiply_pairs(vbyte unsigned_side, vbyte signed_side) {
  return (vshort)_mm_maddubs_epi16((__m128i)unsigned_side, (__m128i)signed_side);
}
FASTLM_INLINE vi add_pairs(vshort x) { return (vi)_mm_madd_epi16((__m128i)x, _mm_set1_epi16(1)); }
FASTLM_INLINE vbyte magnitudes(vbyte x) { return (vbyte)_mm_abs_epi8((__m128i)x); }
FASTLM_INLINE vbyte with_sign_of(vbyte x, vbyte signs) { return (vbyte)_mm_sign_epi8((__m128i)x, (__m128i)signs); }
#endif

// The sum, in each lane, of products of up to 32 codes of a weight with inputs of magnitude <= 127. Exact.
template <WeightKind kind>
struct LaneSum {
#if defined(__AVX512VNNI__)
  vi sum{};
  FASTLM_MEMBER void add(vbyte weights, vbyte inputs) {
    sum = (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)weights, (__m512i)inputs);
  }
  FASTLM_MEMBER vi total() const { return sum; }
#elif defined(__SSSE3__)
  // Pairs of products are added in 16 bits. 4-bit codes: at most 2 * 15 * 127 a pair, and a lane's 8 of them fit. For
  // Q8_0, |q| * (x with the sign of q) is within 2 * 128 * 127 < 2^15, and only one fits.
  static constexpr bool kShort = kind != WeightKind::kQ8_0;
  typename std::conditional<kShort, vshort, vi>::type sum{};
  FASTLM_MEMBER void add(vbyte weights, vbyte inputs) {
    if constexpr (kShort)
      sum += multiply_pairs(weights, inputs);
    else
      sum += add_pairs(multiply_pairs(magnitudes(weights), with_sign_of(inputs, weights)));
  }
  FASTLM_MEMBER vi total() const {
    if constexpr (kShort)
      return add_pairs(sum);
    else
      return sum;
  }
#elif defined(__aarch64__)
  vi sum{};
  FASTLM_MEMBER void add(vbyte weights, vbyte inputs) {
    const int8x16_t w = (int8x16_t)weights, x = (int8x16_t)inputs;
    const int16x8_t low = vmull_s8(vget_low_s8(w), vget_low_s8(x)), high = vmull_high_s8(w, x);
    sum += (vi)vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high));
  }
  FASTLM_MEMBER vi total() const { return sum; }
#else
  vi sum{};
  FASTLM_MEMBER void add(vbyte weights, vbyte inputs) {
    for (int lane = 0; lane < kLanes; ++lane)
      for (int i = 4 * lane; i < 4 * lane + 4; ++i) sum[lane] += weights[i] * inputs[i];
  }
  FASTLM_MEMBER vi total() const { return sum; }
#endif
};

}  // namespace FASTLM_ISA
}  // namespace fastlm
