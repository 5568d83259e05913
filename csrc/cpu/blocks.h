// The weight formats of GGUF in vector registers: conversion to float, and integer dot products of a block.
//
// The integer part works on "quarters". A byte vector of kLanes * 4 bytes is kLanes / 4 quarters of 16 bytes, and each
// quarter belongs to another row of the weight; a dot product adds groups of 4 bytes, so that quarter g of the sums is
// 4 partial sums of row g. Four such vectors cover a group of kLanes rows: quarter g of vector v is row 4 g + v.
#pragma once

#include "fastlm/linear.h"
#include "simd.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fastlm {
namespace FASTLM_ISA {

constexpr int kQuarters = kLanes / 4;
constexpr int kVectors = kBlock / kLanes;  // float vectors in a block

typedef int8_t vbyte __attribute__((vector_size(kLanes * 4)));
typedef int8_t vbyte16 __attribute__((vector_size(16)));
typedef uint16_t vhalf_lanes __attribute__((vector_size(kLanes * 2)));

template <typename V>
FASTLM_INLINE V load_as(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

// --- Half precision ---------------------------------------------------------------------------------------------

// The halves in the low 16 bits of each lane; the high bits are ignored.
FASTLM_INLINE vf from_half(vi words) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps(_mm512_cvtepi32_epi16((__m512i)words));
#elif defined(__F16C__)
  const __m256i low = _mm256_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, -1, -1, -1, -1, -1, -1, -1, -1,  //
                                       0, 1, 4, 5, 8, 9, 12, 13, -1, -1, -1, -1, -1, -1, -1, -1);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_shuffle_epi8((__m256i)words, low), 0x08);
  return (vf)_mm256_cvtph_ps(_mm256_castsi256_si128(packed));
#else
  // The bits in a float's place have an exponent too small by 112; scaling by 2^112 is exact, for denormals too.
  const vi magnitude = (words & 0x7fff) << 13;
  const vf finite = as_float(magnitude) * 0x1p112f;
  const vi sign = (words & 0x8000) << 16;
  const vi special = magnitude >= (0x7c00 << 13);
  return as_float(((special & (magnitude | 0x7f800000)) | (~special & as_int(finite))) | sign);
#endif
}

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

