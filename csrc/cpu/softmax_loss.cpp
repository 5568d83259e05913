#include "fastlm/softmax_loss.h"

#include "bfloat.h"
#include "simd_math.h"
#include "threads.h"

namespace fastlm {
namespace FASTLM_ISA {
namespace {

// Elements below which waking a second thread costs more than it saves.
constexpr int64_t kWorthAThread = 1 << 13;

// Room for one row, for each thread: whole vectors of float.
int64_t row_size(const SoftmaxLoss& a) { return (a.columns + kLanes - 1) / kLanes * kLanes; }

template <bool Bfloats>
FASTLM_INLINE void one_row(const SoftmaxLoss& a, int64_t row, float* x) {
  const int64_t n = a.columns, target = a.target[row];
  const bool kept = target != a.ignore_index;
  void* logits = static_cast<char*>(a.logits) + row * n * (Bfloats ? 2 : 4);
  if (!kept) {  // whatever the logits are
    a.losses[row] = 0.0f;
    for (int64_t i = 0; a.factors != nullptr && i < n; i += kLanes) At<Bfloats>::store(logits, i, n, vf{});
    return;
  }
  // Beyond the row's end x is -inf, which is neither the largest nor has it a weight.
  const vf nothing = broadcast(-__builtin_inff());
  vf tops = nothing, sums = {};
  for (int64_t i = 0; i < n; i += kLanes) {
    vf v = At<Bfloats>::load(logits, i, n);
    if (a.bias) v += load_until(a.bias, i, n, 0.0f);
    sums += v;  // the zeros that load gives beyond the end
    if (i + kLanes > n)
      for (int64_t k = n - i; k < kLanes; ++k) v[k] = nothing[0];
    tops = max(tops, v);
    store(x + i, v);
  }
  const float top = reduce_max(tops);
  const float chosen = x[target] - top;
  const float mean = a.smoothing != 0 ? reduce_add(sums) / static_cast<float>(n) - top : 0.0f;
  vf totals[2] = {};
  for (int64_t i = 0, turn = 0; i < n; i += kLanes, turn ^= 1) {
    const vf e = exp(load(x + i) - top);
    totals[turn] += e;
    store(x + i, e);
  }
  // exp(-inf) is a denormal here, which a row with a loss does not notice.
  const float total = reduce_add(totals[0] + totals[1]);
  // Infinite for a target that cannot be; a product with 0 would make it NaN.
  const float expected = a.smoothing != 0 ? (1 - a.smoothing) * chosen + a.smoothing * mean : chosen;
  a.losses[row] = __builtin_logf(total) - expected;
  if (a.factors == nullptr) return;
  const float factor = a.factors[row], scale = factor / total;
  const float less = factor * a.smoothing / static_cast<float>(n);
  x[target] -= total * (1.0f - a.smoothing);
  for (int64_t i = 0; i < n; i += kLanes) At<Bfloats>::store(logits, i, n, load(x + i) * scale - less);
}

}  // namespace

int64_t softmax_loss_scratch(const SoftmaxLoss& a) { return row_size(a) * a.threads; }

void softmax_loss(const SoftmaxLoss& a) {
  const int64_t useful = a.rows * a.columns / kWorthAThread, room = row_size(a);
  parallel(useful < a.threads ? static_cast<int>(useful) : a.threads, [&](int thread, int threads, Barrier&) {
    const Range mine = share(a.rows, thread, threads);
    for (int64_t row = mine.begin; row < mine.end; ++row)
      if (a.bfloats)
        one_row<true>(a, row, a.scratch + room * thread);
      else
        one_row<false>(a, row, a.scratch + room * thread);
  });
}

}  // namespace FASTLM_ISA
}  // namespace fastlm
