#include "fastlm/activation.h"

#include "simd_math.h"
#include "threads.h"

namespace fastlm {
namespace FASTLM_ISA {
namespace {

// Elements below which waking a second thread costs more than it saves.
constexpr int64_t kWorthAThread = 1 << 14;

FASTLM_INLINE vf silu(vf x) { return x * sigmoid(x); }
// (1 + tanh u) / 2 = sigmoid(2 u), which loses nothing where tanh is near -1.
FASTLM_INLINE vf gelu(vf x) { return x * sigmoid((x + x * x * x * 0.044715f) * 1.59576912160573f); }

template <typename F>
FASTLM_INLINE void apply(F f, const Activation& a, Range mine) {
  for (int64_t i = mine.begin; i < mine.end; i += kLanes) {
    // The last few elements take the same path as all others: a scalar tail would round differently.
    const int n = static_cast<int>(mine.end - i < kLanes ? mine.end - i : kLanes);
    const bool whole = n == kLanes;
    vf y = f(whole ? load(a.input + i) : load_partial(a.input + i, n));
    if (a.factor) y *= whole ? load(a.factor + i) : load_partial(a.factor + i, n);
    if (whole)
      store(a.output + i, y);
    else
      store_partial(a.output + i, y, n);
  }
}

}  // namespace

void activation(const Activation& a) {
  const int64_t useful = a.count / kWorthAThread;
  parallel(useful < a.threads ? static_cast<int>(useful) : a.threads, [&](int thread, int threads, Barrier&) {
    const Range mine = share(a.count, thread, threads, kLanes);
    if (a.function == ActivationFunction::kSilu)
      apply([](vf x) __attribute__((always_inline)) { return silu(x); }, a, mine);
    else
      apply([](vf x) __attribute__((always_inline)) { return gelu(x); }, a, mine);
  });
}

}  // namespace FASTLM_ISA
}  // namespace fastlm
