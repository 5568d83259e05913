// Products of float rows with a weight matrix packed into panels of four vectors' width, or three.
//
// A packed matrix is [panels][k][4][lanes]: one panel holds 4 * lanes columns of a k-by-n matrix, its values in the
// order in which the product reads them, zeros where n ends inside the panel. In a gate-packed matrix a panel is the
// gates of `lanes` hidden units (four, or [panels][k][3][lanes] for a GRU), so whoever computes a panel has all that
// those units' update needs.
//
// The products are summed in k order in blocks of kBlock, whatever the number of rows: a row's result never depends
// on the rows beside it. (Block sums also keep the error of a long sum near that of a short one.)
//
// Weights are float, or bfloat16 (uint16_t) at half the bytes; rows and sums are float either way. Of bfloat16 two
// values of k lie in the halves of a lane's word, [panels][ceil(k / 2)][4][lanes][2]: a shift and a mask widen them.
#pragma once

#include "convert.h"
#include "simd.h"

namespace fastlm {
namespace FASTLM_ISA {

constexpr int kPanel = 4 * kLanes;  // columns of a panel
constexpr int64_t kBlock = 128;     // a block of a panel stays in the level-1 cache while rows pass over it

// Rows of the register tile: as many as leave registers for a panel's four vectors or a broadcast each.
#if defined(__AVX512F__)
constexpr int kRows = 6;
#elif defined(__AVX2__)
constexpr int kRows = 3;
#elif defined(__aarch64__)
constexpr int kRows = 4;
#else
constexpr int kRows = 2;
#endif

FASTLM_INLINE int64_t panels_for(int64_t columns, int64_t per_panel) { return (columns + per_panel - 1) / per_panel; }

// Rows of a matrix in two pieces: row i is first + i * stride for i < split, rest + i * stride from there on.
struct Rows {
  const float* first;
  const float* rest;
  int64_t split;
  int64_t stride;
  const float* operator[](int64_t i) const { return (i < split ? first : rest) + i * stride; }
};

// Numbers in a panel of k by `columns`.
template <typename W>
FASTLM_INLINE int64_t panel_size(int64_t k, int64_t columns) {
  return (sizeof(W) == 2 ? (k + 1) / 2 * 2 : k) * columns;
}

// A vector of weights of one k, for bfloat16 of two.
FASTLM_INLINE void load_weights(const float* p, vf& first, vf&) { first = load(p); }
FASTLM_INLINE void load_weights(const uint16_t* p, vf& first, vf& second) {
  const vi words = as_int(load_as<vf>(p));
  first = as_float(words << 16);
  second = as_float(words & static_cast<int32_t>(0xffff0000));
}

template <int R, int V>
FASTLM_INLINE void accumulate(vf (&sum)[R][V], const float* const* rows, int64_t k, const vf (&weight)[V]) {
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const vf x = broadcast(rows[r][k]);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sum[r][v] += x * weight[v];
  }
}

// out[r][slot][lanes] += sum over k < n of rows[r][k] * panel[k][v][lanes], for R rows and V vectors. Vector v goes to
// slot v, the last one to slot Last.
//
// With `Fetch` (the first tile to use this part of the panel) the weights are fetched 4 KB ahead, across the pages at
// which the hardware's prefetcher stops; an address beyond the matrix does no harm. Not inlined, since among the
// callers' variables GCC keeps the rows' addresses in memory.
template <int R, bool Fetch, int V, int Last, typename W>
static __attribute__((noinline)) void panel_tile(const float* const* rows, const W* panel, int64_t n, float* out,
                                                 int64_t out_stride) {
  vf sum[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sum[r][v] = vf{};
  constexpr int kSteps = sizeof(W) == 2 ? 2 : 1;  // values of k at a time
  for (int64_t k = 0; k < n; k += kSteps, panel += V * kSteps * kLanes) {
    if (Fetch)
      for (int line = 0; line < V * kSteps * kLanes; line += 64 / sizeof(W))
        __builtin_prefetch(panel + 4096 / sizeof(W) + line);
    vf first[V], second[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) load_weights(panel + v * kSteps * kLanes, first[v], second[v]);
    accumulate(sum, rows, k, first);
    if (kSteps == 2 && k + 1 < n) accumulate(sum, rows, k + 1, second);
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      float* p = out + r * out_stride + (v == V - 1 ? Last : v) * kLanes;
      store(p, load(p) + sum[r][v]);
    }
}

// Picks the tile of `count` <= R rows.
template <int R, int V, int Last, typename W>
FASTLM_INLINE void panel_rows(int64_t count, const float* const* rows, const W* panel, int64_t n, float* out,
                              int64_t out_stride, bool fetch) {
  if constexpr (R > 0) {
    if (count < R) return panel_rows<R - 1, V, Last>(count, rows, panel, n, out, out_stride, fetch);
    if (fetch) return panel_tile<R, true, V, Last>(rows, panel, n, out, out_stride);
    panel_tile<R, false, V, Last>(rows, panel, n, out, out_stride);
  }
}

// out[i][slot][lanes] += row i of `rows` [count, k] times one panel [k][V][lanes]; rows of out are out_stride apart.
template <int V = 4, int Last = V - 1, typename W = float>
static __attribute__((noinline)) void panel_product(const Rows& rows, int64_t count, const W* panel, int64_t k,
                                                    float* out, int64_t out_stride) {
  const int64_t tiles = panels_for(count, kRows);
  for (int64_t begin = 0; begin < k; begin += kBlock) {
    const int64_t n = k - begin < kBlock ? k - begin : kBlock;
    const W* block = panel + begin * V * kLanes;
    for (int64_t i = 0, left = tiles; left > 0; --left) {
      const int64_t tile = panels_for(count - i, left);  // even ones: eight rows are quicker as 4 + 4 than as 6 + 2
      const float* at[kRows];
      for (int64_t r = 0; r < tile; ++r) at[r] = rows[i + r] + begin;
      panel_rows<kRows, V, Last>(tile, at, block, n, out + i * out_stride, out_stride, i == 0);
      i += tile;
    }
  }
}

}  // namespace FASTLM_ISA
}  // namespace fastlm
