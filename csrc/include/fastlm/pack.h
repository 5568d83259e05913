// Weights rearranged into panels for the products of rows with a matrix; see cpu/gemm_panel.h.
#pragma once

#include <cstdint>

namespace fastlm {

// Packs a matrix into [panels][k][4][L] (see cpu/gemm_panel.h): element (a, b), a < k, b < n, is read from
// source[a * stride_k + b * stride_n].
struct PackPanels {
  const float* source;
  int64_t k, n;
  int64_t stride_k, stride_n;
  bool gates;     // n counts 4 gates of n/4 units, and panels take L units of each: n/(4L) panels of 4L columns if not
  float* packed;  // out: packed_size(k, n, gates) floats
  int threads;
};
void pack_panels(const PackPanels& args);

// Floats in a packed matrix: panels * k * 4L, with (n/4)/L panels for gates and n/(4L) otherwise.
int64_t packed_size(int64_t k, int64_t n, bool gates);

}  // namespace fastlm
