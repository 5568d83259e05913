// Products of a few rows with a weight in GGUF's own layout: every weight crosses the memory bus once.
#include "fastlm/linear.h"

#include "blocks.h"
#include "threads.h"

namespace fastlm {
namespace FASTLM_ISA {
namespace {

// Below this many bytes of weights a thread costs more than it saves.
constexpr int64_t kBytesPerThread = 64 * 1024;

int useful_threads(int64_t bytes, int threads) {
  const int64_t most = bytes / kBytesPerThread + 1;
  return static_cast<int>(most < threads ? most : threads);
}

// --- Integer products -------------------------------------------------------------------------------------------

// See fastlm.reference.linear.quantize_activations.
FASTLM_INLINE void round_input(const float* x, InputBlock& block) {
  vi bits{};  // of the largest magnitude; as integers, NaN > infinity > every number
  for (int i = 0; i < kVectors; ++i) {
    const vi magnitude = as_int(load(x + i * kLanes)) & 0x7fffffff;
    const vi greater = magnitude > bits;
    bits = (greater & magnitude) | (~greater & bits);
  }
  int32_t largest_bits = 0;
  for (int i = 0; i < kLanes; ++i) largest_bits = bits[i] > largest_bits ? bits[i] : largest_bits;
  float largest;
  std::memcpy(&largest, &largest_bits, sizeof(largest));

  const bool finite = largest_bits < 0x7f800000, usable = finite && largest >= 0x1p-100f;
  const float inverse = usable ? 127.0f / largest : 0.0f;
  int32_t codes[kBlock];
  for (int i = 0; i < kBlock; ++i) codes[i] = usable ? static_cast<int32_t>(__builtin_rintf(x[i] * inverse)) : 0;
  for (int i = 0; i < kBlock; ++i) block.codes[i] = static_cast<int8_t>(codes[i]);
  int32_t sum = 0;
  for (int lane = 0; lane < 4; ++lane) {
    int32_t part = 0;
    for (int i = 4 * lane; i < 4 * lane + 4; ++i) part += codes[i] + codes[i + 16];
    block.offsets[lane] = -128 * part;
    sum += part;
  }
  block.scale = usable ? largest / 127.0f : finite ? 0.0f : __builtin_nanf("");
  block.scaled_sum = block.scale * static_cast<float>(sum);
}

// The next `valid` <= kLanes outputs. The row pointers beyond them repeat the last one: work to be thrown away.
struct Group {
  const uint8_t* rows[kLanes];
  int64_t first;
  int valid;
};

// Outputs of `g` for rows m .. m + M - 1 of the input. `x`: all of it, rounded; `ahead`: the memory wanted next, or 0.
template <WeightKind kind, int M>
void integer_tile(const LinearArgs& a, const Group& g, int64_t m0, uintptr_t ahead) {
  constexpr int64_t kBytes = weight_bytes(kind, kBlock);
  const int64_t blocks = a.columns / kBlock;
  const InputBlock* x = a.scratch + m0 * blocks;
  vf sums[M][4] = {}, offsets[M] = {};
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t at = b * kBytes;
    if (ahead != 0)
      for (int64_t line = 0; line < kLanes * kBytes; line += 64)
        __builtin_prefetch(reinterpret_cast<const void*>(ahead + kLanes * at + line));
    vi headers;
    for (int i = 0; i < kLanes; ++i) headers[i] = load_as<int32_t>(g.rows[i] + at);
    const vf scale = from_half(headers);
    const vf scales[4] = {spread<0>(scale), spread<1>(scale), spread<2>(scale), spread<3>(scale)};
    for (int v = 0; v < 4; ++v) {
      vbyte low, high;
      load_codes<kind>(g.rows, v, at, low, high);
      for (int m = 0; m < M; ++m) {
        const InputBlock& input = x[m * blocks + b];
        sums[m][v] += to_float(dot<kind>(low, high, input)) * (scales[v] * input.scale);
      }
    }
    if constexpr (kind != WeightKind::kQ8_0) {
      const vf minimum = kind == WeightKind::kQ4_1 ? from_half(headers >> 16) : scale * -8.0f;
      for (int m = 0; m < M; ++m) offsets[m] += minimum * x[m * blocks + b].scaled_sum;
    }
  }
  const vf bias = a.bias == nullptr ? vf{} : load_partial(a.bias + g.first, g.valid);
  for (int m = 0; m < M; ++m) {
    const vf y = add_quarters(sums[m]) + offsets[m] + bias;
    float* out = a.output + (m0 + m) * a.outputs + g.first;
    if (g.valid == kLanes)
      store(out, y);
    else
      store_partial(out, y, g.valid);
  }
}

template <WeightKind kind>
void integer_linear(const LinearArgs& a) {
  const int64_t row_bytes = weight_bytes(kind, a.columns);
  const uint8_t* weight = static_cast<const uint8_t*>(a.weight);
  const int64_t all = a.rows * a.columns / kBlock;
  const int wanted = useful_threads(row_bytes * a.outputs * a.rows, a.threads);
  parallel(wanted, [&](int thread, int threads, Barrier& barrier) {
    const Range own = share(all, thread, threads);
    for (int64_t i = own.begin; i < own.end; ++i) round_input(a.input + i * kBlock, a.scratch[i]);
    barrier.wait();
    const Range mine = share(a.outputs, thread, threads, kLanes);
    for (int64_t n = mine.begin; n < mine.end; n += kLanes) {
      Group g;
      g.first = n;
      g.valid = static_cast<int>(mine.end - n < kLanes ? mine.end - n : kLanes);
      for (int i = 0; i < kLanes; ++i) g.rows[i] = weight + (n + (i < g.valid ? i : g.valid - 1)) * row_bytes;
      uintptr_t ahead = reinterpret_cast<uintptr_t>(g.rows[0]) + kLanes * row_bytes;
      int64_t m = 0;
      for (; m + 4 <= a.rows; m += 4, ahead = 0) integer_tile<kind, 4>(a, g, m, ahead);
      if (a.rows - m >= 2) integer_tile<kind, 2>(a, g, m, ahead), m += 2, ahead = 0;
      if (a.rows - m >= 1) integer_tile<kind, 1>(a, g, m, ahead);
    }
  });
}

// --- Float products ---------------------------------------------------------------------------------------------

// The last `count` < 32 weights of a row of floats, as 32 with zeros behind them.
template <WeightKind kind>
FASTLM_INLINE void decode_tail(const uint8_t* p, int count, vf (&w)[kVectors]) {
  uint8_t padded[weight_bytes(kind, kBlock)] = {};
  std::memcpy(padded, p, weight_bytes(kind, count));
  decode<kind>(padded, w);
}

// Outputs n .. n + N - 1 of rows m .. m + M - 1. Lanes go along the columns.
template <WeightKind kind, int M, int N>
void float_tile(const LinearArgs& a, int64_t m0, int64_t n0) {
  const int64_t row_bytes = weight_bytes(kind, a.columns), whole = a.columns / kBlock * kBlock;
  const uint8_t* weight = static_cast<const uint8_t*>(a.weight) + n0 * row_bytes;
  const float* x = a.input + m0 * a.columns;
  vf sums[M][N] = {};
  vf w[kVectors];
  for (int64_t k = 0; k < whole; k += kBlock) {
    const uint8_t* block = weight + weight_bytes(kind, k);
    for (int n = 0; n < N; ++n) {
      __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(block) + (n + N) * row_bytes));
      decode<kind>(block + n * row_bytes, w);
      for (int m = 0; m < M; ++m)
        for (int i = 0; i < kVectors; ++i) sums[m][n] += w[i] * load(x + m * a.columns + k + i * kLanes);
    }
  }
  if constexpr (!is_quantized(kind)) {
    const int rest = static_cast<int>(a.columns - whole);
    if (rest != 0) {
      float padded[M][kBlock] = {};
      for (int m = 0; m < M; ++m) std::memcpy(padded[m], x + m * a.columns + whole, rest * sizeof(float));
      for (int n = 0; n < N; ++n) {
        decode_tail<kind>(weight + weight_bytes(kind, whole) + n * row_bytes, rest, w);
        for (int m = 0; m < M; ++m)
          for (int i = 0; i < kVectors; ++i) sums[m][n] += w[i] * load(padded[m] + i * kLanes);
      }
    }
  }
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) {
      const float bias = a.bias == nullptr ? 0.0f : a.bias[n0 + n];
      a.output[(m0 + m) * a.outputs + n0 + n] = reduce_add(sums[m][n]) + bias;
    }
}

