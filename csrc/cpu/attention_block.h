// What attention's forward and backward share: blocks of queries and their scores.
//
// A block holds kBlockRows rows, one per lane: the queries of all heads that share a key/value head, token by token.
// So keys are read once for the whole group, and neighbours in a vector see nearly the same keys. Blocks of keys begin
// at multiples of kBlockKeys: a row's sums are cut at the same places whichever rows are computed with it.
#pragma once

#include "attention_tile.h"
#include "fastlm/attention.h"
#include "simd_math.h"

namespace fastlm {
namespace FASTLM_ISA {

constexpr int kBlockRows = 96;    // the larger, the less often keys are read; the scores still fit a level-2 cache
constexpr int kBlockKeys = 192;  // a multiple of every kTileRows
constexpr int kBlockVectors = kBlockRows / kLanes;
constexpr float kLog2E = 1.44269504088896341f;
constexpr float kInfinity = __builtin_inff();

FASTLM_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
FASTLM_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
FASTLM_INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// 2^x for x <= 0 or NaN; 0 below -126.5. Its relative error is 2e-7.
//
// The magic number leaves the biased exponent in the low bits, so that where x is clamped the power of two is 0.
FASTLM_INLINE vf exp2_negative(vf x) {
  const vf lowest = broadcast(-127.0f), magic = broadcast(12582912.0f + 127.0f);
  x = lowest > x ? lowest : x;
  const vf shifted = x + magic;
  const vf r = x - (shifted - magic);
  vf p = r * 1.326472731e-3f + 9.671512991e-3f;
  p = p * r + 5.550733581e-2f;
  p = p * r + 2.402224243e-1f;
  p = p * r + 6.931470037e-1f;
  p = p * r + 1.0f;
  return p * as_float(as_int(shifted) << 23);
}

// Cuts one thread's share of the scratch into pieces; without memory it only counts.
struct Cut {
  float* memory;
  int64_t used = 0;
  float* take(int64_t floats) {
    float* piece = memory != nullptr ? memory + used : nullptr;
    used += round_up(floats, 16);
    return piece;
  }
};

// The keys [low, high) that a row may see, masks aside.
struct Span {
  int64_t low, high;
};

struct RowBlock {
  const Attention* a;
  int64_t b, kv_head, group;
  int64_t first;  // row of the key/value head: token * group + head within the group
  int count, vectors;

  int64_t token(int r) const { return (first + r) / group; }
  int64_t head(int r) const { return kv_head * group + (first + r) % group; }
  int64_t position(int r) const { return token(r) + a->keys - a->queries; }
  Span span(int r) const {
    const int64_t at = position(r);
    return {a->window > at ? 0 : smaller(at - a->window + 1, a->keys),
            a->causal ? larger(0, smaller(at + 1, a->keys)) : a->keys};
  }
  int last_row(int vector) const { return static_cast<int>(smaller(count, (vector + 1) * kLanes)) - 1; }
  // The keys that some row of a vector sees, and those that all see. Both ends grow with the row.
  Span some(int vector) const { return {span(vector * kLanes).low, span(last_row(vector)).high}; }
  Span all(int vector) const { return {span(last_row(vector)).low, span(vector * kLanes).high}; }
};

FASTLM_INLINE int64_t row_blocks(const Attention& a) {
  return (a.queries * (a.heads / a.kv_heads) + kBlockRows - 1) / kBlockRows;
}
FASTLM_INLINE RowBlock row_block(const Attention& a, int64_t head_of_batch, int64_t index) {
  const int64_t group = a.heads / a.kv_heads, first = index * kBlockRows;
  const int count = static_cast<int>(smaller(kBlockRows, a.queries * group - first));
  return {&a, head_of_batch / a.kv_heads, head_of_batch % a.kv_heads, group, first, count,
          (count + kLanes - 1) / kLanes};
}

// to[d][row] = scale * the rows of a block, where row r of the block begins at from(r). Lanes without a row are 0.
template <typename From>
static inline void transpose_rows(const RowBlock& block, const From& from, int64_t dim, float scale, float* to) {
  for (int v = 0; v < block.vectors; ++v)
    for (int64_t d = 0; d < dim; d += kLanes) {
      vf x[kLanes];
      for (int l = 0; l < kLanes; ++l) {
        const int r = v * kLanes + l;
        x[l] = r < block.count ? load_until(from(r), d, dim, 0.0f) * scale : vf{};
      }
      transpose(x);
      for (int l = 0; l < kLanes && d + l < dim; ++l) store(to + (d + l) * kBlockRows + v * kLanes, x[l]);
    }
}

// The scores of a block of rows and the keys [base, base + count), as the exponents of 2.
struct Scores {
  const RowBlock* block;
  int64_t base;
  int count;
  const float* transposed;  // [dim][kBlockRows], the queries times query_factor(a)
  float* s;                 // [kBlockKeys][kBlockRows]
  float* mask;              // as s, scratch where there is a mask
  float* derivative;        // as s: of the soft cap, where there is one; null: not wanted

