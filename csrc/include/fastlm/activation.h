// The elementwise functions between a transformer block's two projections.
#pragma once

#include <cstdint>

namespace fastlm {

enum class ActivationFunction : int { kSilu = 0, kGeluTanh = 1 };

struct Activation {
  const float* input;   // [count]
  const float* factor;  // [count], multiplies the result; or null
  float* output;        // [count]; may be input or factor, otherwise overlaps nothing
  int64_t count;
  ActivationFunction function;
  int threads;
};

// output[i] = f(input[i]) * factor[i]. Each element depends on its own inputs alone: neither its place, nor `count`,
// nor `threads` changes a bit of it.
void activation(const Activation& args);

}  // namespace fastlm
