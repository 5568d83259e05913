// Products of rows with weights in GGUF's formats: float arithmetic here, integers in linear_integer.h, linear_tiles.h.
#include "fastlm/linear.h"

#include "blocks.h"
#include "linear_integer.h"
#include "linear_parts.h"
#include "linear_tiles.h"
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

// Lanes of a, then of b, in groups of `width` lanes: each group's first half plus its second, of a and b in turn.
template <int width>
FASTLM_INLINE vf add_halves(vf a, vf b) {
  vi first;
  for (int i = 0; i < kLanes; ++i)
    first[i] = i / width * width + i % (width / 2) + (i % width < width / 2 ? 0 : kLanes);
  return __builtin_shuffle(a, b, first) + __builtin_shuffle(a, b, first + width / 2);
}

// The sum of each of `count` vectors (a power of two, at most kLanes), of v[i] in lane i * kLanes / count. To the bit
// what reduce_add gives, with a third of the instructions.
template <int count, int width = kLanes>
FASTLM_INLINE vf sums_across(const vf* v) {
  if constexpr (width == 1) {
    return v[0];
  } else {
    constexpr int left = count == 1 ? 1 : count / 2;
    vf halves[left];
    for (int i = 0; i < left; ++i) halves[i] = add_halves<width>(v[i], v[i + count / 2]);
    return sums_across<left, width / 2>(halves);
  }
}

// One block of columns of N rows of weights times M rows of input.
template <WeightKind kind, int M, int N>
FASTLM_INLINE void float_block(const uint8_t* block, int64_t row_bytes, const float* x, int64_t columns,
                               vf (&sums)[M * N]) {
  if constexpr (is_quantized(kind) || M == 1) {
    for (int n = 0; n < N; ++n) {
      vf w[kVectors];
      decode<kind>(block + n * row_bytes, w);
      for (int m = 0; m < M; ++m)
        for (int i = 0; i < kVectors; ++i) sums[m * N + n] += w[i] * load(x + m * columns + i * kLanes);
    }
  } else {
    for (int i = 0; i < kVectors; ++i) {
      vf w[N];
      for (int n = 0; n < N; ++n) w[n] = load_floats<kind>(block + n * row_bytes + weight_bytes(kind, i * kLanes));
      for (int m = 0; m < M; ++m) {
        vf input = load(x + m * columns + i * kLanes);
#if defined(__x86_64__)
        asm("" : "+v"(input));  // or GCC loads it again for each of the N products
#endif
        for (int n = 0; n < N; ++n) sums[m * N + n] += w[n] * input;
      }
    }
  }
}

// Outputs of a tile: each fetches the weights that many rows ahead, into level 2, which takes more lines at a time than
// level 1 does.
constexpr int kTile = 4;
constexpr int kOutputsOfMost = kLanes == 16 ? 2 : 1;  // of eight rows: what the registers hold

