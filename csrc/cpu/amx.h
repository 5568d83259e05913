// Products of floats by the unit that multiplies tiles of bfloat16 and sums in float (AMX), as accurate as in float.
//
// A float is the sum of three bfloat16, 8 bits each. Of the nine products of parts six are made, and what is left out
// is at most 2^-23 of a product (Henry, Tang, Heinecke, 2019, "Leveraging the bfloat16 Artificial Intelligence Datatype
// For Higher-Precision Computations", https://arxiv.org/abs/1904.06376). A factor that is bfloat16 itself is one part,
// one in half precision two.
//
// The unit takes numbers below 2^-126 for 0. So a part that small is lost, and a number below 2^-110 loses its last
// bits; products below 2^-126 vanish. An infinity or NaN makes every sum that it is in infinite or NaN; which, is not
// defined.
//
// Packed, a step is 32 of k and a tile 16 by 16 words: word p holds k = p in its low half and k = p + 16 in its high
// half, so that two vectors of neighbours become words without a shuffle. Of a tiles are [row][p], of b [p][column],
// and the parts of a step follow one another: a [steps][3] tiles for 16 rows, b [steps][parts] tiles for 16 columns, a
// panel.
#pragma once

#include "fastlm/matmul.h"
#include "simd.h"

namespace fastlm {
namespace FASTLM_ISA {

constexpr int64_t kTile = 16;          // rows, words or columns of a tile
constexpr int64_t kDepth = 2 * kTile;  // of k in a tile
constexpr int64_t kTileWords = kTile * kTile;
constexpr int kParts = 3;  // of a float

// x rounded to bfloat16, as a float; what cannot be rounded up without overflow, infinities and NaN among it, is cut
// off.
FASTLM_INLINE vf leading(vf x) {
  const vu bits = (vu)x;
  const vu half = (vu)((bits & 0x7fffffff) < 0x7f7f8000) & 0x8000;
  return (vf)((bits + half) & 0xffff0000);
}

// The parts of 2 kLanes numbers, `low` for the low halves of words, `high` for the high ones.
template <int Parts>
FASTLM_INLINE void split(vf low, vf high, vu (&words)[Parts]) {
#pragma GCC unroll 3
  for (int i = 0; i < Parts; ++i) {
    const bool rest = i + 1 == Parts;  // has no more than 8 bits
    const vf l = rest ? low : leading(low), h = rest ? high : leading(high);
    words[i] = ((vu)l >> 16) | ((vu)h & 0xffff0000);
    low -= l;
    high -= h;
  }
}

// The product of 16 rows and two panels, or of 32 rows and one, as two sums: of the products of first parts, and of all
// others. So those, smaller by 2^-8 at least, are not rounded at the size of the whole: the result has a sixth of the
// roundings.
struct TileSums {
  alignas(64) float first[kTile * 2 * kTile];  // [row][column] of 32 columns, or of 16
  alignas(64) float others[kTile * 2 * kTile];

