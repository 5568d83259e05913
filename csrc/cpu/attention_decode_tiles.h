// Attention to a cache of bfloat16 or int8 on the unit that multiplies tiles (AMX).
//
// Keys are a tile as they lie in the cache, 16 of them; up to four queries are the other, each in the parts that the
// unit can multiply: three bfloat16, of which a float is the sum, or the four digits to base 256 of a whole number of
// 31 bits. So scores need neither floats made of keys nor sums across lanes. Values of int8 are multiplied by weights in
// digits; for bfloat16, whose values and weights would both have to be rearranged, floats are as quick.
//
// Products of digits are exact, and what a query's or weight's last digit leaves out is 2^-31 of the largest: less than
// a float's own rounding. An infinity or NaN gives NaN; bfloat16 below 2^-126 counts as 0.
#pragma once

#include <type_traits>

#include "amx.h"
#include "convert.h"
#include "fastlm/attention_decode.h"
#include "fastlm/pack.h"
#include "reduce.h"

namespace fastlm {
namespace FASTLM_ISA {

// Keys or values of one key/value head, row j - base being that of position j. Integers have their scale behind them.
template <class T>
struct Rows {
  const T* data;
  int64_t stride;

  const T* row(int64_t j) const { return data + j * stride; }
  // Of integers, the scales of rows [low, high), and zeros to the next multiples of kLanes.
  void scales(int64_t low, int64_t high, int dim, float* to) const {
    if (low >= high) return;
    const T* from = row(low) + dim;
    for (int64_t j = low / kLanes * kLanes; j < low; ++j) to[j] = 0.0f;
    int64_t j = low;
#if defined(__AVX512F__)
    const __m512i places = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                              _mm512_set1_epi32(static_cast<int>(stride)));
    if (stride < 1 << 26)
      for (; j + kLanes <= high; j += kLanes, from += kLanes * stride)
        _mm512_storeu_ps(to + j, _mm512_i32gather_ps(places, from, 1));
#endif
    for (; j < high; ++j, from += stride) std::memcpy(to + j, from, sizeof(float));
    for (; j % kLanes != 0; ++j) to[j] = 0.0f;
  }
};

// Rows that are fetched before their turn; an address behind the last does no harm.
static constexpr int kKeysAhead = 32, kValuesAhead = 16;

// x and y as the even and the odd ones of their numbers.
template <int... I>
FASTLM_INLINE void deal(vf& x, vf& y, std::integer_sequence<int, I...>) {
  const vf even = __builtin_shufflevector(x, y, 2 * I...), odd = __builtin_shufflevector(x, y, 2 * I + 1 ...);
  x = even, y = odd;
}

// Whether there is anything here for such a cache.
template <class T>
constexpr bool kHasTiles = false;

#if defined(__AVX512VNNI__)
template <>
constexpr bool kHasTiles<uint16_t> = true;
template <>
constexpr bool kHasTiles<int8_t> = true;

constexpr int64_t kStep = 64;     // keys that a tile of weights has
constexpr int kQueries = 4;       // part p of query q is column, or row, p * kQueries + q

#define FASTLM_TILE_MULTIPLY_BYTES(c, a, b) asm volatile("tdpbssd %%tmm" #b ", %%tmm" #a ", %%tmm" #c :::)

// The power of two by which numbers of up to `largest` become whole numbers below 2^30; NaN where there is none.
static inline float whole_factor(float largest) {
  if (!(largest < __builtin_inff())) return __builtin_nanf("");
  const int exponent = static_cast<int>(bits_of(largest) >> 23) - 126;  // largest < 2^exponent
  return float_of(static_cast<uint32_t>(127 + 30 - (exponent < -90 ? -90 : exponent)) << 23);
}

// The largest magnitude of all that was added, NaN where one was not finite.
struct Magnitude {
  vf most = {}, odd = {};
  FASTLM_MEMBER void add(vf x) {
    const vf magnitude = as_float(as_int(x) & 0x7fffffff);
    most = max(most, magnitude);
    odd += magnitude * 0.0f;
  }
  FASTLM_MEMBER float largest() const { return reduce_max(most) + reduce_add(odd); }
};

// The whole numbers' digits, each from -128 to 127, in the bytes of their lanes.
FASTLM_INLINE vu digits_of(vf x) { return ((vu)_mm512_cvtps_epi32((__m512)x) + 0x80808080u) ^ 0x80808080u; }

// Queries as tiles of 64 bytes of features: word w of a tile's row is what meets bytes 4w to 4w + 3 of a key.
template <class T>
struct alignas(64) QueryTiles {
  uint32_t words[kAttentionDecodeMaxDim * sizeof(T) / 64][kTileWords];
  float factors[kTile];  // of each column

