// What the forward and the backward of the variants share: sums over rows that several threads compute.
#pragma once

#include <cmath>
#include <cstring>

#include "fastlm/recurrent_variants.h"
#include "recurrence.h"
#include "simd_math.h"

namespace fastlm {
namespace FASTLM_ISA {

constexpr float kEps = 1e-5f;  // NORM_EPS of the reference

struct Moments {
  float mean, scale;  // scale: 1 / standard deviation
};

// The variance of a long row comes from the sums of its panels, each around the panel's own mean: no thread needs the
// values of another, no large mean spoils a small variance, and the order of summation is the same for any team.
class PanelSums {
 public:
  PanelSums(float* memory, int64_t panels, int64_t per_panel, int64_t columns)
      : memory_(memory), panels_(panels), per_panel_(per_panel), columns_(columns) {}
  static int64_t size(int64_t rows, int64_t panels) { return rows * 2 * panels; }

  // Of V vectors, the first `n` lanes of each.
  template <int V>
  FASTLM_MEMBER void set(int64_t row, int64_t panel, const float* values, int n) const {
    vf total = load(values);
    for (int v = 1; v < V; ++v) total += load(values + v * kLanes);
    const float sum = reduce_add(total);  // lanes from n on hold zeros
    const vf mean = broadcast(sum / static_cast<float>(V * n));
    vf squares = {};
    for (int v = 0; v < V; ++v) {
      const vf d = load(values + v * kLanes) - mean;
      squares += d * d;
    }
    if (n < kLanes) {
      float lanes[kLanes];
      store(lanes, squares);
      squares = load_partial(lanes, n);
    }
    set(row, panel, {sum, reduce_add(squares)});
  }
  void set(int64_t row, int64_t panel, Moments sums) const {
    memory_[row * 2 * panels_ + panel] = sums.mean;
    memory_[(row * 2 + 1) * panels_ + panel] = sums.scale;
  }

  Moments moments(int64_t row) const {
    const float *sums = memory_ + row * 2 * panels_, *squares = sums + panels_;
    const float mean = sum(sums) / static_cast<float>(columns_);
    float variance = sum(squares);
    for (int64_t p = 0; p < panels_; ++p) {
      const int64_t left = columns_ - p * per_panel_;
      const float n = static_cast<float>(left < per_panel_ ? left : per_panel_), off = sums[p] / n - mean;
      variance += n * off * off;
    }
    return {mean, 1.0f / std::sqrt(variance / static_cast<float>(columns_) + kEps)};
  }
  // The means over the row of the two things that were set.
  Moments means(int64_t row) const {
    const float* sums = memory_ + row * 2 * panels_;
    return {sum(sums) / static_cast<float>(columns_), sum(sums + panels_) / static_cast<float>(columns_)};
  }

 private:
  float sum(const float* values) const {
    float total = 0;
    for (int64_t p = 0; p < panels_; ++p) total += values[p];
    return total;
  }
  float* memory_;
  int64_t panels_, per_panel_, columns_;
};

FASTLM_INLINE vf load_or_zero(const float* p, int64_t at, int n) { return p == nullptr ? vf{} : load_lanes(p + at, n); }

// The shares of the old state that row `row` keeps, or null.
FASTLM_INLINE const float* shares_of(const float* shares, const RecurrentVariant& v, int64_t row) {
  return shares == nullptr ? nullptr : shares + row * v.zoneout_stride;
}

}  // namespace FASTLM_ISA
}  // namespace fastlm
