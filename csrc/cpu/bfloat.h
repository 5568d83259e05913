// Vectors of float read from and written to floats or bfloat16 in memory.
#pragma once

#include "convert.h"

namespace fastlm {
namespace FASTLM_ISA {

// Rounded to nearest, ties to even; NaN stays NaN.
FASTLM_INLINE vhalf_lanes to_bfloats(vf x) {
  const vu bits = (vu)x;
  const vi nan = x != x;  // rounding could make it an infinity
  const vu rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  const vu quiet = (bits >> 16) | 0x40;
  return __builtin_convertvector(((vu)nan & quiet) | (~(vu)nan & rounded), vhalf_lanes);
}

// What a kernel's pointer may point to: `At<false>` floats, `At<true>` bfloat16. `i` and `n` count elements.
template <bool Bfloats>
struct At;

template <>
struct At<false> {
  // The vector at element i of [0, n), beyond which are zeros.
  static FASTLM_MEMBER vf load(const void* p, int64_t i, int64_t n) {
    return load_until(static_cast<const float*>(p), i, n, 0.0f);
  }
  // Writes nothing beyond element n - 1.
  static FASTLM_MEMBER void store(void* p, int64_t i, int64_t n, vf x) {
    float* to = static_cast<float*>(p) + i;
    if (i + kLanes <= n)
      FASTLM_ISA::store(to, x);
    else
      store_partial(to, x, static_cast<int>(n - i));
  }
};

template <>
struct At<true> {
  static FASTLM_MEMBER vf load(const void* p, int64_t i, int64_t n) {
    const uint16_t* from = static_cast<const uint16_t*>(p) + i;
    if (i + kLanes <= n) return load_bfloats(from);
    uint16_t lanes[kLanes] = {};
    for (int64_t k = 0; k < n - i; ++k) lanes[k] = from[k];
    return load_bfloats(lanes);
  }
  static FASTLM_MEMBER void store(void* p, int64_t i, int64_t n, vf x) {
    uint16_t* to = static_cast<uint16_t*>(p) + i;
    const vhalf_lanes rounded = to_bfloats(x);
    if (i + kLanes <= n) {
      std::memcpy(to, &rounded, sizeof(rounded));
      return;
    }
    for (int64_t k = 0; k < n - i; ++k) to[k] = rounded[k];
  }
};

}  // namespace FASTLM_ISA
}  // namespace fastlm
