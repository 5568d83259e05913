// Integer products of many rows of input, rounded to 15 bits, on the unit that multiplies tiles of bytes (AMX).
//
// Eight rows of two parts are the 16 rows of one tile, and 32 weights of 16 outputs, interleaved, are the other. Each
// block has its own scales, so sums leave the unit after every product. They are the integers of integer_tile, and the
// float operations on them are the same: not a bit of a result depends on which of the two made it.
#pragma once

#include <type_traits>

#include "fastlm/matmul.h"
#include "linear_integer.h"

namespace fastlm {
namespace FASTLM_ISA {

constexpr int kTileRows = 8;    // of input
constexpr int kFewestRows = 5;  // in a tile; integer_tile is quicker for 4

// 32 rounded inputs of 8 rows: what 8 InputBlocks have.
struct alignas(32) InputTile {
  int8_t codes[2][kTileRows][kBlock];  // the first parts of all rows, then the second ones
  float scales[kTileRows], sums[kTileRows];
  int32_t minus_8[kTileRows], minus_128[kTileRows];
};
static_assert(sizeof(InputTile) <= kTileRows * sizeof(InputBlock), "InputTiles take the place of InputBlocks");

// Block `b` of rows m0 .. m0 + 7; those that do not exist are zeros.
FASTLM_INLINE void round_tile(const LinearArgs& a, int64_t m0, int64_t b, InputTile& tile) {
  for (int m = 0; m < kTileRows; ++m) {
    InputBlock block{};
    if (m0 + m < a.rows) round_input<Rounding::kBits15>(a.input + (m0 + m) * a.columns + b * kBlock, block);
    std::memcpy(tile.codes[0][m], block.first, kBlock);
    std::memcpy(tile.codes[1][m], block.second, kBlock);
    tile.scales[m] = block.scales[0];
    tile.sums[m] = block.sum;
    tile.minus_8[m] = block.minus_8[0];
    tile.minus_128[m] = 16 * block.minus_8[0];
  }
}

#if defined(__AVX512VNNI__)
// Registers: 0 to 3 sums, 4 and 5 inputs, 6 and 7 weights. Assembly, since GCC's own intrinsics do not say that they
// read memory.
class IntegerTiles {
 public:
  IntegerTiles() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, kBlock, kBlock, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, kBlock / 4, kBlock / 4};
    } const config;
    asm volatile("ldtilecfg %0" ::"m"(config) : "memory");
  }
  IntegerTiles(const IntegerTiles&) = delete;
  ~IntegerTiles() { asm volatile("tilerelease" ::: "memory"); }
};
template <int R>
FASTLM_INLINE void load_tile(const void* p, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(R) : "memory");
}
template <int R>
FASTLM_INLINE void store_tile(void* p) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(int64_t{64}), "i"(R) : "memory");
}
template <int Sum, int Signed, int Unsigned>
FASTLM_INLINE void multiply_tiles() {
  asm volatile("tilezero %%tmm%c0\n\ttdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sum), "i"(Signed), "i"(Unsigned));
}

// Outputs first .. first + valid - 1 (valid <= 16), whose weights are the `panel`, for the rows of the input from m0,
// of which there are G times 8 in tiles.
template <WeightKind kind, int G>
static __attribute__((noinline)) void integer_tile_amx(const LinearArgs& a, const LinearWeight& w, const uint8_t* panel,
                                                       int64_t first, int64_t m0) {
  constexpr int64_t kStep = panel_bytes(kind, kBlock), kHeader = kLanes * (kind == WeightKind::kQ4_1 ? 4 : 2);
  constexpr int64_t kAhead = 12288;  // 4 KB, as for fewer rows: 6 to 9% slower
  constexpr int kVector = kLanes * 4, kSlots = 4;
  constexpr bool nibbles = kind != WeightKind::kQ8_0;
  const int64_t blocks = a.columns / kBlock;
  const InputTile* const x = reinterpret_cast<const InputTile*>(a.scratch) + m0 / kTileRows * blocks;
  vf sums[G][kTileRows] = {};
  // What the vector unit writes and the tile unit reads, or the other way round, has a few blocks' time on its way.
  alignas(64) uint8_t codes[kSlots][kBlock / 4][kVector];
  alignas(64) int32_t products[kSlots][G][2][kTileRows][kLanes];

  const auto expand = [&](int64_t b) {
    if (b >= blocks) return;
    const uint8_t* const p = panel + b * kStep;
    for (int j = 0; nibbles && j < 4; ++j) {
      const vbyte packed = load_as<vbyte>(p + kHeader + j * kVector);
      const vbyte low = packed & 15, high = (vbyte)((vi)packed >> 4) & 15;
      std::memcpy(codes[b % kSlots][j], &low, kVector);
      std::memcpy(codes[b % kSlots][4 + j], &high, kVector);
    }
  };
  const auto multiply = [&](int64_t b, auto odd) {
    constexpr int kOdd = decltype(odd)::value;
    if (b >= blocks) return;
    const uint8_t* const p = panel + b * kStep;
    // Here, since GCC drops calls of lambdas that do nothing but fetch.
    for (int64_t line = 0; line < kStep; line += 64) __builtin_prefetch(p + kAhead + line, 0, 2);
    load_tile<6 + kOdd>(nibbles ? codes[b % kSlots][0] : p + kHeader, kVector);
    load_tile<4>(x[b].codes, kBlock);
    multiply_tiles<kOdd, 4, 6 + kOdd>();
    if constexpr (G == 2) {
      load_tile<5>(x[b + blocks].codes, kBlock);
      multiply_tiles<2 + kOdd, 5, 6 + kOdd>();
    }
  };
  const auto fetch = [&](int64_t b, auto odd) {
    constexpr int kOdd = decltype(odd)::value;
    if (b >= blocks) return;
    store_tile<kOdd>(products[b % kSlots][0]);
    if constexpr (G == 2) store_tile<2 + kOdd>(products[b % kSlots][1]);
  };
  const auto finish = [&](int64_t b) {
    const vf scale = load_halves(panel + b * kStep);
    vf minimum{};
    if constexpr (kind == WeightKind::kQ4_1) minimum = load_halves(panel + b * kStep + 2 * kLanes);
#pragma GCC unroll 2
    for (int g = 0; g < G; ++g) {
      const InputTile& input = x[b + g * blocks];
#pragma GCC unroll 8
      for (int m = 0; m < kTileRows; ++m) {
        const auto& parts = products[b % kSlots][g];
        vi dot = (load_as<vi>(parts[0][m]) << 7) + load_as<vi>(parts[1][m]);
        if constexpr (added_to_codes(kind) == 8) dot += input.minus_8[m];
        if constexpr (added_to_codes(kind) == 128) dot += input.minus_128[m];
        add_block<kind>(sums[g][m], to_float(dot) * input.scales[m], scale, minimum, input.sums[m]);
      }
    }
  };
  constexpr std::integral_constant<int, 0> even;
  constexpr std::integral_constant<int, 1> odd;
  for (int64_t b = 0; b < kSlots - 1; ++b) expand(b);
  multiply(0, even);
  fetch(0, even);
  multiply(1, odd);
  for (int64_t b = 0; b < blocks; b += 2) {
    expand(b + kSlots - 1);
    fetch(b + 1, odd);
    multiply(b + 2, even);
    finish(b);
    if (b + 1 == blocks) break;
    expand(b + kSlots);
    fetch(b + 2, even);
    multiply(b + 3, odd);
    finish(b + 1);
  }
#pragma GCC unroll 2
  for (int g = 0; g < G; ++g)
#pragma GCC unroll 8
    for (int m = 0; m < kTileRows; ++m)
      if (m0 + g * kTileRows + m < a.rows) write_outputs(w, m0 + g * kTileRows + m, first, sums[g][m]);
}

// How many of the rows, from the first on, come as InputTiles.
FASTLM_INLINE int64_t rows_in_tiles(const LinearArgs& a) {
  const int64_t rest = a.rows % kTileRows;
  if (a.rounding != Rounding::kBits15 || a.rows < kFewestRows || !matmul_tiles()) return 0;
  return rest < kFewestRows ? a.rows - rest : a.rows;
}

// Outputs begin .. end - 1 of the rows from m on that come in G tiles or more; those that follow come later.
template <WeightKind kind, int G>
FASTLM_INLINE void tiled_products(const LinearArgs& a, const LinearWeight& w, int64_t begin, int64_t end, int64_t& m) {
  const int64_t bytes = panel_bytes(kind, a.columns), tiled = rows_in_tiles(a);
  if (m >= tiled) return;
  const IntegerTiles unit;
  const uint8_t* const panels = static_cast<const uint8_t*>(w.weight);
  for (; m + (G - 1) * kTileRows < tiled; m += G * kTileRows)
    for (int64_t n = begin; n < end; n += kLanes) integer_tile_amx<kind, G>(a, w, panels + n / kLanes * bytes, n, m);
  if (m > tiled) m = tiled;
}
#else
FASTLM_INLINE int64_t rows_in_tiles(const LinearArgs&) { return 0; }
template <WeightKind, int>
FASTLM_INLINE void tiled_products(const LinearArgs&, const LinearWeight&, int64_t, int64_t, int64_t&) {}
#endif

}  // namespace FASTLM_ISA
}  // namespace fastlm