// Outputs n0 .. n0 + N - 1 of rows m0 .. m0 + M - 1. Lanes go along the columns. This is number `pass` of `passes` over
// these weights, each of which fetches some of those to come, so that memory is never idle.
template <WeightKind kind, int M, int N>
void float_tile(const LinearArgs& a, const LinearWeight& out, int64_t m0, int64_t n0, int64_t passes, int64_t pass) {
  const int64_t row_bytes = weight_bytes(kind, a.columns), whole = a.columns / kBlock * kBlock;
  const uint8_t* weight = static_cast<const uint8_t*>(out.weight) + n0 * row_bytes;
  const float* x = a.input + m0 * a.columns;
  const int64_t next = a.ahead != 0 ? a.ahead : kTile * row_bytes;
  vf sums[M * N] = {};
  // Half precision has one line in a block, and lines are fetched in pairs anyway: the first pass fetches all.
  const int64_t every = weight_bytes(kind, kBlock) > 64 ? passes : 1;
  int64_t skip = every == 1 && pass != 0 ? whole : pass;
  for (int64_t k = 0; k < whole; k += kBlock) {
    const uint8_t* block = weight + weight_bytes(kind, k);
    if (M == 1 || skip-- == 0) {  // one row has no time to choose (7%)
      skip = every - 1;
      for (int n = 0; n < N; ++n) {
        const uintptr_t ahead = reinterpret_cast<uintptr_t>(block) + n * row_bytes + next;
        for (int64_t line = 0; line < weight_bytes(kind, kBlock); line += 64)
          __builtin_prefetch(reinterpret_cast<const void*>(ahead + line), 0, 2);
      }
    }
    float_block<kind, M, N>(block, row_bytes, x + k, a.columns, sums);
  }
  if constexpr (!is_quantized(kind)) {
    const int rest = static_cast<int>(a.columns - whole);
    if (rest != 0) {
      float padded[M][kBlock] = {};
      vf w[kVectors];
      for (int m = 0; m < M; ++m) std::memcpy(padded[m], x + m * a.columns + whole, rest * sizeof(float));
      for (int n = 0; n < N; ++n) {
        decode_tail<kind>(weight + weight_bytes(kind, whole) + n * row_bytes, rest, w);
        for (int m = 0; m < M; ++m)
          for (int i = 0; i < kVectors; ++i) sums[m * N + n] += w[i] * load(padded[m] + i * kLanes);
      }
    }
  }
  constexpr int kTogether = M * N < kLanes ? M * N : kLanes, kApart = kLanes / kTogether;
  float totals[M * N / kTogether][kLanes];
  for (int i = 0; i < M * N / kTogether; ++i) store(totals[i], sums_across<kTogether>(sums + i * kTogether));
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) {
      const int i = m * N + n;
      const float bias = out.bias == nullptr ? 0.0f : out.bias[n0 + n];
      out.output[(m0 + m) * out.outputs + n0 + n] = totals[i / kTogether][i % kTogether * kApart] + bias;
    }
}

// Outputs n .. n + G - 1 of as many rows from m on as make whole tiles of M by at most N.
template <WeightKind kind, int M, int N, int G>
FASTLM_INLINE void float_tiles(const LinearArgs& a, const LinearWeight& out, int64_t n, int64_t passes, int64_t& pass,
                               int64_t& m) {
  constexpr int kOutputs = N < G ? N : G;
  for (; m + M <= a.rows; m += M, ++pass)
    for (int i = 0; i < G; i += kOutputs) float_tile<kind, M, kOutputs>(a, out, m, n + i, passes, pass);
}

// Outputs n .. n + G - 1. Input rows are taken several at a time; however many, a row's own additions are in one order.
// Fewer kinds of tiles, which take long to compile, for the last outputs and for Q kinds that are not rounded for.
template <WeightKind kind, int G>
FASTLM_INLINE void float_group(const LinearArgs& a, const LinearWeight& out, int64_t n) {
  constexpr int kMost = G < kTile ? 1 : is_quantized(kind) ? 4 : 8;
  const int64_t rows = a.rows, four = rows % 8 / 4, two = rows % 4 / 2;
  const int64_t passes = kMost == 1 ? rows : kMost == 4 ? rows / 4 + rows % 4 : rows / 8 + four + two + rows % 2;
  int64_t m = 0, pass = 0;
  if constexpr (kMost >= 8) float_tiles<kind, 8, kOutputsOfMost, G>(a, out, n, passes, pass, m);
  if constexpr (kMost >= 4) float_tiles<kind, 4, kTile, G>(a, out, n, passes, pass, m);
  if constexpr (kMost >= 8) float_tiles<kind, 2, kTile, G>(a, out, n, passes, pass, m);
  float_tiles<kind, 1, kTile, G>(a, out, n, passes, pass, m);
}