  FASTLM_MEMBER vf at(int64_t row, int64_t column, int64_t columns = 2 * kTile) const {
    const int64_t i = row * columns + column;
    return load(first + i) + load(others + i);
  }
};

// Another tile's distance, in words: of b, or of a where there are 32 rows.
struct Second {
  int64_t a, b;
};

template <int Parts>
static __attribute__((noinline)) void plain_product(const uint32_t* a, const uint32_t* b, Second second, int64_t steps,
                                                    int64_t rows, TileSums& sums) {
  constexpr int kPairs[6][2] = {{0, 0}, {0, 2}, {0, 1}, {1, 1}, {1, 0}, {2, 0}};
  const int64_t stride = second.a ? kTile : 2 * kTile;
  std::memset(&sums, 0, sizeof(sums));
  for (int64_t half = 0; half < 2; ++half)
    for (int64_t s = 0; s < steps; ++s)
      for (const auto& [i, j] : kPairs) {
        if (j >= Parts) continue;
        const uint32_t* const left = a + (second.a ? half * second.a : 0) + (s * kParts + i) * kTileWords;
        const uint32_t* const right = b + (second.a ? 0 : half * second.b) + (s * Parts + j) * kTileWords;
        float* const to = (i + j == 0 ? sums.first : sums.others) + half * (second.a ? kTileWords : kTile);
        for (int64_t r = 0; r < rows; ++r)
          for (int64_t v = 0; v < kTile; v += kLanes) {
            vf sum = {};
            for (int64_t p = 0; p < kTile; ++p) {
              const uint32_t word = left[r * kTile + p];
              vu other;
              std::memcpy(&other, right + p * kTile + v, sizeof(other));
              sum += (vf)(other << 16) * float_of(word << 16);
              sum += (vf)(other & 0xffff0000) * float_of(word & 0xffff0000);
            }
            store(to + r * stride + v, load(to + r * stride + v) + sum);
          }
      }
}

#if defined(__AVX512F__)
// Written as assembly, since GCC's own intrinsics do not say that they read memory.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
#define FASTLM_TILE_LOAD(r, p, stride) \
  asm volatile("tileloadd (%0,%1,1), %%tmm" #r ::"r"(p), "r"(static_cast<int64_t>(stride)) : "memory")
#define FASTLM_TILE_STORE(r, p, stride) \
  asm volatile("tilestored %%tmm" #r ", (%0,%1,1)" ::"r"(p), "r"(static_cast<int64_t>(stride)) : "memory")
#define FASTLM_TILE_MULTIPLY(c, a, b) asm volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #c :::)
#define FASTLM_TILE_ZERO(r) asm volatile("tilezero %%tmm" #r :::)

// Registers: 0 and 1 sums of first parts, 2 and 3 of others, 4 to 7 parts. Two tiles in turn share what a step's nine
// loads bring for twelve products; for each sum the order of products is the same in both.
template <int Parts>
static __attribute__((noinline)) void wide_product(const uint32_t* a, const uint32_t* b, int64_t panel, int64_t steps,
                                                   TileSums& sums) {
  const uint32_t* b2 = b + panel;
  FASTLM_TILE_ZERO(0);
  FASTLM_TILE_ZERO(1);
  FASTLM_TILE_ZERO(2);
  FASTLM_TILE_ZERO(3);
  for (int64_t s = 0; s < steps; ++s, a += kParts * kTileWords, b += Parts * kTileWords, b2 += Parts * kTileWords) {
    FASTLM_TILE_LOAD(4, a, 64);
    if constexpr (Parts > 2) {
      FASTLM_TILE_LOAD(6, b + 2 * kTileWords, 64);
      FASTLM_TILE_LOAD(7, b2 + 2 * kTileWords, 64);
      FASTLM_TILE_MULTIPLY(2, 4, 6);
      FASTLM_TILE_MULTIPLY(3, 4, 7);
    }
    if constexpr (Parts > 1) {
      FASTLM_TILE_LOAD(6, b + kTileWords, 64);
      FASTLM_TILE_LOAD(7, b2 + kTileWords, 64);
      FASTLM_TILE_MULTIPLY(2, 4, 6);
      FASTLM_TILE_MULTIPLY(3, 4, 7);
    }
    FASTLM_TILE_LOAD(5, a + kTileWords, 64);
    if constexpr (Parts > 1) {
      FASTLM_TILE_MULTIPLY(2, 5, 6);
      FASTLM_TILE_MULTIPLY(3, 5, 7);
    }
    FASTLM_TILE_LOAD(6, b, 64);
    FASTLM_TILE_LOAD(7, b2, 64);
    FASTLM_TILE_MULTIPLY(0, 4, 6);
    FASTLM_TILE_MULTIPLY(1, 4, 7);
    FASTLM_TILE_MULTIPLY(2, 5, 6);
    FASTLM_TILE_MULTIPLY(3, 5, 7);
    FASTLM_TILE_LOAD(5, a + 2 * kTileWords, 64);
    FASTLM_TILE_MULTIPLY(2, 5, 6);
    FASTLM_TILE_MULTIPLY(3, 5, 7);
  }
  constexpr int64_t kRowBytes = 2 * kTile * sizeof(float);
  FASTLM_TILE_STORE(0, sums.first, kRowBytes);
  FASTLM_TILE_STORE(1, sums.first + kTile, kRowBytes);
  FASTLM_TILE_STORE(2, sums.others, kRowBytes);
  FASTLM_TILE_STORE(3, sums.others + kTile, kRowBytes);
}

// Half of what is read of b, for the same arithmetic: b comes from the level-2 cache, a from level 1.
template <int Parts>
static __attribute__((noinline)) void tall_product(const uint32_t* a, const uint32_t* b, int64_t strip, int64_t steps,
                                                   TileSums& sums) {
  const uint32_t* a2 = a + strip;
  FASTLM_TILE_ZERO(0);
  FASTLM_TILE_ZERO(1);
  FASTLM_TILE_ZERO(2);
  FASTLM_TILE_ZERO(3);
  for (int64_t s = 0; s < steps; ++s, a += kParts * kTileWords, a2 += kParts * kTileWords, b += Parts * kTileWords) {
    FASTLM_TILE_LOAD(4, b, 64);
    FASTLM_TILE_LOAD(6, a, 64);
    FASTLM_TILE_LOAD(7, a2, 64);
    FASTLM_TILE_MULTIPLY(0, 6, 4);
    FASTLM_TILE_MULTIPLY(1, 7, 4);
    if constexpr (Parts > 2) {
      FASTLM_TILE_LOAD(5, b + 2 * kTileWords, 64);
      FASTLM_TILE_MULTIPLY(2, 6, 5);
      FASTLM_TILE_MULTIPLY(3, 7, 5);
    }
    if constexpr (Parts > 1) {
      FASTLM_TILE_LOAD(5, b + kTileWords, 64);
      FASTLM_TILE_MULTIPLY(2, 6, 5);
      FASTLM_TILE_MULTIPLY(3, 7, 5);
    }
    FASTLM_TILE_LOAD(6, a + kTileWords, 64);
    FASTLM_TILE_LOAD(7, a2 + kTileWords, 64);
    if constexpr (Parts > 1) {
      FASTLM_TILE_MULTIPLY(2, 6, 5);
      FASTLM_TILE_MULTIPLY(3, 7, 5);
    }
    FASTLM_TILE_MULTIPLY(2, 6, 4);
    FASTLM_TILE_MULTIPLY(3, 7, 4);
    FASTLM_TILE_LOAD(6, a + 2 * kTileWords, 64);
    FASTLM_TILE_LOAD(7, a2 + 2 * kTileWords, 64);
    FASTLM_TILE_MULTIPLY(2, 6, 4);
    FASTLM_TILE_MULTIPLY(3, 7, 4);
  }
  FASTLM_TILE_STORE(0, sums.first, 64);
  FASTLM_TILE_STORE(1, sums.first + kTileWords, 64);
  FASTLM_TILE_STORE(2, sums.others, 64);
  FASTLM_TILE_STORE(3, sums.others + kTileWords, 64);
}
#endif

// Holds the tile registers of this thread, where matmul_tiles(); elsewhere the same sums are made without, slowly.
class TileUnit {
 public:
  explicit TileUnit(int64_t rows = kTile) { set_rows(rows); }
  TileUnit(const TileUnit&) = delete;
  TileUnit& operator=(const TileUnit&) = delete;
#if defined(__AVX512F__)
  ~TileUnit() {
    if (tiles_) asm volatile("tilerelease" ::: "memory");
  }
  // Rows of a and c from now on, 1 to 16: fewer take less time. A row's bits do not depend on it.
  void set_rows(int64_t rows) {
    if (rows == rows_) return;
    rows_ = rows;
    TileConfig config;
    for (int i = 0; i < 6; ++i) config.rows[i] = static_cast<uint8_t>(rows);
    if (tiles_) asm volatile("ldtilecfg %0" ::"m"(config) : "memory");
  }
  bool tiles() const { return tiles_; }
#else
  void set_rows(int64_t rows) { rows_ = rows; }
  static constexpr bool tiles() { return false; }
#endif

  // Of packed a and packed b, `panel` words from b's first panel to its second (0: there is none, and the columns from
  // 16 on mean nothing). For each sum in the same order. `Parts`: of b.
  template <int Parts>
  void multiply(const uint32_t* a, const uint32_t* b, int64_t panel, int64_t steps, TileSums& sums) const {
#if defined(__AVX512F__)
    if (tiles_) return wide_product<Parts>(a, b, panel, steps, sums);
#endif
    plain_product<Parts>(a, b, {0, panel}, steps, rows_, sums);
  }

  // The same of 32 rows, `strip` words from the first 16 to the others, and one panel; 16 rows being set.
  template <int Parts>
  void multiply_tall(const uint32_t* a, const uint32_t* b, int64_t strip, int64_t steps, TileSums& sums) const {
#if defined(__AVX512F__)
    if (tiles_) return tall_product<Parts>(a, b, strip, steps, sums);
#endif
    plain_product<Parts>(a, b, {strip, 0}, steps, rows_, sums);
  }

 private:
  int64_t rows_ = 0;
#if defined(__AVX512F__)
  const bool tiles_ = matmul_tiles();
#endif
};

}  // namespace FASTLM_ISA
}  // namespace fastlm