  template <int Stride>
  void fill(const float (*queries)[Stride], int count, int dim) {
    std::memset(words, 0, sizeof(words[0]) * (dim * sizeof(T) / 64));
    std::memset(factors, 0, sizeof(factors));
    for (int q = 0; q < count; ++q) fill(queries[q], q, dim);
  }

 private:
  void set(int64_t word, int part, int q, uint32_t value) {
    words[word / kTile][word % kTile * kTile + part * kQueries + q] = value;
  }
  void fill(const float* query, int q, int dim) {
    if (sizeof(T) == 2) {
      for (int d = 0; d < dim; d += 2 * kLanes) {
        vf low = load(query + d), high = load(query + d + kLanes);
        deal(low, high, std::make_integer_sequence<int, kLanes>());
        for (int i = 0; i < kParts; ++i) {
          // Cut off, so that the rest of the rest has no more than 8 bits.
          const vu l = (vu)low & 0xffff0000, h = (vu)high & 0xffff0000, pairs = l >> 16 | h;
          for (int w = 0; w < kLanes; ++w) set(d / 2 + w, i, q, pairs[w]);
          low -= (vf)l;
          high -= (vf)h;
        }
      }
      for (int part = 0; part < kParts; ++part) factors[part * kQueries + q] = 1.0f;
      return;
    }
    Magnitude magnitude;
    for (int d = 0; d < dim; d += kLanes) magnitude.add(load(query + d));
    const float factor = whole_factor(magnitude.largest());
    for (int d = 0; d < dim; d += kLanes) {
      const vu digits = digits_of(load(query + d) * factor);
      for (int part = 0; part < 4; ++part) {
        uint8_t bytes[kLanes];
        _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes), _mm512_cvtepi32_epi8((__m512i)(digits >> (8 * part))));
        for (int i = 0; i < kLanes; i += 4) set((d + i) / 4, part, q, load_as<uint32_t>(bytes + i));
      }
    }
    for (int part = 0; part < 4; ++part)
      factors[part * kQueries + q] = float_of(static_cast<uint32_t>(127 + 8 * part) << 23) / factor;
  }
};

// Of 16 keys' rows, lane p * kQueries + q of each being part p of query q's score: the sums over parts, by query.
FASTLM_INLINE void add_parts(const vf* rows, __m512 (&scores)[kQueries]) {
  __m512 quarter[4];  // of each key i + 4 b the block b of four lanes
  for (int i = 0; i < 4; ++i) {
    constexpr auto lanes = std::make_integer_sequence<int, kLanes>();
    quarter[i] = (__m512)fold<4>(fold<8>(rows[i], rows[i + 8], lanes), fold<8>(rows[i + 4], rows[i + 12], lanes), lanes);
  }
  const __m512 low01 = _mm512_unpacklo_ps(quarter[0], quarter[1]), low23 = _mm512_unpacklo_ps(quarter[2], quarter[3]);
  const __m512 high01 = _mm512_unpackhi_ps(quarter[0], quarter[1]), high23 = _mm512_unpackhi_ps(quarter[2], quarter[3]);
  scores[0] = _mm512_shuffle_ps(low01, low23, 0x44);
  scores[1] = _mm512_shuffle_ps(low01, low23, 0xee);
  scores[2] = _mm512_shuffle_ps(high01, high23, 0x44);
  scores[3] = _mm512_shuffle_ps(high01, high23, 0xee);
}

// The products of 16 keys, `stride` bytes apart, and the queries, for register C by way of register A. Registers 2 and 3
// hold the queries if two are enough.
template <int C, int A, class T>
FASTLM_INLINE void multiply_keys(const QueryTiles<T>& queries, const char* keys, int64_t stride, int tiles,
                                 int32_t (*products)[kTile]) {
  constexpr auto multiply = [](auto b) {
    if constexpr (sizeof(T) == 2)
      asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(b.value));
    else
      asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(b.value));
  };
  asm volatile("tilezero %%tmm%c0" ::"i"(C));
  for (int t = 0; t < tiles; ++t) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(keys + 64 * t), "r"(stride), "i"(A) : "memory");
    if (tiles > 2) FASTLM_TILE_LOAD(2, queries.words[t], 64);
    if (tiles == 2 && t == 1)
      multiply(std::integral_constant<int, 3>());
    else
      multiply(std::integral_constant<int, 2>());
  }
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(products), "r"(int64_t{64}), "i"(C) : "memory");
}

