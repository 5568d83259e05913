// Philox 4x32-10, a counter-based random number generator: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as
// easy as 1, 2, 3", SC 2011, https://doi.org/10.1145/2063384.2063405. Also compiled by CUDA.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define FASTLM_PHILOX_INLINE __host__ __device__ __forceinline__
#else
#define FASTLM_PHILOX_INLINE static inline __attribute__((always_inline))
#endif

namespace fastlm {

// Replaces the four counter words by ten rounds under the key.
FASTLM_PHILOX_INLINE void philox4x32(uint32_t counter[4], uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53} * counter[0];
    const uint64_t product1 = uint64_t{0xCD9E8D57} * counter[2];
    counter[0] = uint32_t(product1 >> 32) ^ counter[1] ^ key0;
    counter[1] = uint32_t(product1);
    counter[2] = uint32_t(product0 >> 32) ^ counter[3] ^ key1;
    counter[3] = uint32_t(product0);
    key0 += 0x9E3779B9;
    key1 += 0xBB67AE85;
  }
}

// 64 random bits that depend on these four numbers and on nothing else.
FASTLM_PHILOX_INLINE uint64_t random64(uint64_t seed, uint64_t sequence, uint32_t position, uint32_t lane) {
  uint32_t counter[4] = {position, lane, uint32_t(sequence), uint32_t(sequence >> 32)};
  philox4x32(counter, uint32_t(seed), uint32_t(seed >> 32));
  return counter[0] | uint64_t{counter[1]} << 32;
}

}  // namespace fastlm
