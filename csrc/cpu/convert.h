// Vectors of float from numbers of fewer bytes: half precision, bfloat16, int8.
//
// Written with intrinsics where the compiler would take such conversions apart element by element.
#pragma once

#include "simd.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace fastlm {
namespace FASTLM_ISA {

typedef uint16_t vhalf_lanes __attribute__((vector_size(kLanes * 2)));

template <typename V>
FASTLM_INLINE V load_as(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

// The halves in the low 16 bits of each lane, whose high bits are zero.
FASTLM_INLINE vf from_half(vi words) {
  // The bits in a float's place have an exponent too small by 112; scaling by 2^112 is exact, for denormals too.
  const vi magnitude = (words & 0x7fff) << 13;
  const vf finite = as_float(magnitude) * 0x1p112f;
  const vi sign = (words & 0x8000) << 16;
  const vi special = magnitude >= (0x7c00 << 13);
  return as_float(((special & (magnitude | 0x7f800000)) | (~special & as_int(finite))) | sign);
}

// kLanes halves, and kLanes numbers of bfloat16.
FASTLM_INLINE vf load_halves(const void* p) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps(load_as<__m256i>(p));
#elif defined(__F16C__)
  return (vf)_mm256_cvtph_ps(load_as<__m128i>(p));
#else
  return from_half(__builtin_convertvector(load_as<vhalf_lanes>(p), vi));
#endif
}

FASTLM_INLINE vf load_bfloats(const void* p) {
#if defined(__AVX512F__)
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_as<__m256i>(p)), 16);
#elif defined(__AVX2__)
  return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_as<__m128i>(p)), 16);
#else
  return as_float(__builtin_convertvector(load_as<vhalf_lanes>(p), vi) << 16);
#endif
}

// kLanes integers.
FASTLM_INLINE vf load_bytes(const void* p) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load_as<__m128i>(p)));
#elif defined(__AVX2__)
  return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(load_as<int64_t>(p))));
#elif defined(__SSE4_1__)
  return (vf)_mm_cvtepi32_ps(_mm_cvtepi8_epi32(_mm_cvtsi32_si128(load_as<int32_t>(p))));
#else
  typedef int8_t vbyte_lanes __attribute__((vector_size(kLanes)));
  return to_float(__builtin_convertvector(load_as<vbyte_lanes>(p), vi));
#endif
}

}  // namespace FASTLM_ISA
}  // namespace fastlm
