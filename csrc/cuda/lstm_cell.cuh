// Device code of the LSTM cell's pointwise half, forward and backward.
#pragma once

#include "cell.cuh"

namespace fastlm {
namespace device {

template <typename T>
using LstmRow = GateRow<T, 4, LstmCellCuda>;

struct LstmGates {
  float i, f, g, o;

  template <typename T>
  FASTLM_DEVICE static LstmGates of(const LstmRow<T>& row, int64_t unit) {
    const int64_t n = row.a.hidden;
    const auto sum = [&](int64_t j) { return row.from_x(j) + row.from_h(j); };
    return {sigmoid(sum(unit)), sigmoid(sum(n + unit)), tanhf(sum(2 * n + unit)), sigmoid(sum(3 * n + unit))};
  }
  // Gradients of what the four nonlinearities take. of_c: of i g + f c_prev, whatever ways lead there; of_h: of the new
  // h = o * squashed.
  FASTLM_DEVICE void gradients(float of_c, float of_h, float c_prev, float squashed, float (&sums)[4]) const {
    sums[0] = of_c * g * i * (1 - i);
    sums[1] = of_c * c_prev * f * (1 - f);
    sums[2] = of_c * i * (1 - g * g);
    sums[3] = of_h * squashed * o * (1 - o);
  }
};

// Dynamic shared memory: [hidden] floats with ln_c.
template <typename T>
__global__ void __launch_bounds__(kCellThreads, 3) lstm_cell_kernel(LstmCellCuda a) {
  FASTLM_SHARED(BlockSums, shared);
  FASTLM_DYNAMIC_SHARED(bytes);
  float* const new_c = reinterpret_cast<float*>(bytes);
  const LstmRow<T> row(a, blockIdx.x, shared);
  const int64_t start = row.row * a.hidden;
  Norm norm_c;
  if (a.ln_c != nullptr) {
    for (int64_t u = threadIdx.x; u < a.hidden; u += kCellThreads) {
      const LstmGates gates = LstmGates::of(row, u);
      new_c[u] = gates.f * get<T>(a.c_prev, start + u) + gates.i * gates.g;
    }
    norm_c = Norm::of(a.hidden, [=](int64_t u) { return new_c[u]; }, shared);
  }
  for (int64_t u = threadIdx.x; u < a.hidden; u += kCellThreads) {
    const LstmGates gates = LstmGates::of(row, u);
    const float c_prev = get<T>(a.c_prev, start + u);
    const float c = gates.f * c_prev + gates.i * gates.g;
    const float normed = a.ln_c == nullptr ? c : norm_c.hat(c) * get<T>(a.ln_c, u) + get<T>(a.ln_c_bias, u);
    const float h = gates.o * tanhf(normed);
    const float keep_h = get<T>(a.zoneout_h, start + u), keep_c = get<T>(a.zoneout_c, start + u);
    const float h_prev = a.zoneout_h == nullptr ? h : get<T>(a.h_prev, start + u);
    put<T>(a.h, start + u, h + keep_h * (h_prev - h));
    put<T>(a.c, start + u, c + keep_c * (c_prev - c));
  }
}

// Dynamic shared memory: [2 * hidden] floats with ln_c.
template <typename T>
__global__ void __launch_bounds__(kCellThreads, 3) lstm_cell_backward_kernel(LstmCellGradientsCuda args) {
  FASTLM_SHARED(BlockSums, shared);
  FASTLM_DYNAMIC_SHARED(bytes);
  const LstmCellCuda& a = args.cell;
  const int64_t n = a.hidden;
  float *const new_c = reinterpret_cast<float*>(bytes), *const grad_c = new_c + n;
  const LstmRow<T> row(a, blockIdx.x, shared);
  const int64_t start = row.row * n;
  Norm norm_c;
  if (a.ln_c != nullptr) {
    for (int64_t u = threadIdx.x; u < n; u += kCellThreads) {
      const LstmGates gates = LstmGates::of(row, u);
      new_c[u] = gates.f * get<T>(a.c_prev, start + u) + gates.i * gates.g;
    }
    norm_c = Norm::of(n, [=](int64_t u) { return new_c[u]; }, shared);
  }
  const auto normed = [&](int64_t u, float c) {
    return a.ln_c == nullptr ? c : norm_c.hat(c) * get<T>(a.ln_c, u) + get<T>(a.ln_c_bias, u);
  };
  const auto grad_of_normed = [&](int64_t u, const LstmGates& gates, float squashed) {
    return get<T>(args.grad_h, start + u) * (1 - get<T>(a.zoneout_h, start + u)) * gates.o * (1 - squashed * squashed);
  };
  if (a.ln_c != nullptr) {
    for (int64_t u = threadIdx.x; u < n; u += kCellThreads) {
      const float grad = grad_of_normed(u, LstmGates::of(row, u), tanhf(normed(u, new_c[u])));
      put<T>(args.grad_ln_c, start + u, grad * norm_c.hat(new_c[u]));
      put<T>(args.grad_ln_c_bias, start + u, grad);
      grad_c[u] = grad * get<T>(a.ln_c, u);
    }
    norm_backward(
        n, norm_c, [=](int64_t u) { return new_c[u]; }, [=](int64_t u) { return grad_c[u]; },
        [=](int64_t u, float grad) { grad_c[u] = grad; }, shared);
  }
  for (int64_t u = threadIdx.x; u < n; u += kCellThreads) {
    const LstmGates gates = LstmGates::of(row, u);
    const float c_prev = get<T>(a.c_prev, start + u), c = gates.f * c_prev + gates.i * gates.g;
    const float squashed = tanhf(normed(u, c));
    const float keep_h = get<T>(a.zoneout_h, start + u), keep_c = get<T>(a.zoneout_c, start + u);
    const float of_h = get<T>(args.grad_h, start + u), of_c = get<T>(args.grad_c, start + u);
    const float new_h = of_h * (1 - keep_h);
    const float through_h = a.ln_c == nullptr ? grad_of_normed(u, gates, squashed) : grad_c[u];
    const float grad = of_c * (1 - keep_c) + through_h;
    float sums[4];
    gates.gradients(grad, new_h, c_prev, squashed, sums);
#pragma unroll
    for (int k = 0; k < 4; ++k) put<T>(args.grad_sum, row.first + k * n + u, sums[k]);
    put<T>(args.grad_h_prev, start + u, of_h * keep_h);
    put<T>(args.grad_c_prev, start + u, of_c * keep_c + grad * gates.f);
  }
  row.backward(args.grad_sum, args.grad_sum, args.grad_gates_x, args.grad_gates_h, shared);
}

}  // namespace device
}  // namespace fastlm
