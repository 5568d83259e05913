// Device code of the LSTM with its products: one step for few rows, and a whole sequence in one launch.
//
// A warp makes the four gates of one unit for R rows at once: its lanes divide the length of the products, 4 * R sums a
// lane, and a butterfly of shuffles that halves the sums at every turn leaves each sum complete in one lane.
#pragma once

#include "lstm_cell.cuh"

namespace fastlm {
namespace device {

constexpr int kStepThreads = 128, kSequenceThreads = 256;

// V neighbouring elements, read at once.
template <typename T, int V>
struct alignas(sizeof(T) * V) Pack {
  T values[V];
};

// sums[r * 4 + gate] += w[gate] . x[r] over n elements, a multiple of V; the rows of w are `w_stride` apart, those of x
// `x_stride`. Rows from `rows` on repeat the first and mean nothing, and so do those of w from `gates` on.
template <int R, int V, typename T>
FASTLM_DEVICE void multiply(const T* w, int64_t w_stride, const T* x, int64_t x_stride, int rows, int64_t n,
                            float (&sums)[4 * R], int gates = 4) {
  using P = Pack<T, V>;
  for (int64_t k = threadIdx.x % kWarp * V; k < n; k += kWarp * V) {
    P of_w[4];
#pragma unroll
    for (int gate = 0; gate < 4; ++gate)
      of_w[gate] = *reinterpret_cast<const P*>(w + (gate < gates ? gate : 0) * w_stride + k);
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const P of_x = *reinterpret_cast<const P*>(x + (r < rows ? r : 0) * x_stride + k);
#pragma unroll
      for (int v = 0; v < V; ++v)
#pragma unroll
        for (int gate = 0; gate < 4; ++gate)
          sums[r * 4 + gate] += to_float(of_w[gate].values[v]) * to_float(of_x.values[v]);
    }
  }
}

// The warp's total of sums[i] in the lanes of which lane / (32 / N) is i. At each turn half of the sums go to the lane
// opposite, for half of what it has; once one is left, the lanes that share it add up what they have.
template <int N, int Lanes = kWarp / 2>
FASTLM_DEVICE float scatter_sums(float (&sums)[N]) {
  if constexpr (Lanes == 0) {
    return sums[0];
  } else if constexpr (N == 1) {
    float rest[1] = {sums[0] + __shfl_xor_sync(kAll, sums[0], Lanes)};
    return scatter_sums<1, Lanes / 2>(rest);
  } else {
    const bool upper = threadIdx.x & Lanes;
    float rest[N / 2];
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      const float sent = upper ? sums[i] : sums[i + N / 2], kept = upper ? sums[i + N / 2] : sums[i];
      rest[i] = kept + __shfl_xor_sync(kAll, sent, Lanes);
    }
    return scatter_sums<N / 2, Lanes / 2>(rest);
  }
}

// What a lane has after the products: the sums of the four gates for one row, several lanes alike.
struct RowSums {
  int row;       // of the R
  bool first;    // of the lanes that have this row
  float gates[4];
};
template <int R>
FASTLM_DEVICE RowSums row_sums(float (&sums)[4 * R]) {
  constexpr int kLanesPerSum = kWarp / (4 * R);
  const float own = scatter_sums<4 * R>(sums);
  const int lane = threadIdx.x % kWarp;
  RowSums found;
  found.row = lane / (4 * kLanesPerSum);
  found.first = lane % (4 * kLanesPerSum) == 0;
#pragma unroll
  for (int gate = 0; gate < 4; ++gate)
    found.gates[gate] = __shfl_sync(kAll, own, (found.row * 4 + gate) * kLanesPerSum);
  return found;
}

// The new c and h before zoneout.
struct NewState {
  float h, c;
};
FASTLM_DEVICE NewState lstm_state(const float (&gates)[4], float c_prev) {
  const float c = sigmoid(gates[1]) * c_prev + sigmoid(gates[0]) * tanhf(gates[2]);
  return {sigmoid(gates[3]) * tanhf(c), c};
}

// A warp for each unit and R rows. V is 1 where rows of the weights are not aligned.
template <typename T, int R, int V>
__global__ void __launch_bounds__(kStepThreads, 4) lstm_step_kernel(LstmStepCuda a) {
  const int64_t unit = blockIdx.x * int64_t{kStepThreads / kWarp} + threadIdx.x / kWarp;
  if (unit >= a.hidden) return;
  for (int64_t first = 0; first < a.batch; first += R) {
    const int rows = int(a.batch - first < R ? a.batch - first : R);
    float sums[4 * R] = {};
    multiply<R, V>(as<T>(a.w_ih) + unit * a.inputs, a.hidden * a.inputs, as<T>(a.x) + first * a.inputs, a.inputs, rows,
                   a.inputs, sums);
    multiply<R, V>(as<T>(a.w_hh) + unit * a.hidden, a.hidden * a.hidden, as<T>(a.h_prev) + first * a.hidden, a.hidden,
                   rows, a.hidden, sums);
    RowSums found = row_sums<R>(sums);
    if (!found.first || found.row >= rows) continue;
#pragma unroll
    for (int gate = 0; gate < 4; ++gate)
      found.gates[gate] += get<T>(a.b_ih, gate * a.hidden + unit) + get<T>(a.b_hh, gate * a.hidden + unit);
    const int64_t place = (first + found.row) * a.hidden + unit;
    const NewState state = lstm_state(found.gates, get<T>(a.c_prev, place));
    put<T>(a.h, place, state.h);
    put<T>(a.c, place, state.c);
  }
}