template <WeightKind kind>
void float_rows(const LinearArgs& a, const LinearWeight& out, int64_t begin, int64_t end) {
  int64_t n = begin;
  for (; n + kTile <= end; n += kTile) float_group<kind, kTile>(a, out, n);
  for (; n < end; ++n) float_group<kind, 1>(a, out, n);
}

// --- Integer products -------------------------------------------------------------------------------------------

// Outputs begin .. end - 1 of all rows. The order of a row's own additions is the same in each tile.
template <WeightKind kind, Rounding rounding>
void integer_rows(const LinearArgs& a, const LinearWeight& w, int64_t begin, int64_t end) {
  // A tile's inputs stay in the level-1 cache while these weights, which level 2 keeps, go past them.
  constexpr int64_t kCached = 256 * 1024;
  int64_t step = kCached / (panel_bytes(kind, a.columns) + 1) * kLanes;
  step = step < kLanes ? kLanes : step;
  for (int64_t n = begin; n < end; n += step) {
    const int64_t last = n + step < end ? n + step : end;
    int64_t m = 0;
    if constexpr (rounding == Rounding::kBits15) {
      tiled_products<kind, 2>(a, w, n, last, m);
      tiled_products<kind, 1>(a, w, n, last, m);
    }
    if constexpr (kLanes == 16) integer_tiles<kind, rounding, 8>(a, w, n, last, m);
    integer_tiles<kind, rounding, 4>(a, w, n, last, m);
    integer_tiles<kind, rounding, 2>(a, w, n, last, m);
    integer_tiles<kind, rounding, 1>(a, w, n, last, m);
  }
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
      return integer_rows<kind, rounding>(a, w, begin, end);                    \
    else                                                                        \
      return float_rows<kind>(a, w, begin, end);
      FASTLM_CASE(WeightKind::kQ8_0)
      FASTLM_CASE(WeightKind::kQ4_0)
      FASTLM_CASE(WeightKind::kQ4_1)
#undef FASTLM_CASE
  }
}

template <Rounding rounding>
void round_share(const LinearArgs& a, int thread, int threads) {
  if constexpr (rounding != Rounding::kNone) {
    const int64_t blocks = a.columns / kBlock, tiled = rows_in_tiles(a);
    const Range tiles = share((tiled + kTileRows - 1) / kTileRows * blocks, thread, threads);
    for (int64_t i = tiles.begin; i < tiles.end; ++i)
      round_tile(a, i / blocks * kTileRows, i % blocks, reinterpret_cast<InputTile*>(a.scratch)[i]);
    const Range own = share((a.rows - tiled) * blocks, thread, threads);
    for (int64_t i = tiled * blocks + own.begin; i < tiled * blocks + own.end; ++i)
      round_input<rounding>(a.input + i * kBlock, a.scratch[i]);
  }
}

template <Rounding rounding>
void linear_with(const LinearArgs& a) {
  int64_t bytes = 0;
  for (int i = 0; i < a.count; ++i) bytes += weight_bytes(a.weights[i].kind, a.columns) * a.weights[i].outputs * a.rows;
  parallel(useful_threads(bytes, a.threads), [&](int thread, int threads, Barrier& barrier) {
    round_share<rounding>(a, thread, threads);
    if constexpr (rounding != Rounding::kNone) barrier.wait();
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

void round_inputs(const LinearArgs& a, int thread, int threads) {
  switch (a.rounding) {
    case Rounding::kNone: return;
    case Rounding::kBits8: return round_share<Rounding::kBits8>(a, thread, threads);
    case Rounding::kBits15: return round_share<Rounding::kBits15>(a, thread, threads);
  }
}

void linear_outputs(const LinearArgs& a, const LinearWeight& w, int64_t begin, int64_t end) {
  switch (a.rounding) {
    case Rounding::kNone: return products<Rounding::kNone>(a, w, begin, end);
    case Rounding::kBits8: return products<Rounding::kBits8>(a, w, begin, end);
    case Rounding::kBits15: return products<Rounding::kBits15>(a, w, begin, end);
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
