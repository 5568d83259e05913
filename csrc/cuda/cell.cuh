// What the device code of the recurrent cells' pointwise halves has in common. A block takes a row.
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

// One row of the products that a cell of G gates adds up, each normalised where it has a gain.
template <typename T, int G, typename Cell>
struct GateRow {
  const Cell& a;
  const int64_t row, first;
  Norm norm_x, norm_h;

  FASTLM_DEVICE GateRow(const Cell& args, int64_t row_, BlockSums& shared)
      : a(args), row(row_), first(row_ * G * args.hidden) {
    const int64_t n = G * a.hidden;
    if (a.ln_ih != nullptr) norm_x = Norm::of(n, [this](int64_t j) { return x(j); }, shared);
    if (a.ln_hh != nullptr) norm_h = Norm::of(n, [this](int64_t j) { return h(j); }, shared);
  }
  FASTLM_DEVICE float x(int64_t j) const { return get<T>(a.gates_x, first + j); }
  FASTLM_DEVICE float h(int64_t j) const { return get<T>(a.gates_h, first + j); }
  // N(gates_x) + b_ih and N(gates_h) + b_hh.
  FASTLM_DEVICE float from_x(int64_t j) const {
    return (a.ln_ih == nullptr ? x(j) : norm_x.hat(x(j)) * get<T>(a.ln_ih, j)) + get<T>(a.b_ih, j);
  }
  FASTLM_DEVICE float from_h(int64_t j) const {
    return (a.ln_hh == nullptr ? h(j) : norm_h.hat(h(j)) * get<T>(a.ln_hh, j)) + get<T>(a.b_hh, j);
  }

  // Writes the gradients of the products that are normalised, given those of from_x and from_h [rows, G * hidden], which
  // the block has just written.
  FASTLM_DEVICE void backward(const void* of_x, const void* of_h, void* grad_gates_x, void* grad_gates_h,
                              BlockSums& shared) const {
    if (a.ln_ih == nullptr && a.ln_hh == nullptr) return;
    __syncthreads();  // they were written by units, and are read by gates
    const int64_t n = G * a.hidden;
    if (a.ln_ih != nullptr)
      norm_backward(
          n, norm_x, [this](int64_t j) { return x(j); },
          [&](int64_t j) { return get<T>(of_x, first + j) * get<T>(a.ln_ih, j); },
          [&](int64_t j, float grad) { put<T>(grad_gates_x, first + j, grad); }, shared);
    if (a.ln_hh != nullptr)
      norm_backward(
          n, norm_h, [this](int64_t j) { return h(j); },
          [&](int64_t j) { return get<T>(of_h, first + j) * get<T>(a.ln_hh, j); },
          [&](int64_t j, float grad) { put<T>(grad_gates_h, first + j, grad); }, shared);
  }
};

}  // namespace device
}  // namespace fastlm
