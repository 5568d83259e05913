// Layer normalisation of rows.
#pragma once

#include <cstdint>

namespace fastlm {

struct LayerNorm {
  const float* input;   // [rows, dim], contiguous
  const float* weight;  // [dim], or null for ones; may not overlap output
  const float* bias;    // [dim], or null for zeros; may not overlap output
  float* output;        // [rows, dim]; may be input, otherwise overlaps nothing
  int64_t rows, dim;
  float eps;
  int threads;
};

// output[r] = (input[r] - mean) / sqrt(variance + eps) * weight + bias, mean and variance over the row. A row's result
// depends on that row alone: neither its place, nor `rows`, nor `threads` changes a bit of it.
void layer_norm(const LayerNorm& args);

}  // namespace fastlm
