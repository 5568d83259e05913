// Each thread has a rectangle of c to itself and packs what it needs of a and b: a block of b that stays in its level-2
// cache, and for each 32 rows of a what meets that block, in level 1. So threads never wait for each other.
#include "amx.h"
#include "attention_tile.h"
#include "convert.h"
#include "threads.h"

namespace fastlm {
namespace FASTLM_ISA {
namespace {

constexpr int64_t kSteps = 4;  // of k in a block: 32 rows of a are 24 KB, half of level 1
constexpr int64_t kBlockDepth = kSteps * kDepth;
constexpr int64_t kBlockBytes = 3 << 18;  // of b in a block: under half of the level-2 cache of processors with tiles
constexpr int64_t kPanelsAhead = 2;  // fetched before they are packed
constexpr int64_t kWide = 2 * kTile;  // columns of c at a time
constexpr int64_t kWorthAThread = 1 << 21;  // multiplications below which waking a thread more costs more than it saves

int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }
int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

constexpr int parts_of(Numbers numbers) {
  return numbers == Numbers::kFloat ? 3 : numbers == Numbers::kHalf ? 2 : 1;
}
int64_t block_columns(Numbers numbers) { return kBlockBytes / (2 * parts_of(numbers) * kBlockDepth) / kWide * kWide; }

// The first n (none where n <= 0) of kLanes numbers at index i; the rest are 0.
template <Numbers N>
FASTLM_INLINE vf vector_at(const void* from, int64_t i, int64_t n) {
  if constexpr (N == Numbers::kFloat) {
    const float* const p = static_cast<const float*>(from) + i;
    return n >= kLanes ? load(p) : load_partial(p, n < 0 ? 0 : static_cast<int>(n));
  } else {
    const uint16_t* p = static_cast<const uint16_t*>(from) + i;
    uint16_t some[kLanes] = {};
    if (n < kLanes) {
      for (int64_t j = 0; j < n; ++j) some[j] = p[j];
      p = some;
    }
    return N == Numbers::kHalf ? load_halves(p) : load_bfloats(p);
  }
}

// Turns a tile. The portable way goes where vectors are shorter than a tile's rows.
FASTLM_INLINE void turn(uint32_t* tile) {
  if constexpr (kLanes == kTile) {
    vf rows[kLanes];
    for (int i = 0; i < kLanes; ++i) std::memcpy(&rows[i], tile + i * kTile, sizeof(vf));
    transpose(rows);
    for (int i = 0; i < kLanes; ++i) std::memcpy(tile + i * kTile, &rows[i], sizeof(vf));
  } else {
    for (int i = 0; i < kTile; ++i)
      for (int j = 0; j < i; ++j) {
        const uint32_t word = tile[i * kTile + j];
        tile[i * kTile + j] = tile[j * kTile + i];
        tile[j * kTile + i] = word;
      }
  }
}

// The parts of the numbers (i, k), 16 i and 32 k of which `count` and `depth` exist, as tiles [i][word] or, `Words`,
// [word][i]. (i, k) is at from[i * stride + k] or, `Across`, at from[k * stride + i].
template <Numbers N, bool Across, bool Words>
static __attribute__((noinline)) void pack_tiles(const void* from, int64_t at, int64_t stride, int64_t count,
                                                 int64_t depth, uint32_t* tiles) {
  constexpr int kCount = parts_of(N);
  for (int64_t row = 0; row < kTile; ++row)
    for (int64_t v = 0; v < kTile; v += kLanes) {
      // Across: row is a word, vectors go along i. Else row is an i, vectors go along k.
      const int64_t low = at + row * stride + v;
      const int64_t high = Across ? low + kTile * stride : low + kTile;
      const int64_t left = Across ? (row < depth ? count - v : 0) : (row < count ? depth - v : 0);
      const int64_t right = Across ? (row + kTile < depth ? count - v : 0) : left - kTile;
      vu words[kCount];
      split(vector_at<N>(from, low, left), vector_at<N>(from, high, right), words);
      for (int j = 0; j < kCount; ++j)
        std::memcpy(tiles + j * kTileWords + row * kTile + v, &words[j], sizeof(words[j]));
    }
  if constexpr (Across != Words)
    for (int j = 0; j < kCount; ++j) turn(tiles + j * kTileWords);
}

// Asks for `columns` numbers of some rows, which come to the level-2 cache while others are worked on.
template <Numbers N = Numbers::kFloat>
FASTLM_INLINE void fetch(const void* from, int64_t at, int64_t stride, int64_t rows, int64_t columns) {
  constexpr int64_t kBytes = N == Numbers::kFloat ? 4 : 2;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t j = 0; j < columns; j += 64 / kBytes)
      __builtin_prefetch(static_cast<const char*>(from) + (at + r * stride + j) * kBytes, 0, 2);
}

// Rows [row, row + rows) of a in the columns from `k`, of `depth`.
FASTLM_INLINE void pack_a(const FloatMatmul& x, int64_t row, int64_t rows, int64_t k, int64_t depth, uint32_t* to) {
  for (int64_t s = 0; s < depth; s += kDepth, to += kParts * kTileWords)
    if (x.turn_a)
      pack_tiles<Numbers::kFloat, true, false>(x.a, (k + s) * x.a_stride + row, x.a_stride, rows, depth - s, to);
    else
      pack_tiles<Numbers::kFloat, false, false>(x.a, row * x.a_stride + k + s, x.a_stride, rows, depth - s, to);
}

// Columns [column, column + columns) of b in the rows from `k`, of `depth`, as panels: in the order in which b lies.
template <Numbers N>
FASTLM_INLINE void pack_b(const FloatMatmul& x, int64_t column, int64_t columns, int64_t k, int64_t depth,
                          uint32_t* to) {
  constexpr int64_t kTiles = parts_of(N) * kTileWords;
  const int64_t steps = ceil_div(depth, kDepth), panels = ceil_div(columns, kTile);
  if (x.turn_b)
    for (int64_t p = 0; p < panels; ++p) {
      // Short pieces of many rows: the processor does not see by itself what comes next.
      const int64_t ahead = (p + kPanelsAhead) * kTile;
      fetch<N>(x.b, (column + ahead) * x.b_stride + k, x.b_stride, smaller(kTile, columns - ahead), depth);
      for (int64_t s = 0; s < steps; ++s)
        pack_tiles<N, false, true>(x.b, (column + p * kTile) * x.b_stride + k + s * kDepth, x.b_stride,
                                   columns - p * kTile, depth - s * kDepth, to + (p * steps + s) * kTiles);
    }
  else
    for (int64_t s = 0; s < steps; ++s)
      for (int64_t p = 0; p < panels; ++p)
        pack_tiles<N, true, true>(x.b, (k + s * kDepth) * x.b_stride + column + p * kTile, x.b_stride,
                                  columns - p * kTile, depth - s * kDepth, to + (p * steps + s) * kTiles);
}

// c (+)= sums + bias, in some rows and columns; `width`: of the sums' rows.
template <int64_t Width>
FASTLM_INLINE void write(const TileSums& sums, float* c, int64_t stride, int64_t rows, int64_t columns, bool add,
                         const float* bias) {
  if (columns >= Width) {
    for (int64_t r = 0; r < rows; ++r, c += stride)
#pragma GCC unroll 8
      for (int64_t j = 0; j < Width; j += kLanes) {
        vf sum = sums.at(r, j, Width);
        if (add) sum += load(c + j);
        store(c + j, bias ? sum + load(bias + j) : sum);
      }
    return;
  }
  for (int64_t r = 0; r < rows; ++r, c += stride)
    for (int64_t j = 0; j < columns; ++j) {
      float sum = sums.first[r * Width + j] + sums.others[r * Width + j];
      if (add) sum += c[j];
      c[j] = bias ? sum + bias[j] : sum;
    }
}

// Packed rows of a, up to 32, times packed columns of b. A block is written while the next one is multiplied.
template <int Parts, bool Tall>
FASTLM_INLINE void multiply_rows(const TileUnit& unit, const uint32_t* a, const uint32_t* b, int64_t steps, float* c,
                                 int64_t stride, int64_t rows, int64_t columns, bool add, const float* bias) {
  constexpr int64_t kWidth = Tall ? kTile : kWide;
  const int64_t panel = steps * Parts * kTileWords;
  TileSums sums[2];
  for (int64_t j = 0, i = 0; j < columns + kWidth; j += kWidth, i ^= 1) {
    if (j < columns) {
      if (add) fetch(c, j, stride, rows, smaller(kWidth, columns - j));
      const uint32_t* const first = b + j / kTile * panel;
      if (Tall)
        unit.multiply_tall<Parts>(a, first, steps * kParts * kTileWords, steps, sums[i]);
      else
        unit.multiply<Parts>(a, first, columns - j > kTile ? panel : 0, steps, sums[i]);
    }
    const int64_t last = j - kWidth;
    if (j > 0) write<kWidth>(sums[i ^ 1], c + last, stride, rows, columns - last, add, bias ? bias + last : bias);
  }
}

template <Numbers N>
void rectangle(const FloatMatmul& x, Range rows, Range columns, uint32_t* a, uint32_t* b) {
  TileUnit unit;
  const int64_t width = block_columns(N);
  for (int64_t j = columns.begin; j < columns.end; j += width)
    for (int64_t k = 0; k == 0 || k < x.k; k += kBlockDepth) {  // once without any k, for zeros
      const int64_t many = smaller(width, columns.end - j), depth = smaller(kBlockDepth, x.k - k);
      const int64_t steps = ceil_div(depth, kDepth);
      const bool add = x.add || k > 0;
      const float* const bias = x.bias && k + depth == x.k ? x.bias + j : nullptr;
      pack_b<N>(x, j, many, k, depth, b);
      for (int64_t i = rows.begin, few; i < rows.end; i += few) {
        few = rows.end - i >= 2 * kTile ? 2 * kTile : smaller(kTile, rows.end - i);
        for (int64_t half = 0; half < few; half += kTile)
          pack_a(x, i + half, smaller(kTile, few - half), k, depth, a + half / kTile * steps * kParts * kTileWords);
        if (x.turn_a)
          fetch(x.a, k * x.a_stride + i + few, x.a_stride, depth, smaller(few, rows.end - i - few));
        else
          fetch(x.a, (i + few) * x.a_stride + k, x.a_stride, smaller(few, rows.end - i - few), depth);
        float* const c = x.c + i * x.c_stride + j;
        unit.set_rows(smaller(kTile, few));
        if (few > kTile)
          multiply_rows<parts_of(N), true>(unit, a, b, steps, c, x.c_stride, few, many, add, bias);
        else
          multiply_rows<parts_of(N), false>(unit, a, b, steps, c, x.c_stride, few, many, add, bias);
      }
    }
}

// Threads side by side along the rows of c, so that as few numbers as possible are packed twice.
int rows_of_threads(const FloatMatmul& x, int threads) {
  int best = 1;
  for (int rows = 1; rows <= threads; ++rows) {
    if (threads % rows != 0) continue;
    // a is packed once for each of the threads side by side in a row, b once for each of those in a column.
    if (threads / rows * x.m + rows * x.n < threads / best * x.m + best * x.n) best = rows;
  }
  return best;
}

constexpr int64_t kStripWords = 2 * kSteps * kParts * kTileWords;
constexpr int64_t kThreadBytes = kBlockBytes + kStripWords * 4;

}  // namespace

int64_t float_matmul_scratch(const FloatMatmul& x) { return x.threads * kThreadBytes; }

void float_matmul(const FloatMatmul& x) {
  const int64_t useful = x.m * x.n * x.k / kWorthAThread;
  parallel(useful < x.threads ? static_cast<int>(useful) : x.threads, [&](int thread, int threads, Barrier&) {
    const int along = rows_of_threads(x, threads);
    const Range rows = share(x.m, thread % along, along, 2 * kTile);
    const Range columns = share(x.n, thread / along, threads / along, kWide);
    uint32_t* const a = reinterpret_cast<uint32_t*>(static_cast<char*>(x.scratch) + thread * kThreadBytes);
    uint32_t* const b = a + kStripWords;
    if (x.b_numbers == Numbers::kFloat)
      rectangle<Numbers::kFloat>(x, rows, columns, a, b);
    else if (x.b_numbers == Numbers::kHalf)
      rectangle<Numbers::kHalf>(x, rows, columns, a, b);
    else
      rectangle<Numbers::kBfloat>(x, rows, columns, a, b);
  });
}

}  // namespace FASTLM_ISA
}  // namespace fastlm