FASTLM_DEVICE int64_t running_at(const LstmSequenceCuda& a, int64_t t) {
  return a.running == nullptr ? a.batch : a.running[t];
}
FASTLM_DEVICE int64_t start_of(const LstmSequenceCuda& a, int64_t t) {
  return a.starts == nullptr ? t * a.batch : a.starts[t];
}

struct LstmSequenceLaunch {
  LstmSequenceCuda args;
  unsigned* barrier;
  float* states;         // [2, batch, hidden] h and c
  void* exchanged;       // [2, batch, stride] h times the dropout mask, for the next step; of the storage
  int64_t stride;        // hidden, rounded up to whole packs; what is beyond hidden is zero
  int64_t units;         // a block
  int64_t shared_units;  // of these, with weights in shared memory
};

// Dynamic shared memory: R * stride elements for h, then 4 * stride for each of shared_units.
template <typename T, int R>
__global__ void __launch_bounds__(kSequenceThreads, 1) lstm_sequence_kernel(LstmSequenceLaunch launch) {
  constexpr int V = 16 / sizeof(T);
  FASTLM_DYNAMIC_SHARED(bytes);
  const LstmSequenceCuda& a = launch.args;
  const int64_t n = a.hidden, stride = launch.stride;
  const Group group{launch.barrier, gridDim.x, blockIdx.x};
  const int64_t begin = blockIdx.x * launch.units, end = begin + launch.units < n ? begin + launch.units : n;
  T* const tile = reinterpret_cast<T*>(bytes);
  T* const weights = tile + R * stride;
  T* const exchanged = static_cast<T*>(launch.exchanged);
  float *const all_h = launch.states, *const all_c = launch.states + a.batch * n;
  const int64_t own = end - begin, kept = own < launch.shared_units ? own : launch.shared_units;

  for (int64_t i = threadIdx.x; i < kept * 4 * stride; i += kSequenceThreads) {
    const int64_t unit = begin + i / (4 * stride), gate = i / stride % 4, k = i % stride;
    from_float(k < n ? get<T>(a.w_hh, (gate * n + unit) * n + k) : 0.0f, &weights[i]);
  }
  // Both places for exchange, since rows that begin later, or have ended, stay as they are.
  for (int64_t i = threadIdx.x; i < a.batch * own; i += kSequenceThreads) {
    const int64_t row = i / own, unit = begin + i % own, place = row * n + unit;
    all_h[place] = get<T>(a.h0, place);
    all_c[place] = get<T>(a.c0, place);
    const float mask = a.dropout == nullptr ? 1.0f : get<T>(a.dropout, place);
    for (int side = 0; side < 2; ++side)
      from_float(mask * all_h[place], &exchanged[(side * a.batch + row) * stride + unit]);
  }
  if (group.rank == 0)
    for (int64_t i = threadIdx.x; i < 2 * a.batch * (stride - n); i += kSequenceThreads)
      from_float(0.0f, &exchanged[i / (stride - n) * stride + n + i % (stride - n)]);
  group.sync();

  for (int64_t step = 0; step < a.steps; ++step) {
    const int64_t t = a.reverse ? a.steps - 1 - step : step;
    const int64_t running = running_at(a, t), start = start_of(a, t);
    const T* const from = exchanged + (step & 1) * a.batch * stride;
    T* const to = exchanged + (1 - (step & 1)) * a.batch * stride;
    for (int64_t first = 0; first < running; first += R) {
      const int rows = int(running - first < R ? running - first : R);
      using P = Pack<T, V>;
      __syncthreads();  // the tile before this one has been read
      for (int64_t i = threadIdx.x; i < rows * stride / V; i += kSequenceThreads)
        reinterpret_cast<P*>(tile)[i] = reinterpret_cast<const P*>(from + first * stride)[i];
      __syncthreads();
      for (int64_t u = threadIdx.x / kWarp; u < own; u += kSequenceThreads / kWarp) {
        const int64_t unit = begin + u;
        float sums[4 * R] = {};
        if (u < kept)
          multiply<R, V>(weights + u * 4 * stride, stride, tile, stride, rows, stride, sums);
        else
          multiply<R, 1>(as<T>(a.w_hh) + unit * n, n * n, tile, stride, rows, n, sums);
        RowSums found = row_sums<R>(sums);
        if (!found.first || found.row >= rows) continue;
        const int64_t row = first + found.row, line = start + row, place = row * n + unit;
#pragma unroll
        for (int gate = 0; gate < 4; ++gate) {
          const int64_t j = gate * n + unit;
          put<T>(a.gates_h, line * 4 * n + j, found.gates[gate]);
          found.gates[gate] += get<T>(a.gates_x, line * 4 * n + j) + get<T>(a.b_ih, j) + get<T>(a.b_hh, j);
        }
        const float h_prev = all_h[place], c_prev = all_c[place];
        const NewState fresh = lstm_state(found.gates, c_prev);
        const float h = fresh.h + get<T>(a.zoneout_h, line * n + unit) * (h_prev - fresh.h);
        const float c = fresh.c + get<T>(a.zoneout_c, line * n + unit) * (c_prev - fresh.c);
        all_h[place] = h;
        all_c[place] = c;
        put<T>(a.output, line * n + unit, h);
        put<T>(a.cells, line * n + unit, c);
        from_float((a.dropout == nullptr ? 1.0f : get<T>(a.dropout, place)) * h, &to[row * stride + unit]);
      }
    }
    group.sync();
  }
  for (int64_t i = threadIdx.x; i < a.batch * own; i += kSequenceThreads) {
    const int64_t place = i / own * n + begin + i % own;
    put<T>(a.h_n, place, all_h[place]);
    put<T>(a.c_n, place, all_c[place]);
  }
}

}  // namespace device
}  // namespace fastlm
