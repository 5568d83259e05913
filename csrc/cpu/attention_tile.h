// Small matrix products for attention, on matrices that lie where they are: nothing is packed.
//
// Scores are kept transposed, [key][query], with vectors along the queries. Then keys and values are read as they are
// stored, one broadcast float or one vector along the features at a time, the softmax needs no sum across a vector,
// and only the queries, once per block of them, are transposed.
#pragma once

#include <utility>

#include "simd.h"

namespace fastlm {
namespace FASTLM_ISA {

// The register tile: as many sums as leave room for a row of vectors.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTileRows = 6, kTileVectors = 4;
#elif defined(__AVX2__)
constexpr int kTileRows = 6, kTileVectors = 2;
#else
constexpr int kTileRows = 4, kTileVectors = 2;
#endif

// One product of an [rows, n] matrix a and an [n, vectors * kLanes] matrix b.
struct Product {
  const float* a;  // element (r, i) at a[r * a_stride + i], or a[r + i * a_stride] where `Across`
  int64_t a_stride;
  const float* b;
  int64_t b_stride;
  int64_t n;
  float* c;
  int64_t c_stride;
  const float* keep;  // c[r] = keep[r] * c[r] + (a b)[r]; null: c = a b
};

template <int R, int W, bool Across>
static __attribute__((noinline)) void product_tile(const Product& p, int64_t row, int64_t column) {
  vf sum[R][W];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w) sum[r][w] = vf{};
  const int64_t a_stride = p.a_stride, b_stride = p.b_stride;
  const float* a = p.a + (Across ? row : row * a_stride);
  const float* b = p.b + column;
  for (int64_t i = 0; i < p.n; ++i, a += Across ? a_stride : 1, b += b_stride) {
    vf y[W];
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w) y[w] = load(b + w * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const vf x = broadcast(a[Across ? r : r * a_stride]);
#pragma GCC unroll 4
      for (int w = 0; w < W; ++w) sum[r][w] += x * y[w];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w) {
      float* c = p.c + (row + r) * p.c_stride + column + w * kLanes;
      store(c, p.keep != nullptr ? load(c) * p.keep[row + r] + sum[r][w] : sum[r][w]);
    }
}

template <int R, bool Across>
FASTLM_INLINE void product_rows(const Product& p, int64_t row, int vectors) {
  int64_t column = 0;
  for (int groups = (vectors + kTileVectors - 1) / kTileVectors; groups > 0; --groups) {
    const int width = (vectors + groups - 1) / groups;  // even ones: 5 vectors are quicker as 3 + 2 than as 4 + 1
    if constexpr (kTileVectors > 2) {
      if (width == 4) product_tile<R, 4, Across>(p, row, column);
      if (width == 3) product_tile<R, 3, Across>(p, row, column);
    }
    if (width == 2) product_tile<R, 2, Across>(p, row, column);
    if (width == 1) product_tile<R, 1, Across>(p, row, column);
    column += width * kLanes;
    vectors -= width;
  }
}

// All of one product.
template <bool Across>
FASTLM_INLINE void product(const Product& p, int rows, int vectors) {
  int row = 0;
  for (; row + kTileRows <= rows; row += kTileRows) product_rows<kTileRows, Across>(p, row, vectors);
  for (; row + kTileRows / 2 <= rows; row += kTileRows / 2) product_rows<kTileRows / 2, Across>(p, row, vectors);
  for (; row < rows; ++row) product_rows<1, Across>(p, row, vectors);
}

template <int... I>
FASTLM_INLINE void interleave(vf x, vf y, vf* low, vf* high, std::integer_sequence<int, I...>) {
  *low = __builtin_shufflevector(x, y, (I / 2 + I % 2 * kLanes)...);
  *high = __builtin_shufflevector(x, y, (kLanes / 2 + I / 2 + I % 2 * kLanes)...);
}

// Transposes kLanes vectors: perfect shuffles of the rows, as many as a lane's number has bits.
FASTLM_INLINE void transpose(vf* x) {
  for (int step = 1; step < kLanes; step *= 2) {
    vf y[kLanes];
    for (int i = 0; i < kLanes / 2; ++i)
      interleave(x[i], x[i + kLanes / 2], &y[2 * i], &y[2 * i + 1], std::make_integer_sequence<int, kLanes>());
    for (int i = 0; i < kLanes; ++i) x[i] = y[i];
  }
}

}  // namespace FASTLM_ISA
}  // namespace fastlm
