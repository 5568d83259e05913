// What the forward and the backward of the variants share: sums over rows that several threads compute.
#pragma once

#include "fastlm/recurrent_variants.h"
#include "recurrence_digits.h"
#include "reduce.h"
#include "simd_math.h"

namespace fastlm {
namespace FASTLM_ISA {

constexpr float kEps = 1e-5f;  // NORM_EPS of the reference

struct Moments {
  float mean, scale;  // scale: 1 / standard deviation
};
// Of kLanes rows.
struct RowMoments {
  float mean[kLanes], scale[kLanes];
  RowMoments(vf means, vf scales) { store(mean, means), store(scale, scales); }
  Moments operator[](int64_t i) const { return {mean[i], scale[i]}; }
};

// The variance of a long row comes from the sums of its panels, each around the panel's own mean: no thread needs the
// values of another, no large mean spoils a small variance, and the order of summation is the same for any team.
// A panel's sums of all rows lie side by side, so that the moments of kLanes rows are found at once.
class PanelSums {
 public:
  PanelSums() = default;
  PanelSums(float*& memory, int64_t rows, int64_t panels, int64_t per_panel, int64_t columns)
      : panels_(panels), per_panel_(per_panel), columns_(columns), stride_((panels_for(rows, kLanes) + 1) * kLanes) {
    sums_ = take_floats(memory, panels * stride_);
    others_ = take_floats(memory, panels * stride_);
  }

  // Of V vectors, the first `n` lanes of each, at `values` and for further rows `distance` apart. Lanes from n on hold
  // zeros.
  template <int V>
  FASTLM_MEMBER void set(int64_t row, int64_t panel, const float* values, int64_t distance, int64_t count, int n) const {
    for (int64_t i = 0; i < count; i += kLanes, values += kLanes * distance) {
      const int64_t rows = count - i < kLanes ? count - i : kLanes;
      vf each[kLanes] = {};
      for (int64_t r = 0; r < rows; ++r)
        for (int v = 0; v < V; ++v) each[r] += load(values + r * distance + v * kLanes);
      const vf sums = sum_each(each, rows);
      float means[kLanes];
      store(means, sums / static_cast<float>(V * n));
      for (int64_t r = 0; r < rows; ++r) {
        each[r] = vf{};
        for (int v = 0; v < V; ++v) {
          const vf d = load(values + r * distance + v * kLanes) - means[r];
          each[r] += d * d;
        }
        if (n < kLanes) {
          float lanes[kLanes];
          store(lanes, each[r]);
          each[r] = load_partial(lanes, n);
        }
      }
      store_lanes(sums_ + panel * stride_ + row + i, sums, static_cast<int>(rows));
      store_lanes(others_ + panel * stride_ + row + i, sum_each(each, rows), static_cast<int>(rows));
    }
  }
  void set(int64_t row, int64_t panel, Moments sums) const {
    sums_[panel * stride_ + row] = sums.mean;
    others_[panel * stride_ + row] = sums.scale;
  }

  // Of the rows from `row` on, as many as there are.
  RowMoments moments(int64_t row) const {
    vf total = {}, variance = {};
    for (int64_t p = 0; p < panels_; ++p) {
      total += load(sums_ + p * stride_ + row);
      variance += load(others_ + p * stride_ + row);
    }
    const vf mean = total / static_cast<float>(columns_);
    for (int64_t p = 0; p < panels_; ++p) {
      const int64_t left = columns_ - p * per_panel_;
      const float n = static_cast<float>(left < per_panel_ ? left : per_panel_);
      const vf off = load(sums_ + p * stride_ + row) * (1.0f / n) - mean;
      variance += off * off * n;
    }
    return {mean, 1.0f / sqrt(variance / static_cast<float>(columns_) + kEps)};
  }
  // The means over the rows of the two things that were set.
  RowMoments means(int64_t row) const {
    vf first = {}, second = {};
    for (int64_t p = 0; p < panels_; ++p) {
      first += load(sums_ + p * stride_ + row);
      second += load(others_ + p * stride_ + row);
    }
    return {first / static_cast<float>(columns_), second / static_cast<float>(columns_)};
  }

 private:
  // The sum of each vector's lanes, in the same order for one as for many.
  FASTLM_MEMBER static vf sum_each(const vf* x, int64_t count) {
    constexpr int64_t kFew = kLanes / 4;
    if (count > kFew) return reduce_each(x);
    vf sums = {};
    for (int64_t i = 0; i < count; ++i) sums[i] = reduce_add(x[i]);
    return sums;
  }

  int64_t panels_ = 0, per_panel_ = 0, columns_ = 0, stride_ = 0;
  float *sums_ = nullptr, *others_ = nullptr;  // [panels][stride]
};

FASTLM_INLINE vf load_or_zero(const float* p, int64_t at, int n) { return p == nullptr ? vf{} : load_lanes(p + at, n); }

// The shares of the old state that row `row` keeps, or null.
FASTLM_INLINE const float* shares_of(const float* shares, const RecurrentVariant& v, int64_t row) {
  return shares == nullptr ? nullptr : shares + row * v.zoneout_stride;
}

}  // namespace FASTLM_ISA
}  // namespace fastlm