// scores[q][j] of the keys [low, high), Q queries in the tiles, integers without the keys' scales; scores of their
// neighbours in the blocks of 16 are written too, and mean nothing. `Wide` is what a row of scores holds.
template <int Q, int Wide, class T>
static void score_by_tiles(const QueryTiles<T>& queries, Rows<T> keys, Rows<T> values, int64_t low, int64_t high,
                           int dim, float (*scores)[Wide]) {
  alignas(64) int32_t products[Wide][kTile];
  const int tiles = dim * static_cast<int>(sizeof(T)) / 64;
  const int64_t begin = low / kTile * kTile, stride = keys.stride * static_cast<int64_t>(sizeof(T));
  const auto place = [&](int64_t j) { return reinterpret_cast<const char*>(keys.row(j)); };
  if (tiles <= 2) {
    FASTLM_TILE_LOAD(2, queries.words[0], 64);
    FASTLM_TILE_LOAD(3, queries.words[tiles - 1], 64);
  }
  int64_t block = begin;
  for (; block + kTile <= high; block += kTile) {
    for (int64_t i = 0; i < kTile; ++i)
      for (int t = 0; t < tiles; ++t) {
        __builtin_prefetch(place(block + i) + kKeysAhead * stride + 64 * t);
        // Their scales are wanted first, and all at once.
        if (sizeof(T) == 1) __builtin_prefetch(values.row(block + i) + 64 * t);
      }
    // In turns, since a register is busy until its products are stored.
    if (block / kTile % 2 == 0)
      multiply_keys<0, 1>(queries, place(block), stride, tiles, products + block);
    else
      multiply_keys<4, 5>(queries, place(block), stride, tiles, products + block);
  }
  if (block < high) {  // what lies behind the last key is not ours to read
    alignas(64) char copy[kTile][kAttentionDecodeMaxDim * sizeof(T)];
    for (int64_t i = 0; i < kTile; ++i)
      for (int t = 0; t < tiles; ++t)
        std::memcpy(copy[i] + 64 * t, place(block + i < high ? block + i : high - 1) + 64 * t, 64);
    multiply_keys<0, 1>(queries, copy[0], sizeof(copy[0]), tiles, products + block);
  }
  const vf factors = load(queries.factors);
  for (block = begin; block < high; block += kTile) {
    vf rows[kTile];
    __m512 sums[kQueries];
    for (int i = 0; i < kTile; ++i) {
      const vi row = load_as<vi>(products[block + i]);
      rows[i] = sizeof(T) == 2 ? as_float(row) : to_float(row) * factors;
    }
    add_parts(rows, sums);
    for (int q = 0; q < Q; ++q) store(&scores[q][block], (vf)sums[q]);
  }
}

// 64 features of 64 values from `begin` on, four keys' bytes side by side: column c of tile t is feature
// 16 (c / 4) + 4 t + c % 4. Values from `high` on are the last one again.
FASTLM_INLINE void turn(Rows<int8_t> values, int64_t begin, int64_t high, int d, uint8_t (*turned)[kTile][kStep]) {
  for (int64_t i = 0; i < kTile; ++i) {
    const int64_t first = begin + 4 * i;
    const int8_t* from = values.row(first < high ? first : high - 1) + d;
    __m512i row[4];
    for (int64_t k = 0; k < 4; ++k) {
      row[k] = load_as<__m512i>(from);
      if (first + k + 1 < high) from += values.stride;
    }
    const __m512i low01 = _mm512_unpacklo_epi8(row[0], row[1]), low23 = _mm512_unpacklo_epi8(row[2], row[3]);
    const __m512i high01 = _mm512_unpackhi_epi8(row[0], row[1]), high23 = _mm512_unpackhi_epi8(row[2], row[3]);
    _mm512_store_si512(turned[0][i], _mm512_unpacklo_epi16(low01, low23));
    _mm512_store_si512(turned[1][i], _mm512_unpackhi_epi16(low01, low23));
    _mm512_store_si512(turned[2][i], _mm512_unpacklo_epi16(high01, high23));
    _mm512_store_si512(turned[3][i], _mm512_unpackhi_epi16(high01, high23));
  }
}
FASTLM_INLINE void multiply_values(const uint8_t (*digits)[kStep], const uint8_t (*turned)[kTile][kStep]) {
  FASTLM_TILE_LOAD(4, digits, 64);
  FASTLM_TILE_LOAD(5, turned[0], 64);
  FASTLM_TILE_MULTIPLY_BYTES(0, 4, 5);
  FASTLM_TILE_LOAD(6, turned[1], 64);
  FASTLM_TILE_MULTIPLY_BYTES(1, 4, 6);
  FASTLM_TILE_LOAD(7, turned[2], 64);
  FASTLM_TILE_MULTIPLY_BYTES(2, 4, 7);
  FASTLM_TILE_LOAD(5, turned[3], 64);
  FASTLM_TILE_MULTIPLY_BYTES(3, 4, 5);
}