// Rows of the input are taken 4 at a time, then 2, then 1: the order of a row's own additions is the same in each.
template <WeightKind kind, int N>
FASTLM_INLINE void float_tiles(const LinearArgs& a, int64_t n) {
  int64_t m = 0;
  for (; m + 4 <= a.rows; m += 4) float_tile<kind, 4, N>(a, m, n);
  if (a.rows - m >= 2) float_tile<kind, 2, N>(a, m, n), m += 2;
  if (a.rows - m >= 1) float_tile<kind, 1, N>(a, m, n);
}

template <WeightKind kind>
void float_linear(const LinearArgs& a) {
  constexpr int kOutputs = 4;
  const int64_t bytes = weight_bytes(kind, a.columns) * a.outputs * a.rows;
  parallel(useful_threads(bytes, a.threads), [&](int thread, int threads, Barrier&) {
    const Range mine = share(a.outputs, thread, threads, kOutputs);
    int64_t n = mine.begin;
    for (; n + kOutputs <= mine.end; n += kOutputs) float_tiles<kind, kOutputs>(a, n);
    for (; n < mine.end; ++n) float_tiles<kind, 1>(a, n);
  });
}

// --- Rows to float ----------------------------------------------------------------------------------------------

template <WeightKind kind>
void dequantize(const DequantizeArgs& a) {
  const int64_t row_bytes = weight_bytes(kind, a.columns), whole = a.columns / kBlock * kBlock;
  parallel(useful_threads(row_bytes * a.rows, a.threads), [&](int thread, int threads, Barrier&) {
    const Range mine = share(a.rows, thread, threads);
    for (int64_t i = mine.begin; i < mine.end; ++i) {
      const int64_t row = a.ids == nullptr ? a.first + i : a.ids[i];
      const uint8_t* from = static_cast<const uint8_t*>(a.weight) + row * row_bytes;
      float* to = a.output + i * a.columns;
      vf w[kVectors];
      for (int64_t k = 0; k < whole; k += kBlock) {
        decode<kind>(from + weight_bytes(kind, k), w);
        for (int v = 0; v < kVectors; ++v) store(to + k + v * kLanes, w[v]);
      }
      if constexpr (!is_quantized(kind)) {
        const int rest = static_cast<int>(a.columns - whole);
        if (rest == 0) continue;
        float padded[kBlock];
        decode_tail<kind>(from + weight_bytes(kind, whole), rest, w);
        for (int v = 0; v < kVectors; ++v) store(padded + v * kLanes, w[v]);
        std::memcpy(to + whole, padded, rest * sizeof(float));
      }
    }
  });
}

}  // namespace

