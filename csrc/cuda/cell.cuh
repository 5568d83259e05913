// Device code of the recurrent cells' pointwise halves, forward and backward: a block for each row.
#pragma once

#include "device.cuh"
#include "fastlm/recurrent_cuda.h"

namespace fastlm {
namespace device {

constexpr int kCellThreads = 256;
constexpr float kNormEps = 1e-5f;

// Through tanh, which saturates instead of overflowing.
FASTLM_DEVICE float sigmoid(float x) { return 0.5f + 0.5f * tanhf(0.5f * x); }

template <typename T>
FASTLM_DEVICE const T* as(const void* p) {
  return static_cast<const T*>(p);
}
// Element i of an argument that may be null.
template <typename T>
FASTLM_DEVICE float get(const void* p, int64_t i) {
  return p == nullptr ? 0.0f : to_float(as<T>(p)[i]);
}
template <typename T>
FASTLM_DEVICE void put(void* p, int64_t i, float value) {
  if (p != nullptr) from_float(value, static_cast<T*>(p) + i);
}

struct BlockSums {
  float sums[kCellThreads / kWarp];
};

// The sum over the block, in every thread. The order is fixed.
FASTLM_DEVICE float block_sum(float x, BlockSums& shared) {
  x = warp_sum(x);
  if (threadIdx.x % kWarp == 0) shared.sums[threadIdx.x / kWarp] = x;
  __syncthreads();
  float total = 0;
  for (int w = 0; w < kCellThreads / kWarp; ++w) total += shared.sums[w];
  __syncthreads();
  return total;
}

// Layer normalisation of n values that `load(i)` gives: (x - mean) * scale.
struct Norm {
  float mean = 0, scale = 1;

  template <typename Load>
  FASTLM_DEVICE static Norm of(int64_t n, Load load, BlockSums& shared) {
    float sum = 0, squares = 0;
    for (int64_t i = threadIdx.x; i < n; i += kCellThreads) sum += load(i);
    Norm norm;
    norm.mean = block_sum(sum, shared) / float(n);
    for (int64_t i = threadIdx.x; i < n; i += kCellThreads) {
      const float centred = load(i) - norm.mean;
      squares += centred * centred;
    }
    norm.scale = 1.0f / sqrtf(block_sum(squares, shared) / float(n) + kNormEps);
    return norm;
  }
  FASTLM_DEVICE float hat(float x) const { return (x - mean) * scale; }
};

// Turns gradients of normalised values times gain into those of the values: `grad(i)` is the former times the gain.
template <typename Load, typename Grad, typename Store>
FASTLM_DEVICE void norm_backward(int64_t n, const Norm& norm, Load load, Grad grad, Store store, BlockSums& shared) {
  float sum = 0, products = 0;
  for (int64_t i = threadIdx.x; i < n; i += kCellThreads) {
    const float g = grad(i);
    sum += g;
    products += g * norm.hat(load(i));
  }
  sum = block_sum(sum, shared) / float(n);
  products = block_sum(products, shared) / float(n);
  for (int64_t i = threadIdx.x; i < n; i += kCellThreads)
    store(i, norm.scale * (grad(i) - sum - norm.hat(load(i)) * products));
}

// One row of an LSTM cell's inputs.
template <typename T>
struct LstmRow {
  const LstmCellCuda& a;
  const int64_t row;
  Norm norm_x, norm_h;

  FASTLM_DEVICE LstmRow(const LstmCellCuda& args, int64_t row_, BlockSums& shared) : a(args), row(row_) {
    const int64_t n = 4 * a.hidden;
    if (a.ln_ih != nullptr) norm_x = Norm::of(n, [this](int64_t j) { return x(j); }, shared);
    if (a.ln_hh != nullptr) norm_h = Norm::of(n, [this](int64_t j) { return h(j); }, shared);
  }
  FASTLM_DEVICE float x(int64_t j) const { return get<T>(a.gates_x, row * 4 * a.hidden + j); }
  FASTLM_DEVICE float h(int64_t j) const { return get<T>(a.gates_h, row * 4 * a.hidden + j); }
  FASTLM_DEVICE float gate(int64_t j) const {
    const float from_x = a.ln_ih == nullptr ? x(j) : norm_x.hat(x(j)) * get<T>(a.ln_ih, j);
    const float from_h = a.ln_hh == nullptr ? h(j) : norm_h.hat(h(j)) * get<T>(a.ln_hh, j);
    return from_x + get<T>(a.b_ih, j) + from_h + get<T>(a.b_hh, j);
  }
};

struct LstmGates {
  float i, f, g, o;

