// Products of float rows with packed weights on a processor's tiles of int8 (AMX), at the accuracy of float.
//
// Both factors become integers of 24 bits, a row of the left one in units of its own largest number / kMost, so does a
// column of the right one, and an integer is three digits of base 256, each in -128..127:
//   x = (x0 2^16 + x1 2^8 + x2) unit,   sum x y = unit_x unit_y 2^16 (2^16 x0 y0 + 2^8 (x0 y1 + x1 y0)
//                                                                     + x0 y2 + x1 y1 + x2 y0 + what is left out)
// Six tile products, whose sums over k are exact: no order of summation, number of rows or of threads changes a bit of
// them. The error is that of rounding to 24 bits of the *largest* number in a row or column, and as much again for what
// is left out, x1 y2 + x2 y1, 2^-25 of the largest product for each k on average; float rounds each sum to 24 bits of
// itself. That is the same for rows whose numbers are of like size (states of a recurrence, all in -1..1,
// and their gradients), which is all it is used for. Three bytes a weight in place of four, and tiles of int8 multiply
// at twice the rate of bfloat16, of which float takes three parts and six products too.
//
// Layouts, steps = ceil(k / 64), a tile being 1 KB: rows [row / 16][steps][3 digits][16 rows][64 of k], or up to five
// rows, `few`, [steps][row][3 digits][64 of k] in the first rows of one tile each; packed weights
// [panels][V](16 units as floats, then [steps][3 digits][16 words][16 columns][4 of k]), and at last DigitColumns. All
// digits of few rows in one tile need a product for each tile of weights, in place of six for three: what is left is to
// load the weights. The sums are the same integers, so which layout is used changes no bit.
#pragma once

#include "gemm_panel.h"

namespace fastlm {
namespace FASTLM_ISA {

constexpr int64_t kDigits = 3, kTileHeight = 16, kTileDepth = 64, kTileBytes = 1024;
constexpr int64_t kFewRows = kTileHeight / kDigits;
constexpr float kMost = 0x7f0000;  // the largest integer of three digits is 0x7f7f7f; what is between is for rounding

FASTLM_INLINE int64_t digit_steps(int64_t k) { return panels_for(k, kTileDepth); }
// Of a tile's height of rows, or of 16 columns without their units.
FASTLM_INLINE int64_t digit_strip(int64_t k) { return digit_steps(k) * kDigits * kTileBytes; }
FASTLM_INLINE int64_t digit_column_block(int64_t k) { return digit_strip(k) + kTileHeight * static_cast<int64_t>(sizeof(float)); }
FASTLM_INLINE int64_t digit_rows_bytes(int64_t rows, int64_t k) { return panels_for(rows, kTileHeight) * digit_strip(k); }

// Of all columns of packed weights, the largest Euclidean norm and the largest number.
struct alignas(64) DigitColumns {
  float norm = 0, most = 0;
};

// Rows of digits, and for each the number that its integers are multiples of.
struct DigitRows {
  uint8_t* tiles;
  int64_t k;
  bool few = false;  // the layout of up to kFewRows
  // The first digit of (row, k).
  uint8_t* at(int64_t row, int64_t i) const {
    if (few) return tiles + i / kTileDepth * kTileBytes + row * kDigits * kTileDepth + i % kTileDepth;
    return tiles + row / kTileHeight * digit_strip(k) + i / kTileDepth * kDigits * kTileBytes +
           row % kTileHeight * kTileDepth + i % kTileDepth;
  }
  int64_t next_digit() const { return few ? kTileDepth : kTileBytes; }  // bytes to it from the one before
};

// What a row is multiplied by to become integers, and what those are multiples of; from the bits of its largest
// magnitude. Something that is no finite number makes all the row's products NaN.
struct DigitScale {
  float scale, unit;
};
FASTLM_INLINE DigitScale digit_scale(int32_t largest) {
  constexpr int32_t kInfinity = 0x7f800000;
  if (largest >= kInfinity) return {0.0f, float_of(0x7fc00000)};
  const float magnitude = float_of(static_cast<uint32_t>(largest));
  const float most = magnitude > 1e-30f ? magnitude : 1e-30f;  // so that the scale is finite
  return {kMost / most, most / kMost};
}

FASTLM_INLINE vi magnitudes(vf x) { return as_int(x) & 0x7fffffff; }
FASTLM_INLINE vi larger(vi a, vi b) { return ((a > b) & a) | (~(a > b) & b); }
FASTLM_INLINE int32_t largest_of(vi x) {
  int32_t lanes[kLanes], most = 0;
  std::memcpy(lanes, &x, sizeof(x));
  for (int32_t lane : lanes) most = lane > most ? lane : most;
  return most;
}

// Bits of the largest magnitude of x[0..n).
FASTLM_INLINE int32_t largest_magnitude(const float* x, int64_t n) {
  vi most{};
  for (int64_t i = 0; i < n; i += kLanes) most = larger(most, magnitudes(load_until(x, i, n, 0.0f)));
  return largest_of(most);
}

// Rounds to integers of three digits; byte j of a lane is the digit of 256^j, byte 3 is 0.
FASTLM_INLINE vi to_digits(vf scaled) {
#if defined(__AVX512F__)
  const vi rounded = (vi)_mm512_cvtps_epi32((__m512)scaled);
#else
  const vi rounded = as_int(scaled + 12582912.0f) - 0x4b400000;
#endif
  return (rounded + 0x808080) ^ 0x808080;
}

// 16 numbers of a row, from i on, a multiple of 16.
FASTLM_INLINE void put_digits(vf x, float scale, const DigitRows& rows, int64_t row, int64_t i) {
#if defined(__AVX512F__)
  const vi digits = to_digits(x * scale);
  const auto put = [](uint8_t* to, vi bytes) {
    _mm_store_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8((__m512i)bytes));
  };
  uint8_t* const first = rows.at(row, i);
  put(first, digits >> 16);
  put(first + rows.next_digit(), digits >> 8);
  put(first + 2 * rows.next_digit(), digits);
#else
  (void)x, (void)scale, (void)rows, (void)row, (void)i;  // only levels that have tiles come here
#endif
}

// A row of k floats.
FASTLM_INLINE void put_row(const float* x, int64_t k, const DigitRows& to, int64_t row, float* unit) {
  const DigitScale by = digit_scale(largest_magnitude(x, k));
  *unit = by.unit;
  for (int64_t i = 0; i < k; i += kLanes) put_digits(load_until(x, i, k, 0.0f), by.scale, to, row, i);
}

// Holds the tile registers of this thread: 0 to 3 sums, 4 to 6 digits of some rows, 7 one of some columns.
class DigitTiles {
 public:
  DigitTiles() = default;
  DigitTiles(const DigitTiles&) = delete;
  DigitTiles& operator=(const DigitTiles&) = delete;
#if defined(__AVX512F__)
  ~DigitTiles() {
    if (rows_ != 0) asm volatile("tilerelease" ::: "memory");
  }
  // For products of this many rows: a tile of fewer is multiplied in less time.
  void set_rows(int64_t count, bool few = false) {
    const int64_t rows = few ? count * kDigits : count < kTileHeight ? count : kTileHeight;
    if (rows == rows_) return;
    rows_ = rows;
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {};
    } config;
    for (int i = 0; i < 8; ++i) config.rows[i] = static_cast<uint8_t>(i < 7 ? rows : kTileHeight);
    asm volatile("ldtilecfg %0" ::"m"(config) : "memory");
  }
  void lost() { rows_ = 0; }  // somebody else has used the registers

