#include "fastlm/math.h"

#include "simd_math.h"

namespace fastlm {
namespace FASTLM_ISA {

template <typename F>
static void apply(F f, const float* x, float* y, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(y + i, f(load(x + i)));
  if (i < n) store_partial(y + i, f(load_partial(x + i, static_cast<int>(n - i))), static_cast<int>(n - i));
}

void math_apply(MathFunction function, const float* x, float* y, int64_t n) {
  switch (function) {
    case MathFunction::kExp: return apply([](vf v) { return exp(v); }, x, y, n);
    case MathFunction::kTanh: return apply([](vf v) { return tanh(v); }, x, y, n);
    case MathFunction::kSigmoid: return apply([](vf v) { return sigmoid(v); }, x, y, n);
  }
}

}  // namespace FASTLM_ISA
}  // namespace fastlm