// sums[q][d] = the sum of weights[q][j] * values[j][d] over [low, high), integers without their scales, which the
// weights have in them. Weights are 0 from low / 64 * 64 to low and from high to the next multiple of 64.
template <int Q>
static void add_values_by_tiles(float* const* sums, const float* const* weights, Rows<int8_t> values, int64_t low,
                                int64_t high, int dim) {
  alignas(64) uint8_t digits[256 / kStep][kTile][kStep];
  const int64_t begin = low / kStep * kStep, steps = (high - begin + kStep - 1) / kStep;
  float factors[Q];
  std::memset(digits, 0, sizeof(digits[0]) * steps);
  for (int q = 0; q < Q; ++q) {
    Magnitude magnitude;
    for (int64_t j = begin; j < begin + steps * kStep; j += kLanes) magnitude.add(load(weights[q] + j));
    factors[q] = whole_factor(magnitude.largest());
    for (int64_t s = 0; s < steps; ++s)
      for (int64_t i = 0; i < kStep; i += kLanes) {
        const vu parts = digits_of(load(weights[q] + begin + s * kStep + i) * factors[q]);
        for (int part = 0; part < 4; ++part)
          _mm_store_si128(reinterpret_cast<__m128i*>(&digits[s][part * kQueries + q][i]),
                          _mm512_cvtepi32_epi8((__m512i)(parts >> (8 * part))));
      }
  }
  for (int d = 0; d < dim; d += 64) {
    FASTLM_TILE_ZERO(0);
    FASTLM_TILE_ZERO(1);
    FASTLM_TILE_ZERO(2);
    FASTLM_TILE_ZERO(3);
    // A step's values are turned while the unit is at those of the step before.
    alignas(64) uint8_t turned[2][4][kTile][kStep];
    for (int64_t s = 0; s < steps; ++s) {
      turn(values, begin + s * kStep, high, d, turned[s % 2]);
      if (s > 0) multiply_values(digits[s - 1], turned[(s - 1) % 2]);
    }
    multiply_values(digits[steps - 1], turned[(steps - 1) % 2]);
    alignas(64) int32_t products[4][kTile][kTile];
    FASTLM_TILE_STORE(0, products[0], 64);
    FASTLM_TILE_STORE(1, products[1], 64);
    FASTLM_TILE_STORE(2, products[2], 64);
    FASTLM_TILE_STORE(3, products[3], 64);
    for (int q = 0; q < Q; ++q) {
      __m512 found[4];
      for (int t = 0; t < 4; ++t) {
        vf sum = {};
        for (int part = 3; part >= 0; --part) sum = sum * 256.0f + to_float(load_as<vi>(products[t][part * kQueries + q]));
        found[t] = (__m512)(sum * (1.0f / factors[q]));
      }
      const __m512 even01 = _mm512_shuffle_f32x4(found[0], found[1], 0x88);
      const __m512 odd01 = _mm512_shuffle_f32x4(found[0], found[1], 0xdd);
      const __m512 even23 = _mm512_shuffle_f32x4(found[2], found[3], 0x88);
      const __m512 odd23 = _mm512_shuffle_f32x4(found[2], found[3], 0xdd);
      store(sums[q] + d, (vf)_mm512_shuffle_f32x4(even01, even23, 0x88));
      store(sums[q] + d + 16, (vf)_mm512_shuffle_f32x4(odd01, odd23, 0x88));
      store(sums[q] + d + 32, (vf)_mm512_shuffle_f32x4(even01, even23, 0xdd));
      store(sums[q] + d + 48, (vf)_mm512_shuffle_f32x4(odd01, odd23, 0xdd));
    }
  }
}
#else
template <class T>
struct QueryTiles {
  template <int Stride>
  void fill(const float (*)[Stride], int, int) {}
};
#endif

}  // namespace FASTLM_ISA
}  // namespace fastlm