  Span of(Span keys) const {
    const int64_t low = smaller(larger(keys.low - base, 0), count);
    return {low, larger(low, smaller(keys.high - base, count))};
  }
  Span some(int vector) const { return of(block->some(vector)); }
};

// So that the softmax is one of powers of 2 without a multiplication per score.
FASTLM_INLINE float query_factor(const Attention& a) {
  return a.softcap > 0 ? a.scale / a.softcap : a.scale * kLog2E;
}

// The mask of a vector's rows for the keys [from, to) of the block, transposed, as a summand of the exponent.
static inline void load_mask(const Scores& x, int vector, int64_t from, int64_t to) {
  const RowBlock& block = *x.block;
  const Attention& a = *block.a;
  const int64_t step = a.mask_stride[3];
  for (int64_t j = from; j < to; j += kLanes) {
    vf rows[kLanes];
    const int n = static_cast<int>(smaller(kLanes, to - j));
    for (int l = 0; l < kLanes; ++l) {
      const int r = static_cast<int>(smaller(vector * kLanes + l, block.count - 1));
      const int64_t at = block.b * a.mask_stride[0] + block.head(r) * a.mask_stride[1] +
                         block.token(r) * a.mask_stride[2] + (x.base + j) * step;
      alignas(64) float row[kLanes];
      if (a.mask_kind == AttentionMask::kBool) {
        const uint8_t* mask = static_cast<const uint8_t*>(a.mask) + at;
        for (int i = 0; i < kLanes; ++i) row[i] = i < n && mask[i < n ? i * step : 0] ? 0.0f : -kInfinity;
      } else {
        const float* mask = static_cast<const float*>(a.mask) + at;
        for (int i = 0; i < kLanes; ++i) {
          const float m = i < n ? mask[i * step] : -kInfinity;
          // The lowest float stands for "masked" in many models: it must not become -inf, which is another thing.
          row[i] = m * kLog2E == -kInfinity && m != -kInfinity ? -__FLT_MAX__ : m * kLog2E;
        }
      }
      rows[l] = load(row);
    }
    transpose(rows);
    for (int i = 0; i < n; ++i) store(x.mask + (j + i) * kBlockRows + vector * kLanes, rows[i]);
  }
}

// All options for the scores of a vector's rows with the keys [from, to) of the block.
static inline void apply_options(const Scores& x, int vector, int64_t from, int64_t to) {
  if (from >= to) return;
  const RowBlock& block = *x.block;
  const Attention& a = *block.a;
  alignas(64) float lows[kLanes], highs[kLanes], distances[kLanes], slopes[kLanes];
  for (int l = 0; l < kLanes; ++l) {
    const int r = static_cast<int>(smaller(vector * kLanes + l, block.count - 1));
    const Span seen = x.of(block.span(r));
    lows[l] = static_cast<float>(seen.low);
    highs[l] = static_cast<float>(seen.high);
    distances[l] = static_cast<float>(x.base - block.position(r));
    slopes[l] = a.slopes != nullptr ? a.slopes[block.b * a.slopes_stride + block.head(r)] * kLog2E : 0.0f;
  }
  const vf low = load(lows), high = load(highs), distance = load(distances), slope = load(slopes);
  if (a.mask_kind != AttentionMask::kNone) load_mask(x, vector, from, to);
  for (int64_t j = from; j < to; ++j) {
    const int64_t at = j * kBlockRows + vector * kLanes;
    const vf here = broadcast(static_cast<float>(j));
    vf s = load(x.s + at);
    if (a.softcap > 0) {
      const vf t = tanh(s);
      s = t * (a.softcap * kLog2E);
      if (x.derivative != nullptr) store(x.derivative + at, 1.0f - t * t);
    }
    if (a.slopes != nullptr) s += (here + distance) * slope;
    if (a.mask_kind != AttentionMask::kNone) s += load(x.mask + at);
    store(x.s + at, ((low <= here) & (here < high)) ? s : broadcast(-kInfinity));
  }
}

// a[j] . t[:, r] for the keys j of a block and its rows r, where any row of r's vector sees j; the rest is left as it
// is. For the scores, keys and queries; for the gradient of the weights, values and gradients of the output. Fetches the
// next tile's rows of `a`, and of `later`, rows of which this tile's keys will be needed soon.
static inline void key_products(const Scores& x, const float* a, int64_t stride, int64_t dim, const float* transposed,
                                float* to, const float* later = nullptr, int64_t later_stride = 0) {
  const int vectors = x.block->vectors;
  int begin = 0, end = 0;  // the vectors that see a tile's keys: neighbours, since spans grow with the row
  for (int64_t j = 0; j < x.count; j += kTileRows) {
    const int64_t rows = smaller(kTileRows, x.count - j);
    while (end < vectors && x.some(end).low < j + rows) ++end;
    while (begin < end && x.some(begin).high <= j) ++begin;
    if (begin == end) continue;
    for (int64_t i = j; i < j + rows; ++i)
      for (int64_t d = 0; d < dim; d += 16) {
        if (i + kTileRows < x.count) __builtin_prefetch(a + (x.base + i + kTileRows) * stride + d);
        if (later != nullptr) __builtin_prefetch(later + (x.base + i) * later_stride + d, 0, 2);
      }
    const Product p = {a + (x.base + j) * stride, stride, transposed + begin * kLanes, kBlockRows, dim,
                       to + j * kBlockRows + begin * kLanes, kBlockRows, nullptr};
    product<false>(p, static_cast<int>(rows), end - begin);
  }
}

static inline void scores(const Scores& x) {
  const RowBlock& block = *x.block;
  const Attention& a = *block.a;
  const float* keys = a.key + block.b * a.key_stride[0] + block.kv_head * a.key_stride[1];
  const float* values = a.value + block.b * a.value_stride[0] + block.kv_head * a.value_stride[1];
  key_products(x, keys, a.key_stride[2], a.dim, x.transposed, x.s, values, a.value_stride[2]);
  const bool every = a.softcap > 0 || a.slopes != nullptr || a.mask_kind != AttentionMask::kNone;
  for (int v = 0; v < block.vectors; ++v) {
    const Span some = x.some(v), all = x.of(block.all(v));
    if (every || all.low >= all.high) {
      apply_options(x, v, some.low, some.high);
    } else {  // only where the rows differ
      apply_options(x, v, some.low, all.low);
      apply_options(x, v, all.high, some.high);
    }
  }
}

// to[row] = keep[row] * to[row] + the sum over the keys j that the row sees of weights[j][row] * b[j]: for outputs,
// values; for gradients of queries, keys. Weights of other keys are 0. `width` is that of b's and to's rows, in floats.
static inline void add_seen(const Scores& x, const float* weights, const float* b, int64_t b_stride, const float* keep,
                            float* to, int64_t width) {
  const RowBlock& block = *x.block;
  for (int r = 0; r < block.count; r += kTileRows) {
    const int rows = static_cast<int>(smaller(kTileRows, block.count - r));
    const Span seen = x.of({block.span(r).low, block.span(r + rows - 1).high});
    if (seen.low >= seen.high) continue;
    const Product p = {weights + seen.low * kBlockRows + r, kBlockRows, b + seen.low * b_stride, b_stride,
                       seen.high - seen.low, to + r * width, width, keep + r};
    product<true>(p, rows, static_cast<int>(width / kLanes));
  }
}

// The first `count` rows of `from`, as they are if they are whole vectors, else a copy padded with 0.
FASTLM_INLINE const float* padded(const float* from, int64_t* stride, int64_t dim, int64_t count, float* copy) {
  if (dim % kLanes == 0) return from;
  const int64_t width = round_up(dim, kLanes);
  for (int64_t j = 0; j < count; ++j) {
    std::memcpy(copy + j * width, from + j * *stride, dim * sizeof(float));
    std::memset(copy + j * width + dim, 0, (width - dim) * sizeof(float));
  }
  *stride = width;
  return copy;
}

}  // namespace FASTLM_ISA
}  // namespace fastlm
