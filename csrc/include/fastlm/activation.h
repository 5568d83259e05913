// The elementwise functions between a transformer block's two projections.
#pragma once

#include <cstdint>

namespace fastlm {

enum class ActivationFunction : int { kSilu = 0, kGeluTanh = 1 };

// The tensors are floats or, with `bfloats`, bfloat16, rounded to nearest even; the arithmetic is float's.
struct Activation {
  const void* input;   // [count]
  const void* factor;  // [count], multiplies the result; or null
  void* output;        // [count]; may be input or factor, otherwise overlaps nothing
  int64_t count;
  ActivationFunction function;
  bool bfloats;
  int threads;
};

// output[i] = f(input[i]) * factor[i]. Each element depends on its own inputs alone: neither its place, nor `count`,
// nor `threads` changes a bit of it.
void activation(const Activation& args);

struct ActivationBackward {
  const void* grad_output;  // [count]
  const void* input;        // as it was given forward
  const void* factor;       // as it was given forward
  void* grad_input;         // [count]; may be grad_output, otherwise overlaps nothing
  void* grad_factor;        // [count], overlaps nothing; null exactly where factor is
  int64_t count;
  ActivationFunction function;
  bool bfloats;
  int threads;
};

// grad_input[i] = grad_output[i] * factor[i] * f'(input[i]), grad_factor[i] = grad_output[i] * f(input[i]).
void activation_backward(const ActivationBackward& args);

}  // namespace fastlm
