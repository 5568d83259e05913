// Root-mean-square normalisation of rows.
#pragma once

#include <cstdint>

namespace fastlm {

struct RmsNorm {
  const float* input;   // [rows, dim], contiguous
  const float* weight;  // [dim], or null for ones; may not overlap output
  float* output;        // [rows, dim]; may be input, otherwise overlaps nothing
  int64_t rows, dim;
  float eps;
  int threads;
};

// output[r] = input[r] / sqrt(mean(input[r]^2) + eps) * weight. A row's result depends on that row alone: neither its
// place, nor `rows`, nor `threads` changes a bit of it.
void rms_norm(const RmsNorm& args);

}  // namespace fastlm
