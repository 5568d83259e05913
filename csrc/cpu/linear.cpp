// Products of rows with weights in GGUF's formats: float arithmetic here, integers in linear_integer.h.
#include "fastlm/linear.h"

#include "blocks.h"
#include "linear_integer.h"
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
void float_tile(const LinearArgs& a, const LinearWeight& out, int64_t m0, int64_t n0) {
  const int64_t row_bytes = weight_bytes(kind, a.columns), whole = a.columns / kBlock * kBlock;
  const uint8_t* weight = static_cast<const uint8_t*>(out.weight) + n0 * row_bytes;
  const float* x = a.input + m0 * a.columns;
  vf sums[M][N] = {};
  vf w[kVectors];
  for (int64_t k = 0; k < whole; k += kBlock) {
    const uint8_t* block = weight + weight_bytes(kind, k);
    for (int n = 0; n < N; ++n) {
      const uintptr_t ahead = reinterpret_cast<uintptr_t>(block) + (n + N) * row_bytes;
      for (int64_t line = 0; line < weight_bytes(kind, kBlock); line += 64)
        __builtin_prefetch(reinterpret_cast<const void*>(ahead + line));
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
      const float bias = out.bias == nullptr ? 0.0f : out.bias[n0 + n];
      out.output[(m0 + m) * out.outputs + n0 + n] = reduce_add(sums[m][n]) + bias;
    }
}

// Rows of the input are taken 4 at a time, then 2, then 1: the order of a row's own additions is the same in each.
template <WeightKind kind, int N>
FASTLM_INLINE void float_tiles(const LinearArgs& a, const LinearWeight& out, int64_t n) {
  int64_t m = 0;
  for (; m + 4 <= a.rows; m += 4) float_tile<kind, 4, N>(a, out, m, n);
  if (a.rows - m >= 2) float_tile<kind, 2, N>(a, out, m, n), m += 2;
  if (a.rows - m >= 1) float_tile<kind, 1, N>(a, out, m, n);
}

template <WeightKind kind>
void float_rows(const LinearArgs& a, const LinearWeight& out, int64_t begin, int64_t end) {
  constexpr int kOutputs = 4;
  int64_t n = begin;
  for (; n + kOutputs <= end; n += kOutputs) float_tiles<kind, kOutputs>(a, out, n);
  for (; n < end; ++n) float_tiles<kind, 1>(a, out, n);
}

// --- The whole --------------------------------------------------------------------------------------------------

// Calls f(weight, begin, end) with the outputs that are this thread's, out of those of all weights.
template <typename F>
FASTLM_INLINE void own_outputs(const LinearArgs& a, int thread, int threads, const F& f) {
  int64_t panels = 0;
  for (int i = 0; i < a.count; ++i) panels += (a.weights[i].outputs + kLanes - 1) / kLanes;
  const Range mine = share(panels, thread, threads);
  int64_t before = 0;
  for (int i = 0; i < a.count; ++i) {
    const LinearWeight& w = a.weights[i];
    const int64_t own = (w.outputs + kLanes - 1) / kLanes;
    const int64_t begin = mine.begin > before ? mine.begin - before : 0;
    const int64_t end = mine.end - before < own ? mine.end - before : own;
    before += own;
    if (begin < end) f(w, begin * kLanes, end * kLanes < w.outputs ? end * kLanes : w.outputs);
  }
}

template <Rounding rounding>
void products(const LinearArgs& a, const LinearWeight& w, int64_t begin, int64_t end) {
  constexpr bool integer = rounding != Rounding::kNone;
  switch (w.kind) {
    case WeightKind::kF32: return float_rows<WeightKind::kF32>(a, w, begin, end);
    case WeightKind::kF16: return float_rows<WeightKind::kF16>(a, w, begin, end);
    case WeightKind::kBF16: return float_rows<WeightKind::kBF16>(a, w, begin, end);
#define FASTLM_CASE(kind)                                                       \
  case kind:                                                                    \
    if constexpr (integer)                                                      \
      return integer_rows<kind, rounding>(a, w, begin, end);          \
    else                                                                        \
      return float_rows<kind>(a, w, begin, end);
      FASTLM_CASE(WeightKind::kQ8_0)
      FASTLM_CASE(WeightKind::kQ4_0)
      FASTLM_CASE(WeightKind::kQ4_1)
#undef FASTLM_CASE
  }
}

template <Rounding rounding>
void linear_with(const LinearArgs& a) {
  const int64_t blocks = a.columns / kBlock;
  int64_t bytes = 0;
  for (int i = 0; i < a.count; ++i) bytes += weight_bytes(a.weights[i].kind, a.columns) * a.weights[i].outputs * a.rows;
  parallel(useful_threads(bytes, a.threads), [&](int thread, int threads, Barrier& barrier) {
    if constexpr (rounding != Rounding::kNone) {
      const Range own = share(a.rows * blocks, thread, threads);
      for (int64_t i = own.begin; i < own.end; ++i) round_input<rounding>(a.input + i * kBlock, a.scratch[i]);
      barrier.wait();
    }
    own_outputs(a, thread, threads, [&](const LinearWeight& w, int64_t begin, int64_t end) {
      products<rounding>(a, w, begin, end);
    });
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
  switch (a.rounding) {
    case Rounding::kNone: return linear_with<Rounding::kNone>(a);
    case Rounding::kBits8: return linear_with<Rounding::kBits8>(a);
    case Rounding::kBits15: return linear_with<Rounding::kBits15>(a);
  }
}

void interleave(const Interleave& a) {
  const int64_t row_bytes = weight_bytes(a.kind, a.columns), block_bytes = weight_bytes(a.kind, kBlock);
  const int64_t blocks = a.columns / kBlock, header = a.kind == WeightKind::kQ4_1 ? 4 : 2;
  const uint32_t flip = a.kind == WeightKind::kQ8_0 && kAddedToBytes != 0 ? 0x80808080u : 0;
  const int64_t panels = (a.outputs + kLanes - 1) / kLanes;
  parallel(useful_threads(row_bytes * a.outputs, a.threads), [&](int thread, int threads, Barrier&) {
    const Range mine = share(panels, thread, threads);
    for (int64_t p = mine.begin; p < mine.end; ++p)
      for (int64_t b = 0; b < blocks; ++b) {
        uint8_t* to = a.packed + (p * blocks + b) * kLanes * block_bytes;
        for (int lane = 0; lane < kLanes; ++lane) {
          const int64_t row = p * kLanes + lane;
          uint8_t block[weight_bytes(WeightKind::kQ8_0, kBlock)] = {};
          if (row < a.outputs)
            std::memcpy(block, static_cast<const uint8_t*>(a.weight) + row * row_bytes + b * block_bytes, block_bytes);
          for (int64_t half = 0; half < header; half += 2)
            std::memcpy(to + half * kLanes + 2 * lane, block + half, 2);
          for (int64_t at = header; at < block_bytes; at += 4) {
            const uint32_t word = load_as<uint32_t>(block + at) ^ flip;
            std::memcpy(to + header * kLanes + (at - header) * kLanes + 4 * lane, &word, 4);
          }
        }
      }
  });
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