void linear(const LinearArgs& a) {
  switch (a.kind) {
    case WeightKind::kF32: return float_linear<WeightKind::kF32>(a);
    case WeightKind::kF16: return float_linear<WeightKind::kF16>(a);
    case WeightKind::kBF16: return float_linear<WeightKind::kBF16>(a);
    case WeightKind::kQ8_0: return (a.scratch ? integer_linear<WeightKind::kQ8_0> : float_linear<WeightKind::kQ8_0>)(a);
    case WeightKind::kQ4_0: return (a.scratch ? integer_linear<WeightKind::kQ4_0> : float_linear<WeightKind::kQ4_0>)(a);
    case WeightKind::kQ4_1: return (a.scratch ? integer_linear<WeightKind::kQ4_1> : float_linear<WeightKind::kQ4_1>)(a);
  }
}

int64_t dequantize_rows(const DequantizeArgs& a) {
  if (a.ids != nullptr) {
    const int64_t bad = agree([&]() -> int64_t {
      for (int64_t i = 0; i < a.rows; ++i)
        if (a.ids[i] < 0 || a.ids[i] >= a.outputs) return i;
      return -1;
    });
    if (bad >= 0) return bad;
  }
  switch (a.kind) {
    case WeightKind::kF32: dequantize<WeightKind::kF32>(a); break;
    case WeightKind::kF16: dequantize<WeightKind::kF16>(a); break;
    case WeightKind::kBF16: dequantize<WeightKind::kBF16>(a); break;
    case WeightKind::kQ8_0: dequantize<WeightKind::kQ8_0>(a); break;
    case WeightKind::kQ4_0: dequantize<WeightKind::kQ4_0>(a); break;
    case WeightKind::kQ4_1: dequantize<WeightKind::kQ4_1>(a); break;
  }
  return -1;
}

}  // namespace FASTLM_ISA
}  // namespace fastlm
