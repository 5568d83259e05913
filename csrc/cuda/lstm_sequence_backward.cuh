// Device code of the gradients of an LSTM over a sequence, in one launch.
//
// A block owns some units. Backward through a step it makes the gradients of its units' four sums, which all blocks
// need for what follows: the gradient of h, times W_hh's columns of its units, that it keeps. So the blocks meet once a
// step, and what they exchange is the result itself, from which the gradients of all weights follow in one product.
#pragma once

#include "lstm_sequence.cuh"

namespace fastlm {
namespace device {

constexpr int kSequenceWarps = kSequenceThreads / kWarp;

struct LstmSequenceBackwardLaunch {
  LstmSequenceGradientsCuda args;
  unsigned* barrier;
  float* states;         // [2, batch, hidden] gradients of h and c
  int64_t units;         // a block
  int64_t shared_units;  // of these, with weights in shared memory: all, or a multiple of 4
};

// Dynamic shared memory: 4 R floats for each warp and each 4 units, then 4 * hidden elements for each of shared_units.
template <typename T, int R>
__global__ void __launch_bounds__(kSequenceThreads, 1)
    lstm_sequence_backward_kernel(LstmSequenceBackwardLaunch launch) {
  constexpr int V = 4;  // all rows of 4 * hidden are aligned to it
  using P = Pack<T, V>;
  FASTLM_DYNAMIC_SHARED(bytes);
  const LstmSequenceCuda& a = launch.args.sequence;
  const int64_t n = a.hidden, length = 4 * n;
  const Group group{launch.barrier, gridDim.x, blockIdx.x};
  const int64_t begin = blockIdx.x * launch.units, end = begin + launch.units < n ? begin + launch.units : n;
  const int64_t own = end - begin, kept = own < launch.shared_units ? own : launch.shared_units;
  const int warp = int(threadIdx.x) / kWarp;
  float* const partial = reinterpret_cast<float*>(bytes);
  T* const weights = reinterpret_cast<T*>(partial + (launch.units + 3) / 4 * kSequenceWarps * 4 * R);
  const T* const columns = as<T>(launch.args.w_hh_t) + begin * length;
  const T* const exchanged = as<T>(launch.args.grad_sum);
  float *const of_h = launch.states, *const of_c = launch.states + a.batch * n;
  // Each warp's part of the products.
  const int64_t part = (n + kSequenceWarps - 1) / kSequenceWarps * V, from = warp * part;
  const int64_t count = from + part < length ? part : from < length ? length - from : 0;

  for (int64_t i = threadIdx.x; i < kept * n; i += kSequenceThreads)
    reinterpret_cast<P*>(weights)[i] = reinterpret_cast<const P*>(columns)[i];
  for (int64_t i = threadIdx.x; i < a.batch * own; i += kSequenceThreads) {
    const int64_t place = i / own * n + begin + i % own;
    of_h[place] = get<T>(launch.args.grad_h_n, place);
    of_c[place] = get<T>(launch.args.grad_c_n, place);  // read next by this very thread
  }

  for (int64_t step = a.steps - 1; step >= 0; --step) {
    const int64_t t = a.reverse ? a.steps - 1 - step : step, before = a.reverse ? t + 1 : t - 1;
    const int64_t running = running_at(a, t), start = start_of(a, t);
    const int64_t known = step == 0 ? 0 : running_at(a, before);  // rows that ran in the step before
    for (int64_t i = threadIdx.x; i < running * own; i += kSequenceThreads) {
      const int64_t row = i / own, unit = begin + i % own, line = start + row;
      const int64_t place = row * n + unit, at = line * n + unit;
      const float c_prev = row < known ? get<T>(a.cells, (start_of(a, before) + row) * n + unit) : get<T>(a.c0, place);
      const auto sum = [&](int64_t gate) {
        const int64_t j = gate * n + unit;
        return get<T>(a.gates_x, line * length + j) + get<T>(a.b_ih, j) + get<T>(a.gates_h, line * length + j) +
               get<T>(a.b_hh, j);
      };
      const LstmGates gates{sigmoid(sum(0)), sigmoid(sum(1)), tanhf(sum(2)), sigmoid(sum(3))};
      const float squashed = tanhf(gates.f * c_prev + gates.i * gates.g);
      const float keep_h = get<T>(a.zoneout_h, at), keep_c = get<T>(a.zoneout_c, at);
      const float grad_h = of_h[place] + get<T>(launch.args.grad_output, at), grad_c = of_c[place];
      const float new_h = grad_h * (1 - keep_h);
      const float new_c = grad_c * (1 - keep_c) + new_h * gates.o * (1 - squashed * squashed);
      float sums[4];
      gates.gradients(new_c, new_h, c_prev, squashed, sums);
#pragma unroll
      for (int gate = 0; gate < 4; ++gate) put<T>(launch.args.grad_sum, line * length + gate * n + unit, sums[gate]);
      of_h[place] = grad_h * keep_h;
      of_c[place] = grad_c * keep_c + new_c * gates.f;
    }
    group.sync();
    for (int64_t first = 0; first < running; first += R) {
      const int rows = int(running - first < R ? running - first : R);
      const T* const x = exchanged + (start + first) * length + from;
      for (int64_t u = 0; u < own; u += 4) {
        const int units = int(own - u < 4 ? own - u : 4);
        float sums[4 * R] = {};
        if (u < kept)
          multiply<R, V>(weights + u * length + from, length, x, length, rows, count, sums, units);
        else
          multiply<R, V>(columns + u * length + from, length, x, length, rows, count, sums, units);
        constexpr int kLanesPerSum = kWarp / (4 * R);
        const float total = scatter_sums<4 * R>(sums);
        const int lane = threadIdx.x % kWarp;
        if (lane % kLanesPerSum == 0) partial[(u / 4 * kSequenceWarps + warp) * 4 * R + lane / kLanesPerSum] = total;
      }
      __syncthreads();
      for (int64_t i = threadIdx.x; i < rows * own; i += kSequenceThreads) {
        const int64_t row = i / own, u = i % own, place = (first + row) * n + begin + u;
        float total = 0;
        for (int w = 0; w < kSequenceWarps; ++w)
          total += partial[(u / 4 * kSequenceWarps + w) * 4 * R + row * 4 + u % 4];
        of_h[place] += (a.dropout == nullptr ? 1.0f : get<T>(a.dropout, place)) * total;
      }
      __syncthreads();  // the sums may be overwritten, and the gradients are all there
    }
  }
  for (int64_t i = threadIdx.x; i < a.batch * own; i += kSequenceThreads) {
    const int64_t place = i / own * n + begin + i % own;
    put<T>(launch.args.grad_h0, place, of_h[place]);
    put<T>(launch.args.grad_c0, place, of_c[place]);
  }
}

}  // namespace device
}  // namespace fastlm
