// Weights rearranged into panels for the products of rows with a matrix; see cpu/gemm_panel.h.
#pragma once

#include <cstdint>

namespace fastlm {

// Packs a matrix into [panels][k][4 or 3][L] (see cpu/gemm_panel.h): element (a, b), a < k, b < n, is read from
// source[a * stride_k + b * stride_n].
struct PackPanels {
  const void* source;  // float, or bfloat16 where `bfloat`
  int64_t k, n;
  int64_t stride_k, stride_n;
  int64_t gates;  // n counts 3 or 4 gates of n/gates units, and a panel takes L units of each; 0: panels of 4L columns
  void* packed;   // out: packed_size(k, n, gates) numbers of the same kind
  int threads;
  bool bfloat = false;
};
void pack_panels(const PackPanels& args);

// Numbers in a packed matrix: ceil((n / gates) / L) panels of k * gates * L, or ceil(n / (4L)) of k * 4L without gates;
// of bfloat16, k made even.
int64_t packed_size(int64_t k, int64_t n, int64_t gates, bool bfloat = false);

}  // namespace fastlm
