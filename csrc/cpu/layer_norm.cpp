#include "fastlm/layer_norm.h"

#include "simd.h"
#include "threads.h"

namespace fastlm {
namespace FASTLM_ISA {
namespace {

// Elements below which waking a second thread costs more than it saves.
constexpr int64_t kWorthAThread = 1 << 14;

// The sum of f(x) over a row, f being applied to whole vectors; what lies beyond the row is `fill`.
template <typename F>
FASTLM_INLINE float sum_over(const float* x, int64_t n, float fill, F f) {
  vf sums[4] = {};  // hides the latency of the addition, and keeps each sum short
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes)
    for (int k = 0; k < 4; ++k) sums[k] += f(load(x + i + k * kLanes));
  for (; i < n; i += kLanes) sums[0] += f(load_until(x, i, n, fill));
  return reduce_add((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

FASTLM_INLINE void normalise(const LayerNorm& a, const float* x, float* y) {
  const auto same = [](vf v) __attribute__((always_inline)) { return v; };
  const float mean = sum_over(x, a.dim, 0.0f, same) / static_cast<float>(a.dim);
  // About the mean: the difference of E[x^2] and mean^2 would cancel.
  const auto square = [mean](vf v) __attribute__((always_inline)) { return (v - mean) * (v - mean); };
  const float variance = sum_over(x, a.dim, mean, square) / static_cast<float>(a.dim);
  const vf scale = broadcast(1.0f / __builtin_sqrtf(variance + a.eps));
  for (int64_t i = 0; i < a.dim; i += kLanes) {
    vf v = (load_until(x, i, a.dim, 0.0f) - mean) * scale;
    if (a.weight) v *= load_until(a.weight, i, a.dim, 0.0f);
    if (a.bias) v += load_until(a.bias, i, a.dim, 0.0f);
    if (i + kLanes <= a.dim)
      store(y + i, v);
    else
      store_partial(y + i, v, static_cast<int>(a.dim - i));
  }
}

}  // namespace

void layer_norm(const LayerNorm& a) {
  const int64_t useful = a.rows * a.dim / kWorthAThread;
  parallel(useful < a.threads ? static_cast<int>(useful) : a.threads, [&](int thread, int threads, Barrier&) {
    const Range mine = share(a.rows, thread, threads);
    for (int64_t row = mine.begin; row < mine.end; ++row) normalise(a, a.input + row * a.dim, a.output + row * a.dim);
  });
}

}  // namespace FASTLM_ISA
}  // namespace fastlm
