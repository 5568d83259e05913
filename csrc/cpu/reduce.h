// Sums over the lanes of many vectors at once.
#pragma once

#include <utility>

#include "simd.h"

namespace fastlm {
namespace FASTLM_ISA {

// Lanes whose number has the bit W take y's sum with the lane W before, the others x's with the lane W behind. One
// shuffle and one blend: shuffles have one port.
template <int W, int... I>
FASTLM_INLINE vf fold(vf x, vf y, std::integer_sequence<int, I...>) {
  const vi mine = {(I & W ? -1 : 0)...};
  return (mine != 0 ? y : x) + __builtin_shufflevector(x, y, (I & W ? I - W + kLanes : I + W)...);
}
// Lane i of the result is the sum of x[i]'s lanes, for kLanes vectors: to the bit that of reduce_add.
template <int W = kLanes / 2>
FASTLM_INLINE vf reduce_each(const vf* x) {
  if constexpr (W == 0) {
    return x[0];
  } else {
    vf half[W];
    for (int i = 0; i < W; ++i) half[i] = fold<W>(x[i], x[i + W], std::make_integer_sequence<int, kLanes>());
    return reduce_each<W / 2>(half);
  }
}

}  // namespace FASTLM_ISA
}  // namespace fastlm