  template <typename T>
  FASTLM_DEVICE static LstmGates of(const LstmRow<T>& row, int64_t unit) {
    const int64_t n = row.a.hidden;
    return {sigmoid(row.gate(unit)), sigmoid(row.gate(n + unit)), tanhf(row.gate(2 * n + unit)),
            sigmoid(row.gate(3 * n + unit))};
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

// Dynamic shared memory: [6 * hidden] floats with any gain.
template <typename T>
__global__ void __launch_bounds__(kCellThreads, 3) lstm_cell_backward_kernel(LstmCellGradientsCuda args) {
  FASTLM_SHARED(BlockSums, shared);
  FASTLM_DYNAMIC_SHARED(bytes);
  const LstmCellCuda& a = args.cell;
  const int64_t n = a.hidden;
  float *const new_c = reinterpret_cast<float*>(bytes), *const grad_c = new_c + n, *const grad_sum = grad_c + n;
  const LstmRow<T> row(a, blockIdx.x, shared);
  const int64_t start = row.row * n;
  const bool any_norm = a.ln_ih != nullptr || a.ln_hh != nullptr;
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
    for (int k = 0; k < 4; ++k) {
      put<T>(args.grad_sum, 4 * start + k * n + u, sums[k]);
      if (any_norm) grad_sum[k * n + u] = sums[k];
    }
    put<T>(args.grad_h_prev, start + u, of_h * keep_h);
    put<T>(args.grad_c_prev, start + u, of_c * keep_c + grad * gates.f);
  }
  const auto through = [&](const void* gain, const Norm& norm, const void* gates, void* out) {
    if (gain == nullptr) return;
    norm_backward(
        4 * n, norm, [&](int64_t j) { return get<T>(gates, 4 * start + j); },
        [&](int64_t j) { return grad_sum[j] * get<T>(gain, j); },
        [&](int64_t j, float grad) { put<T>(out, 4 * start + j, grad); }, shared);
  };
  if (any_norm) __syncthreads();  // grad_sum is by units, what follows goes by gates
  through(a.ln_ih, row.norm_x, a.gates_x, args.grad_gates_x);
  through(a.ln_hh, row.norm_h, a.gates_h, args.grad_gates_h);
}

template <typename T>
struct GruGates {
  float r, z, n, h_n;  // h_n: what r multiplies

  FASTLM_DEVICE static GruGates of(const GruCellCuda& a, int64_t row, int64_t u) {
    const int64_t start = row * 3 * a.hidden;
    const auto x = [&](int64_t j) { return get<T>(a.gates_x, start + j) + get<T>(a.b_ih, j); };
    const auto h = [&](int64_t j) { return get<T>(a.gates_h, start + j) + get<T>(a.b_hh, j); };
    const int64_t n = a.hidden;
    GruGates gates;
    gates.r = sigmoid(x(u) + h(u));
    gates.z = sigmoid(x(n + u) + h(n + u));
    gates.h_n = h(2 * n + u);
    gates.n = tanhf(x(2 * n + u) + gates.r * gates.h_n);
    return gates;
  }
};

template <typename T>
__global__ void __launch_bounds__(kCellThreads, 3) gru_cell_kernel(GruCellCuda a) {
  const int64_t row = blockIdx.x, start = row * a.hidden;
  for (int64_t u = threadIdx.x; u < a.hidden; u += kCellThreads) {
    const GruGates<T> gates = GruGates<T>::of(a, row, u);
    put<T>(a.h, start + u, (1 - gates.z) * gates.n + gates.z * get<T>(a.h_prev, start + u));
  }
}

template <typename T>
__global__ void __launch_bounds__(kCellThreads, 3) gru_cell_backward_kernel(GruCellGradientsCuda args) {
  const GruCellCuda& a = args.cell;
  const int64_t row = blockIdx.x, start = row * a.hidden, n = a.hidden;
  for (int64_t u = threadIdx.x; u < n; u += kCellThreads) {
    const GruGates<T> gates = GruGates<T>::of(a, row, u);
    const float grad = get<T>(args.grad_h, start + u);
    const float of_z = grad * (get<T>(a.h_prev, start + u) - gates.n) * gates.z * (1 - gates.z);
    const float of_n = grad * (1 - gates.z) * (1 - gates.n * gates.n);
    const float of_r = of_n * gates.h_n * gates.r * (1 - gates.r);
    put<T>(args.grad_gates_x, 3 * start + u, of_r);
    put<T>(args.grad_gates_x, 3 * start + n + u, of_z);
    put<T>(args.grad_gates_x, 3 * start + 2 * n + u, of_n);
    put<T>(args.grad_gates_h, 3 * start + u, of_r);
    put<T>(args.grad_gates_h, 3 * start + n + u, of_z);
    put<T>(args.grad_gates_h, 3 * start + 2 * n + u, of_n * gates.r);
    put<T>(args.grad_h_prev, start + u, grad * gates.z);
  }
}

}  // namespace device
}  // namespace fastlm