 private:
  int64_t rows_ = 0;
#else
  void set_rows(int64_t, bool = false) {}
  void lost() {}
#endif
};

#if defined(__AVX512F__)
#define FASTLM_DIGITS_LOAD(r, p) asm volatile("tileloadd (%0,%1,1), %%tmm" #r ::"r"(p), "r"(int64_t{64}) : "memory")
#define FASTLM_DIGITS_STORE(r, p) asm volatile("tilestored %%tmm" #r ", (%0,%1,1)" ::"r"(p), "r"(int64_t{64}) : "memory")
#define FASTLM_DIGITS_MULTIPLY(c, a, b) asm volatile("tdpbssd %%tmm" #b ", %%tmm" #a ", %%tmm" #c :::)
#define FASTLM_DIGITS_ZERO(r) asm volatile("tilezero %%tmm" #r :::)

// In registers 0 to 3 the sums of 2^16, of 2^8, and two whose sum is that of 1: in two, since a product waits for the one
// before it in the same register. between(s) after the step s.
template <typename Between>
FASTLM_INLINE void multiply_digits(const uint8_t* rows, const uint8_t* columns, int64_t steps, const Between& between) {
  FASTLM_DIGITS_ZERO(0);
  FASTLM_DIGITS_ZERO(1);
  FASTLM_DIGITS_ZERO(2);
  FASTLM_DIGITS_ZERO(3);
  for (int64_t s = 0; s < steps; ++s, rows += kDigits * kTileBytes, columns += kDigits * kTileBytes) {
    FASTLM_DIGITS_LOAD(7, columns);
    FASTLM_DIGITS_LOAD(4, rows);
    FASTLM_DIGITS_MULTIPLY(0, 4, 7);
    FASTLM_DIGITS_LOAD(5, rows + kTileBytes);
    FASTLM_DIGITS_MULTIPLY(1, 5, 7);
    FASTLM_DIGITS_LOAD(6, rows + 2 * kTileBytes);
    FASTLM_DIGITS_MULTIPLY(2, 6, 7);
    FASTLM_DIGITS_LOAD(7, columns + kTileBytes);
    FASTLM_DIGITS_MULTIPLY(3, 5, 7);
    FASTLM_DIGITS_MULTIPLY(1, 4, 7);
    FASTLM_DIGITS_LOAD(7, columns + 2 * kTileBytes);
    FASTLM_DIGITS_MULTIPLY(2, 4, 7);
    between(s);
  }
}
// Of few rows: register j has the products with the columns' digit j.
template <typename Between>
FASTLM_INLINE void multiply_few_digits(const uint8_t* rows, const uint8_t* columns, int64_t steps,
                                       const Between& between) {
  FASTLM_DIGITS_ZERO(0);
  FASTLM_DIGITS_ZERO(1);
  FASTLM_DIGITS_ZERO(2);
  for (int64_t s = 0; s < steps; ++s, rows += kTileBytes, columns += kDigits * kTileBytes) {
    FASTLM_DIGITS_LOAD(6, rows);
    FASTLM_DIGITS_LOAD(7, columns);
    FASTLM_DIGITS_MULTIPLY(0, 6, 7);
    FASTLM_DIGITS_LOAD(7, columns + kTileBytes);
    FASTLM_DIGITS_MULTIPLY(1, 6, 7);
    FASTLM_DIGITS_LOAD(7, columns + 2 * kTileBytes);
    FASTLM_DIGITS_MULTIPLY(2, 6, 7);
    between(s);
  }
}
FASTLM_INLINE void store_sums(int32_t* sums, bool few) {
  FASTLM_DIGITS_STORE(0, sums);
  FASTLM_DIGITS_STORE(1, sums + 256);
  FASTLM_DIGITS_STORE(2, sums + 512);
  if (!few) FASTLM_DIGITS_STORE(3, sums + 768);
}
#endif

