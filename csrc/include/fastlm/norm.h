// Layer normalisation and root-mean-square normalisation of rows.
#pragma once

#include <cstdint>

namespace fastlm {

struct Norm {
  const float* input;   // [rows, dim], contiguous
  const float* weight;  // [dim], or null for ones; may not overlap output
  const float* bias;    // [dim], or null for zeros; may not overlap output
  void* output;         // [rows, dim]; floats, which may be input, or bfloat16; otherwise overlaps nothing
  float* statistics;    // [rows, 2]: what was subtracted and what was multiplied, for norm_backward; or null
  int64_t rows, dim;
  float eps;
  bool centre;   // layer norm: the row's mean is subtracted first; else it counts as 0
  bool bfloats;  // output is bfloat16, rounded to nearest even
  int threads;
  const void* added = nullptr;  // [rows, dim], added to input before all else; or null
  float* sum = nullptr;         // [rows, dim], where added is not null: input + added; may be input
  bool added_bfloats = false;   // added is bfloat16, not floats
};

// output[r] = (input[r] - mean) / sqrt(mean((input[r] - mean)^2) + eps) * weight + bias. A row's result depends on that
// row alone: neither its place, nor `rows`, nor `threads` changes a bit of it. With `added`, the same bits as of an
// addition and a norm of its result.
void norm(const Norm& args);

struct NormBackward {
  const void* grad_output;  // [rows, dim], contiguous; floats or bfloat16
  const float* input;       // as it was given forward; where something was added, the sum
  const float* weight;      // as it was given forward
  const float* statistics;  // [rows, 2], from norm
  float* grad_input;        // [rows, dim]; may be grad_output, otherwise overlaps nothing
  float* grad_weight;       // [dim], or null
  float* grad_bias;         // [dim], or null
  float* scratch;           // norm_backward_scratch(args) floats
  int64_t rows, dim;
  bool centre;
  bool bfloats;  // grad_output is bfloat16
  int threads;
  const float* grad_sum = nullptr;  // [rows, dim], added to grad_input, which it may be; or null
};

// The gradients of sum(grad_output * output). A row of grad_input depends on that row alone; grad_weight and grad_bias
// are summed in an order that `threads` does not change.
void norm_backward(const NormBackward& args);
int64_t norm_backward_scratch(const NormBackward& args);

}  // namespace fastlm
