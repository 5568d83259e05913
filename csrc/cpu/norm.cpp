#include "fastlm/norm.h"

#include "bfloat.h"
#include "light_work.h"

namespace fastlm {
namespace FASTLM_ISA {
namespace {

// Parts of the rows whose parameter gradients are summed apart, then together: the same ones for any thread count.
constexpr int kParts = 16;

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

template <bool Bfloats>
FASTLM_INLINE void add(const float* x, const void* added, float* sum, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes)
    At<false>::store(sum, i, n, load_until(x, i, n, 0.0f) + At<Bfloats>::load(added, i, n));
}

template <bool Bfloats>
FASTLM_INLINE void normalise(const Norm& a, int64_t row) {
  const float* x = a.input + row * a.dim;
  if (a.added) {
    float* sum = a.sum + row * a.dim;
    const char* added = static_cast<const char*>(a.added) + row * a.dim * (a.added_bfloats ? 2 : 4);
    a.added_bfloats ? add<true>(x, added, sum, a.dim) : add<false>(x, added, sum, a.dim);
    x = sum;
  }
  void* y = static_cast<char*>(a.output) + row * a.dim * (Bfloats ? 2 : 4);
  const float count = static_cast<float>(a.dim);
  const auto same = [](vf v) __attribute__((always_inline)) { return v; };
  const float mean = a.centre ? sum_over(x, a.dim, 0.0f, same) / count : 0.0f;
  // About the mean: the difference of E[x^2] and mean^2 would cancel.
  const auto square = [mean](vf v) __attribute__((always_inline)) { return (v - mean) * (v - mean); };
  const float scale = 1.0f / __builtin_sqrtf(sum_over(x, a.dim, mean, square) / count + a.eps);
  if (a.statistics) {
    a.statistics[2 * row] = mean;
    a.statistics[2 * row + 1] = scale;
  }
  for (int64_t i = 0; i < a.dim; i += kLanes) {
    vf v = (load_until(x, i, a.dim, 0.0f) - mean) * scale;
    if (a.weight) v *= load_until(a.weight, i, a.dim, 0.0f);
    if (a.bias) v += load_until(a.bias, i, a.dim, 0.0f);
    At<Bfloats>::store(y, i, a.dim, v);
  }
}

// With n = (x - mean) * scale and g = grad_output * weight: scale * (g - mean(g) - n mean(g n)); without centring
// mean(g) is left out. To that comes grad_sum. Adds grad_output * n and grad_output to `weight` and `bias`, where they are not null.
template <bool Bfloats>
FASTLM_INLINE void differentiate(const NormBackward& a, int64_t row, float* weight, float* bias) {
  const float* x = a.input + row * a.dim;
  const void* grad = static_cast<const char*>(a.grad_output) + row * a.dim * (Bfloats ? 2 : 4);
  float* to = a.grad_input + row * a.dim;
  const float mean = a.statistics[2 * row], scale = a.statistics[2 * row + 1];
  vf sums[2] = {}, products[2] = {};
  for (int64_t i = 0, turn = 0; i < a.dim; i += kLanes, turn ^= 1) {
    vf g = At<Bfloats>::load(grad, i, a.dim);
    const vf n = (load_until(x, i, a.dim, mean) - mean) * scale;
    if (weight) At<false>::store(weight, i, a.dim, load_until(weight, i, a.dim, 0.0f) + g * n);
    if (bias) At<false>::store(bias, i, a.dim, load_until(bias, i, a.dim, 0.0f) + g);
    if (a.weight) g *= load_until(a.weight, i, a.dim, 0.0f);
    sums[turn] += g;
    products[turn] += g * n;
  }
  const float count = static_cast<float>(a.dim);
  const float mean_grad = a.centre ? reduce_add(sums[0] + sums[1]) / count : 0.0f;
  const float mean_product = reduce_add(products[0] + products[1]) / count;
  for (int64_t i = 0; i < a.dim; i += kLanes) {
    vf g = At<Bfloats>::load(grad, i, a.dim);
    if (a.weight) g *= load_until(a.weight, i, a.dim, 0.0f);
    const vf n = (load_until(x, i, a.dim, mean) - mean) * scale;
    vf result = (g - mean_grad - n * mean_product) * scale;
    if (a.grad_sum) result += load_until(a.grad_sum + row * a.dim, i, a.dim, 0.0f);
    At<false>::store(to, i, a.dim, result);
  }
}

}  // namespace

void norm(const Norm& a) {
  parallel(light_threads(a.rows * a.dim, a.threads), [&](int thread, int threads, Barrier&) {
    const Range mine = share(a.rows, thread, threads);
    for (int64_t row = mine.begin; row < mine.end; ++row)
      if (a.bfloats)
        normalise<true>(a, row);
      else
        normalise<false>(a, row);
  });
}

int64_t norm_backward_scratch(const NormBackward& a) {
  return kParts * a.dim * ((a.grad_weight != nullptr) + (a.grad_bias != nullptr));
}

void norm_backward(const NormBackward& a) {
  const int64_t kept = a.dim * ((a.grad_weight != nullptr) + (a.grad_bias != nullptr));
  parallel(light_threads(a.rows * a.dim, a.threads), [&](int thread, int threads, Barrier& barrier) {
    const Range parts = share(kParts, thread, threads);
    for (int64_t part = parts.begin; part < parts.end; ++part) {
      float* sums = a.scratch + part * kept;
      for (int64_t i = 0; i < kept; ++i) sums[i] = 0.0f;
      float* weight = a.grad_weight ? sums : nullptr;
      float* bias = a.grad_bias ? sums + (weight ? a.dim : 0) : nullptr;
      const Range mine = share(a.rows, static_cast<int>(part), kParts);
      for (int64_t row = mine.begin; row < mine.end; ++row)
        if (a.bfloats)
          differentiate<true>(a, row, weight, bias);
        else
          differentiate<false>(a, row, weight, bias);
    }
    if (kept == 0) return;
    barrier.wait();
    const Range columns = share(kept, thread, threads, kLanes);
    for (int64_t i = columns.begin; i < columns.end; ++i) {
      float sum = 0.0f;
      for (int part = 0; part < kParts; ++part) sum += a.scratch[part * kept + i];
      const bool to_weight = a.grad_weight != nullptr && i < a.dim;
      (to_weight ? a.grad_weight : a.grad_bias)[i < a.dim ? i : i - a.dim] = sum;
    }
  });
}

}  // namespace FASTLM_ISA
}  // namespace fastlm
