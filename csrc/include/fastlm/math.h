// Elementwise functions over arrays: the vector functions the kernels are built from, where a caller can reach them.
#pragma once

#include <cstdint>

namespace fastlm {

enum class MathFunction { kExp, kTanh, kSigmoid };

// y[i] = f(x[i]) for 0 <= i < n, to a few units in the last place. y may be x.
void math_apply(MathFunction function, const float* x, float* y, int64_t n);

}  // namespace fastlm
