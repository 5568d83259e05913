// Device code of the GRU cell's pointwise half, forward and backward.
#pragma once

#include "cell.cuh"

namespace fastlm {
namespace device {

template <typename T>
using GruRow = GateRow<T, 3, GruCellCuda>;

struct GruGates {
  float r, z, n, h_n;  // h_n: what r multiplies

  template <typename T>
  FASTLM_DEVICE static GruGates of(const GruRow<T>& row, int64_t unit) {
    const int64_t n = row.a.hidden;
    GruGates gates;
    gates.r = sigmoid(row.from_x(unit) + row.from_h(unit));
    gates.z = sigmoid(row.from_x(n + unit) + row.from_h(n + unit));
    gates.h_n = row.from_h(2 * n + unit);
    gates.n = tanhf(row.from_x(2 * n + unit) + gates.r * gates.h_n);
    return gates;
  }
};

template <typename T>
__global__ void __launch_bounds__(kCellThreads, 3) gru_cell_kernel(GruCellCuda a) {
  FASTLM_SHARED(BlockSums, shared);
  const GruRow<T> row(a, blockIdx.x, shared);
  const int64_t start = row.row * a.hidden;
  for (int64_t u = threadIdx.x; u < a.hidden; u += kCellThreads) {
    const GruGates gates = GruGates::of(row, u);
    const float h_prev = get<T>(a.h_prev, start + u), h = (1 - gates.z) * gates.n + gates.z * h_prev;
    put<T>(a.h, start + u, h + get<T>(a.zoneout_h, start + u) * (h_prev - h));
  }
}

template <typename T>
__global__ void __launch_bounds__(kCellThreads, 3) gru_cell_backward_kernel(GruCellGradientsCuda args) {
  FASTLM_SHARED(BlockSums, shared);
  const GruCellCuda& a = args.cell;
  const int64_t n = a.hidden;
  const GruRow<T> row(a, blockIdx.x, shared);
  const int64_t start = row.row * n;
  for (int64_t u = threadIdx.x; u < n; u += kCellThreads) {
    const GruGates gates = GruGates::of(row, u);
    const float keep = get<T>(a.zoneout_h, start + u), of_h = get<T>(args.grad_h, start + u), grad = of_h * (1 - keep);
    const float of_n = grad * (1 - gates.z) * (1 - gates.n * gates.n);
    const float of_r = of_n * gates.h_n * gates.r * (1 - gates.r);
    const float of_z = grad * (get<T>(a.h_prev, start + u) - gates.n) * gates.z * (1 - gates.z);
    const float of_x[3] = {of_r, of_z, of_n}, of_g[3] = {of_r, of_z, of_n * gates.r};
#pragma unroll
    for (int k = 0; k < 3; ++k) {
      put<T>(args.grad_sum_x, row.first + k * n + u, of_x[k]);
      put<T>(args.grad_sum_h, row.first + k * n + u, of_g[k]);
    }
    put<T>(args.grad_h_prev, start + u, of_h * keep + grad * gates.z);
  }
  row.backward(args.grad_sum_x, args.grad_sum_h, args.grad_gates_x, args.grad_gates_h, shared);
}

}  // namespace device
}  // namespace fastlm
