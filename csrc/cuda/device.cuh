// What all device code shares: storage types, warp and block sums, and barriers between blocks. Sources in .cuh use no
// launch syntax and declare shared memory through the macros here, so that csrc/tests/shim can run them on the CPU.
#pragma once

#include <cmath>
#include <cstdint>

#include "fastlm/storage.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define FASTLM_SHARED(type, name) __shared__ type name
#define FASTLM_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#else
#include "cuda_on_cpu.h"
#define FASTLM_SHARED(type, name)      \
  static const char name##_key = 0;    \
  type& name = *static_cast<type*>(::shim::static_shared(&name##_key, sizeof(type)))
#define FASTLM_DYNAMIC_SHARED(name) unsigned char* const name = ::shim::dynamic_shared()
#endif
#define FASTLM_DEVICE __device__ __forceinline__

namespace fastlm {
namespace device {

constexpr int kWarp = 32;
constexpr unsigned kAll = 0xFFFFFFFFu;

// Half precision in memory; arithmetic is in float.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

FASTLM_DEVICE float to_float(float x) { return x; }
FASTLM_DEVICE float to_float(BFloat16 x) { return __uint_as_float(uint32_t{x.bits} << 16); }
FASTLM_DEVICE void from_float(float x, float* out) { *out = x; }
// Rounds to nearest, ties to even; NaN stays NaN.
FASTLM_DEVICE void from_float(float x, BFloat16* out) {
  const uint32_t bits = __float_as_uint(x);
  const bool nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
  out->bits = uint16_t(nan ? 0x7FC0u : (bits + 0x7FFFu + (bits >> 16 & 1)) >> 16);
}
#if defined(__CUDACC__)
FASTLM_DEVICE float to_float(Half x) { return __half2float(__ushort_as_half(x.bits)); }
FASTLM_DEVICE void from_float(float x, Half* out) { out->bits = __half_as_ushort(__float2half_rn(x)); }
#else
// The exponent is moved by a multiplication, which also makes subnormal numbers right; it rounds as it should.
inline float to_float(Half x) {
  const float magnitude = __uint_as_float(uint32_t(x.bits & 0x7FFF) << 13) * 0x1p112f;
  const uint32_t special = (x.bits & 0x7C00) == 0x7C00 ? 0x7F800000u | uint32_t(x.bits & 0x3FF) << 13 : 0;
  return __uint_as_float((special ? special : __float_as_uint(magnitude)) | uint32_t(x.bits & 0x8000) << 16);
}
inline void from_float(float x, Half* out) {
  const uint32_t sign = __float_as_uint(x) >> 16 & 0x8000, bits = __float_as_uint(x) & 0x7FFFFFFFu;
  uint32_t half;
  if (bits > 0x7F800000u)
    half = 0x7E00;
  else if (bits >= 0x477FF000u)  // 65520 and up round to infinity
    half = 0x7C00;
  else if (bits < 0x38800000u)  // subnormal: adding 1/2 leaves units of 2^-24 in the low bits
    half = __float_as_uint(__uint_as_float(bits) + 0.5f) - 0x3F000000u;
  else
    half = (bits + 0xFFFu + (bits >> 13 & 1) - 0x38000000u) >> 13;
  out->bits = uint16_t(half | sign);
}
#endif

template <typename T>
FASTLM_DEVICE T warp_sum(T x) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) x += __shfl_xor_sync(kAll, x, lanes);
  return x;
}
template <typename T>
FASTLM_DEVICE T warp_max(T x) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
    const T other = __shfl_xor_sync(kAll, x, lanes);
    x = other > x ? other : x;
  }
  return x;
}

// A value that other blocks change by atomics.
FASTLM_DEVICE unsigned peek(unsigned* p) {
#if defined(__CUDACC__)
  return *static_cast<volatile unsigned*>(p);
#else
  return atomicAdd(p, 0u);
#endif
}

// Blocks that work together and are all resident (a cooperative launch). sync() is a barrier for all their threads, and
// what was written before it can be read after it. `word` is any value whose lower 31 bits are 0; each sync() flips the
// top bit, which is what the waiting see, so that nothing has to be put back for the next launch.
struct Group {
  unsigned* word;
  unsigned blocks;
  unsigned rank;

  FASTLM_DEVICE void sync() const {
    __syncthreads();
    if (blocks == 1) return;
    if (threadIdx.x == 0) {
      __threadfence();
      const unsigned before = atomicAdd(word, rank == 0 ? 0x80000000u - (blocks - 1) : 1u);
      while (((before ^ peek(word)) & 0x80000000u) == 0) __nanosleep(32);
      __threadfence();
    }
    __syncthreads();
  }
};

}  // namespace device
}  // namespace fastlm