// As panel_product, of `count` rows of digits from the first one on, with their units; with a bias of the panel's columns
// sums begin with that, not with what `out` holds. set_rows() must have been told.
template <int V = 4, int Last = V - 1>
static __attribute__((noinline)) void digit_product(const DigitRows& rows, const Rows& units, int64_t count,
                                                    const uint8_t* panel, float* out, int64_t out_stride,
                                                    const float* bias = nullptr) {
#if defined(__AVX512F__)
  const int64_t tiles = panels_for(count, kTileHeight), strip = digit_strip(rows.k), steps = digit_steps(rows.k);
  const int64_t rows_a_step = panels_for(kTileHeight, steps);
  alignas(64) int32_t sums[4 * 256];
  // A block is converted while the next one is multiplied, some rows after each of its steps, so that vectors and tiles
  // are busy at the same time. That one's sums are stored behind it.
  for (int64_t item = 0; item <= V * tiles; ++item) {
    const int64_t v = item == 0 ? 0 : (item - 1) / tiles, first = item == 0 ? 0 : (item - 1) % tiles * kTileHeight;
    const int64_t many = item == 0 ? 0 : count - first < kTileHeight ? count - first : kTileHeight;
    const int64_t place = (v == V - 1 ? Last : v) * kLanes;
    const vf column_units = load(reinterpret_cast<const float*>(panel + v * digit_column_block(rows.k)));
    const vf start = bias == nullptr ? vf{} : load(bias + place);
    float* const to = out + first * out_stride + place;
    const auto convert = [&](int64_t from, int64_t end) __attribute__((always_inline)) {
      for (int64_t i = from; i < end && i < many; ++i) {
        vi high, middle, low;
        if (rows.few) {
          const auto sum = [&](int64_t x, int64_t y) { return load_as<vi>(sums + 256 * y + (i * kDigits + x) * kLanes); };
          high = sum(0, 0);
          middle = sum(0, 1) + sum(1, 0);
          low = sum(0, 2) + sum(1, 1) + sum(2, 0);
        } else {
          const int32_t* const at = sums + i * kLanes;
          high = load_as<vi>(at);
          middle = load_as<vi>(at + 256);
          low = load_as<vi>(at + 512) + load_as<vi>(at + 768);
        }
        const vf sum = (to_float(high) * 256.0f + to_float(middle)) * 256.0f + to_float(low);
        float* const row = to + i * out_stride;
        store(row, (bias == nullptr ? load(row) : start) + sum * (column_units * *units[first + i]));
      }
    };
    if (item == V * tiles) return convert(0, kTileHeight);
    const auto between = [&](int64_t s) __attribute__((always_inline)) { convert(s * rows_a_step, (s + 1) * rows_a_step); };
    const uint8_t *const left = rows.tiles + item % tiles * strip,
                  *const right = panel + item / tiles * digit_column_block(rows.k) + 64;
    if (rows.few)
      multiply_few_digits(left, right, steps, between);
    else
      multiply_digits(left, right, steps, between);
    store_sums(sums, rows.few);
  }
#else
  (void)rows, (void)units, (void)count, (void)panel, (void)out, (void)out_stride, (void)bias;
#endif
}

}  // namespace FASTLM_ISA
}  // namespace fastlm