// 32 weights, exactly as fastlm.reference.quantized.dequantize has them.
template <WeightKind kind>
FASTLM_INLINE void decode(const uint8_t* block, vf (&w)[kVectors]) {
  if constexpr (kind == WeightKind::kF32) {
    for (int i = 0; i < kVectors; ++i) w[i] = load_as<vf>(block + i * sizeof(vf));
  } else if constexpr (kind == WeightKind::kF16 || kind == WeightKind::kBF16) {
    for (int i = 0; i < kVectors; ++i) {
      const vi words = __builtin_convertvector(load_as<vhalf_lanes>(block + i * sizeof(vhalf_lanes)), vi);
      w[i] = kind == WeightKind::kF16 ? from_half(words) : as_float(words << 16);
    }
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

// --- Quarters ---------------------------------------------------------------------------------------------------

// 16 bytes at `offset` from each of the rows v, 4 + v, 8 + v, ...
FASTLM_INLINE vbyte load_quarters(const uint8_t* const* rows, int v, int64_t offset) {
#if defined(__AVX512F__)
  __m512i q = _mm512_castsi128_si512(load_as<__m128i>(rows[v] + offset));
  q = _mm512_inserti32x4(q, load_as<__m128i>(rows[4 + v] + offset), 1);
  q = _mm512_inserti32x4(q, load_as<__m128i>(rows[8 + v] + offset), 2);
  return (vbyte)_mm512_inserti32x4(q, load_as<__m128i>(rows[12 + v] + offset), 3);
#elif defined(__AVX2__)
  const __m256i q = _mm256_castsi128_si256(load_as<__m128i>(rows[v] + offset));
  return (vbyte)_mm256_inserti128_si256(q, load_as<__m128i>(rows[4 + v] + offset), 1);
#else
  return load_as<vbyte>(rows[v] + offset);
#endif
}

// The same 16 bytes in each quarter.
FASTLM_INLINE vbyte broadcast_quarter(const int8_t* p) {
#if defined(__AVX512F__)
  return (vbyte)_mm512_broadcast_i32x4(load_as<__m128i>(p));
#elif defined(__AVX2__)
  return (vbyte)_mm256_broadcastsi128_si256(load_as<__m128i>(p));
#else
  return load_as<vbyte>(p);
#endif
}

// From a value for each row of the group: that of row 4 g + v in all of quarter g.
template <int v>
FASTLM_INLINE vf spread(vf rows) {
#if defined(__AVX512F__)
  return (vf)_mm512_permute_ps((__m512)rows, v * 0x55);
#elif defined(__AVX2__)
  return (vf)_mm256_permute_ps((__m256)rows, v * 0x55);
#else
  return broadcast(rows[v]);
#endif
}

// From the partial sums of all four vectors: a sum for each row of the group.
FASTLM_INLINE vf add_quarters(const vf (&a)[4]) {
#if defined(__AVX512F__)
  const __m512 ab = _mm512_unpacklo_ps((__m512)a[0], (__m512)a[1]) + _mm512_unpackhi_ps((__m512)a[0], (__m512)a[1]);
  const __m512 cd = _mm512_unpacklo_ps((__m512)a[2], (__m512)a[3]) + _mm512_unpackhi_ps((__m512)a[2], (__m512)a[3]);
  return (vf)_mm512_shuffle_ps(ab, cd, 0x44) + (vf)_mm512_shuffle_ps(ab, cd, 0xee);
#elif defined(__AVX2__)
  return (vf)_mm256_hadd_ps(_mm256_hadd_ps((__m256)a[0], (__m256)a[1]), _mm256_hadd_ps((__m256)a[2], (__m256)a[3]));
#else
  vf sums;
  for (int v = 0; v < 4; ++v) sums[v] = (a[v][0] + a[v][1]) + (a[v][2] + a[v][3]);
  return sums;
#endif
}

// The integers of a block's quarters: q for Q8_0 and, unsigned, for Q4_1; q + 8 for Q4_0.
template <WeightKind kind>
FASTLM_INLINE void load_codes(const uint8_t* const* rows, int v, int64_t offset, vbyte& low, vbyte& high) {
  if constexpr (kind == WeightKind::kQ8_0) {
    low = load_quarters(rows, v, offset + 2);
    high = load_quarters(rows, v, offset + 18);
  } else {
    const vbyte packed = load_quarters(rows, v, offset + (kind == WeightKind::kQ4_1 ? 4 : 2));
    low = packed & 15;
    high = (vbyte)((vi)packed >> 4) & 15;
  }
}

// sum of code * input over the block: 4 partial sums in each quarter. No step can saturate or overflow.
template <WeightKind kind>
FASTLM_INLINE vi dot(vbyte low, vbyte high, const InputBlock& x) {
  const vbyte x_low = broadcast_quarter(x.codes), x_high = broadcast_quarter(x.codes + 16);
#if defined(__AVX512F__)
  // vpdpbusd takes one side unsigned and adds in 32 bits. For Q8_0 that side is q + 128, and 128 times the inputs is
  // taken off again, lane by lane: taken off a whole quarter at once, it would cancel only after rounding to float.
  __m512i sum = _mm512_setzero_si512();
  if constexpr (kind == WeightKind::kQ8_0) {
    sum = _mm512_broadcast_i32x4(load_as<__m128i>(x.offsets));
    low = (vbyte)((vi)low ^ static_cast<int>(0x80808080u));
    high = (vbyte)((vi)high ^ static_cast<int>(0x80808080u));
  }
  sum = _mm512_dpbusd_epi32(sum, (__m512i)low, (__m512i)x_low);
  return (vi)_mm512_dpbusd_epi32(sum, (__m512i)high, (__m512i)x_high);
#elif defined(__AVX2__)
  // vpmaddubsw adds pairs of unsigned * signed in 16 bits. Q4: pairs are within 2 * 15 * 127, two of them fit. Q8_0:
  // |q| * (x with the sign of q) is within 2 * 128 * 127 < 2^15, and only one fits.
  const __m256i ones = _mm256_set1_epi16(1);
  if constexpr (kind == WeightKind::kQ8_0) {
    const __m256i a = _mm256_maddubs_epi16(_mm256_abs_epi8((__m256i)low),
                                           _mm256_sign_epi8((__m256i)x_low, (__m256i)low));
    const __m256i b = _mm256_maddubs_epi16(_mm256_abs_epi8((__m256i)high),
                                           _mm256_sign_epi8((__m256i)x_high, (__m256i)high));
    return (vi)_mm256_madd_epi16(a, ones) + (vi)_mm256_madd_epi16(b, ones);
  } else {
    const __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16((__m256i)low, (__m256i)x_low),
                                           _mm256_maddubs_epi16((__m256i)high, (__m256i)x_high));
    return (vi)_mm256_madd_epi16(pairs, ones);
  }
#else
  // |q x| <= 128 * 127, and two of them fit 16 bits.
  typedef int16_t words __attribute__((vector_size(32)));
  const words sums = __builtin_convertvector(low, words) * __builtin_convertvector(x_low, words) +
                     __builtin_convertvector(high, words) * __builtin_convertvector(x_high, words);
  vi total{};
  for (int i = 0; i < 4; ++i) {
    typedef int16_t part __attribute__((vector_size(8)));
    total += __builtin_convertvector(load_as<part>(reinterpret_cast<const char*>(&sums) + 8 * i), vi);
  }
  return total;
#endif
}

}  // namespace FASTLM_ISA
}  // namespace fastlm
