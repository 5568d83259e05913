#include "fastlm/rms_norm.h"

#include "simd.h"
#include "threads.h"

namespace fastlm {
namespace FASTLM_ISA {
namespace {

// Elements below which waking a second thread costs more than it saves.
constexpr int64_t kWorthAThread = 1 << 14;

FASTLM_INLINE float sum_of_squares(const float* x, int64_t n) {
  vf sums[4] = {};  // hides the latency of the addition, and keeps each sum short
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes)
    for (int k = 0; k < 4; ++k) {
      const vf v = load(x + i + k * kLanes);
      sums[k] += v * v;
    }
  for (; i < n; i += kLanes) {
    const vf v = load_until(x, i, n, 0.0f);
    sums[0] += v * v;
  }
  return reduce_add((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

FASTLM_INLINE void normalise(const float* x, const float* weight, float* y, int64_t n, float eps) {
  const float mean = sum_of_squares(x, n) / static_cast<float>(n);
  const vf scale = broadcast(1.0f / __builtin_sqrtf(mean + eps));
  for (int64_t i = 0; i < n; i += kLanes) {
    vf v = load_until(x, i, n, 0.0f) * scale;
    if (weight) v *= load_until(weight, i, n, 0.0f);
    if (i + kLanes <= n)
      store(y + i, v);
    else
      store_partial(y + i, v, static_cast<int>(n - i));
  }
}

}  // namespace

void rms_norm(const RmsNorm& a) {
  const int64_t useful = a.rows * a.dim / kWorthAThread;
  parallel(useful < a.threads ? static_cast<int>(useful) : a.threads, [&](int thread, int threads, Barrier&) {
    const Range mine = share(a.rows, thread, threads);
    for (int64_t row = mine.begin; row < mine.end; ++row)
      normalise(a.input + row * a.dim, a.weight, a.output + row * a.dim, a.dim, a.eps);
  });
}

}  // namespace FASTLM_ISA
}  // namespace fastlm
