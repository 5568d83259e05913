// Vectors of float for the kernels, on the compiler's vector extensions: one source for SSE, AVX2, AVX-512 and NEON.
//
// Included only from files compiled once per instruction-set level. Everything here is in that level's namespace and
// force-inlined: a function left out of line under one name for all levels could be merged by the linker into the
// copy that the processor cannot run. For the same reason such files use no out-of-line template of the standard
// library (std::vector, std::sort, ...): scratch memory comes from the caller.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__SSE__)
#include <immintrin.h>
#endif

#define FASTLM_INLINE static inline __attribute__((always_inline))
#define FASTLM_MEMBER inline __attribute__((always_inline))

namespace fastlm {
namespace FASTLM_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float vf __attribute__((vector_size(kLanes * 4)));
typedef int32_t vi __attribute__((vector_size(kLanes * 4)));
typedef uint32_t vu __attribute__((vector_size(kLanes * 4)));  // sums that may wrap

FASTLM_INLINE vf load(const float* p) {
  vf v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
FASTLM_INLINE void store(float* p, vf v) { std::memcpy(p, &v, sizeof(v)); }
FASTLM_INLINE vf broadcast(float x) { return x - vf{}; }
FASTLM_INLINE vf as_float(vi v) { return (vf)v; }
FASTLM_INLINE vi as_int(vf v) { return (vi)v; }
// Where the mask is all ones, a; where it is zero, b.
FASTLM_INLINE vf select(vi mask, vf a, vf b) { return as_float((mask & as_int(a)) | (~mask & as_int(b))); }
FASTLM_INLINE vf min(vf a, vf b) { return select(a < b, a, b); }
FASTLM_INLINE vf max(vf a, vf b) { return select(a > b, a, b); }
FASTLM_INLINE vi to_int(vf v) { return __builtin_convertvector(v, vi); }    // truncates
FASTLM_INLINE vf to_float(vi v) { return __builtin_convertvector(v, vf); }

FASTLM_INLINE float reduce_add(vf v) {
  float lanes[kLanes];
  std::memcpy(lanes, &v, sizeof(v));
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}
FASTLM_INLINE float reduce_max(vf v) {
  float lanes[kLanes];
  std::memcpy(lanes, &v, sizeof(v));
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] = lanes[i] > lanes[i + width] ? lanes[i] : lanes[i + width];
  return lanes[0];
}

FASTLM_INLINE uint32_t reduce_add(vu v) {
  uint32_t sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += v[i];
  return sum;
}
// A bit for each lane of a mask.
FASTLM_INLINE uint32_t lanes_of(vi mask) {
#if defined(__AVX512DQ__)
  return _mm512_movepi32_mask((__m512i)mask);
#elif defined(__AVX2__)
  return uint32_t(_mm256_movemask_ps((__m256)mask));
#elif defined(__SSE__)
  return uint32_t(_mm_movemask_ps((__m128)mask));
#else
  uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= uint32_t(mask[i] & 1) << i;
  return bits;
#endif
}
// Whether any lane of a mask is set.
FASTLM_INLINE bool any(vi mask) { return lanes_of(mask) != 0; }

FASTLM_INLINE uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}
FASTLM_INLINE float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

// The first `n` (0 <= n < kLanes) elements; the rest are `fill`. Reads nothing beyond p[n - 1].
FASTLM_INLINE vf load_partial(const float* p, int n, float fill = 0.0f) {
  float lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = i < n ? p[i] : fill;
  return load(lanes);
}
// The vector at p[i], of which the elements from p[n] on are `fill`.
FASTLM_INLINE vf load_until(const float* p, int64_t i, int64_t n, float fill) {
  return i + kLanes <= n ? load(p + i) : load_partial(p + i, static_cast<int>(n - i), fill);
}
FASTLM_INLINE void store_partial(float* p, vf v, int n) {
  float lanes[kLanes];
  store(lanes, v);
  for (int i = 0; i < n; ++i) p[i] = lanes[i];
}

}  // namespace FASTLM_ISA
}  // namespace fastlm
