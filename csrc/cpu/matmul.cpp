// Both matrices are packed into tiles of 16 by 16 words, a word being two neighbours in k: of a [row][k / 2], of b
// [k / 2][column]. All of b is packed first, by all threads; then each thread takes rows of c, 32 at a time.
#include "fastlm/matmul.h"

#include "amx.h"
#include "attention_tile.h"
#include "bfloat.h"
#include "threads.h"

namespace fastlm {
namespace FASTLM_ISA {
namespace {

constexpr int64_t kBlock = 2 * kTile;  // rows and columns of c at a time
constexpr int64_t kWorthAThread = 1 << 21;  // multiplications below which waking a second thread costs more than it saves

int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }

template <typename T>
FASTLM_INLINE uint32_t rounded(T x) {
  if constexpr (sizeof(T) == 2) {
    return x;
  } else {
    const uint32_t bits = bits_of(x);
    if (x != x) return bits >> 16 | 0x40;  // rounding could make NaN an infinity
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  }
}

// kLanes numbers as bfloat16 in the low halves of words.
FASTLM_INLINE vu words(const float* p) { return __builtin_convertvector(to_bfloats(load(p)), vu); }
FASTLM_INLINE vu words(const uint16_t* p) { return __builtin_convertvector(load_as<vhalf_lanes>(p), vu); }

FASTLM_INLINE void flip(uint32_t* tile) {
  if constexpr (kLanes == kTile) {
    vf rows[kLanes];
    for (int i = 0; i < kLanes; ++i) rows[i] = load_as<vf>(tile + i * kTile);
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

// The tile of words [i][p] of the numbers (i, k) for 16 i and 32 k; (i, k) is at from[i * stride + k] or, `Across`, at
// from[k * stride + i], when the tile comes out as [p][i]. Only `rows` and `depth` of them exist; the others are 0.
template <typename T, bool Across>
FASTLM_INLINE void gather(const T* from, int64_t stride, int64_t rows, int64_t depth, uint32_t* tile) {
  if (rows < kTile || depth < kDepth) {
    for (int64_t i = 0; i < kTile; ++i)
      for (int64_t p = 0; p < kTile; ++p) {
        uint32_t word = 0;
        for (int64_t h = 0; h < 2; ++h) {
          const int64_t k = 2 * p + h;
          if (i < rows && k < depth) word |= rounded(from[Across ? k * stride + i : i * stride + k]) << 16 * h;
        }
        tile[Across ? p * kTile + i : i * kTile + p] = word;
      }
  } else if constexpr (Across) {
    for (int64_t p = 0; p < kTile; ++p)
      for (int64_t i = 0; i < kTile; i += kLanes) {
        const vu word = words(from + 2 * p * stride + i) | words(from + (2 * p + 1) * stride + i) << 16;
        std::memcpy(tile + p * kTile + i, &word, sizeof(word));
      }
  } else {
    for (int64_t i = 0; i < kTile; ++i)
      if constexpr (sizeof(T) == 2) {
        std::memcpy(tile + i * kTile, from + i * stride, kTile * sizeof(uint32_t));
      } else {
        for (int64_t k = 0; k < kDepth; k += kLanes) {
          const vhalf_lanes halves = to_bfloats(load(from + i * stride + k));
          std::memcpy(reinterpret_cast<uint16_t*>(tile + i * kTile) + k, &halves, sizeof(halves));
        }
      }
  }
}

// The tile of the rows of a from `row`, or of the columns of b, whose words come first, and of k from `at`. `across`:
// what has the same k lies side by side.
FASTLM_INLINE void pack_tile(const MatmulInput& x, bool across, bool words_first, int64_t row, int64_t rows, int64_t at,
                             int64_t k, uint32_t* tile) {
  const int64_t first = across ? at * x.stride + row : row * x.stride + at;
  const uint16_t* halves = static_cast<const uint16_t*>(x.data) + first;
  const float* floats = static_cast<const float*>(x.data) + first;
  if (across)
    x.bfloats ? gather<uint16_t, true>(halves, x.stride, rows - row, k - at, tile)
              : gather<float, true>(floats, x.stride, rows - row, k - at, tile);
  else
    x.bfloats ? gather<uint16_t, false>(halves, x.stride, rows - row, k - at, tile)
              : gather<float, false>(floats, x.stride, rows - row, k - at, tile);
  if (across != words_first) flip(tile);
}

// The panels [low, high), 16 of `rows` each with all k, to tiles [high - low][steps]: in the order in which x lies.
static __attribute__((noinline)) void pack(const MatmulInput& x, bool across, bool words_first, int64_t low,
                                           int64_t high, int64_t rows, int64_t k, uint32_t* tiles) {
  const int64_t panel = ceil_div(k, kDepth) * kTileWords;
  const auto one = [&](int64_t p, int64_t at) {
    pack_tile(x, across, words_first, p * kTile, rows, at, k, tiles + (p - low) * panel + at / kDepth * kTileWords);
  };
  if (across)
    for (int64_t at = 0; at < k; at += kDepth)
      for (int64_t p = low; p < high; ++p) one(p, at);
  else
    for (int64_t p = low; p < high; ++p)
      for (int64_t at = 0; at < k; at += kDepth) one(p, at);
}

// sums [2][2] tiles = a [2][steps] tiles times b [2][steps] tiles.
static __attribute__((noinline)) void multiply_floats(const uint32_t* a, const uint32_t* b, int64_t steps, float* sums) {
  constexpr int kVectors = kTile / kLanes;
  for (int64_t i = 0; i < 2; ++i)
    for (int64_t j = 0; j < 2; ++j)
      for (int64_t r = 0; r < kTile; ++r) {
        vf sum[kVectors] = {};
        for (int64_t s = 0; s < steps; ++s)
          for (int64_t p = 0; p < kTile; ++p) {
            const uint32_t word = a[((i * steps + s) * kTile + r) * kTile + p];
            const float low = float_of(word << 16), high = float_of(word & 0xffff0000);
            for (int v = 0; v < kVectors; ++v) {
              const vi other = load_as<vi>(b + ((j * steps + s) * kTile + p) * kTile + v * kLanes);
              sum[v] += as_float(other << 16) * low;
              sum[v] += as_float(other & static_cast<int32_t>(0xffff0000)) * high;
            }
          }
        for (int v = 0; v < kVectors; ++v) store(sums + ((i * 2 + j) * kTile + r) * kTile + v * kLanes, sum[v]);
      }
}

#if defined(__AVX512F__)
// As multiply_floats, by tile registers: 0 to 3 sums, 4 and 5 of a, 6 and 7 of b.
static __attribute__((noinline)) void multiply_tiles(const uint32_t* a, const uint32_t* b, int64_t steps, float* sums) {
  const uint32_t *a2 = a + steps * kTileWords, *b2 = b + steps * kTileWords;
  FASTLM_TILE_ZERO(0);
  FASTLM_TILE_ZERO(1);
  FASTLM_TILE_ZERO(2);
  FASTLM_TILE_ZERO(3);
  for (int64_t s = 0; s < steps; ++s, a += kTileWords, a2 += kTileWords, b += kTileWords, b2 += kTileWords) {
    FASTLM_TILE_LOAD(4, a, 64);
    FASTLM_TILE_LOAD(6, b, 64);
    FASTLM_TILE_LOAD(7, b2, 64);
    FASTLM_TILE_MULTIPLY(0, 4, 6);
    FASTLM_TILE_LOAD(5, a2, 64);
    FASTLM_TILE_MULTIPLY(1, 4, 7);
    FASTLM_TILE_MULTIPLY(2, 5, 6);
    FASTLM_TILE_MULTIPLY(3, 5, 7);
  }
  FASTLM_TILE_STORE(0, sums, 64);
  FASTLM_TILE_STORE(1, sums + kTileWords, 64);
  FASTLM_TILE_STORE(2, sums + 2 * kTileWords, 64);
  FASTLM_TILE_STORE(3, sums + 3 * kTileWords, 64);
}

#endif

class Multiplier : TileUnit {
 public:
  void operator()(const uint32_t* a, const uint32_t* b, int64_t steps, float* sums) const {
#if defined(__AVX512F__)
    if (tiles()) return multiply_tiles(a, b, steps, sums);
#endif
    multiply_floats(a, b, steps, sums);
  }
  // Rounds two vectors to 32 neighbours, by the instruction that processors with such tiles have.
  bool narrow([[maybe_unused]] const vf* v, [[maybe_unused]] uint16_t* to) const {
#if defined(__AVX512F__)
    if (tiles()) {
      vf halves;
      asm("vcvtne2ps2bf16 %2, %1, %0" : "=v"(halves) : "v"(v[1]), "v"(v[0]));
      std::memcpy(to, &halves, sizeof(halves));
      return true;
    }
#endif
    return false;
  }
};

// Writes one block of c from its four tiles.
template <bool Bfloats>
FASTLM_INLINE void write(const Matmul& x, const Multiplier& multiplier, const float* sums, int64_t row,
                         int64_t column) {
  const int64_t rows = x.m - row < kBlock ? x.m - row : kBlock;
  char* to = static_cast<char*>(x.c) + row * x.n * (Bfloats ? 2 : 4);
  for (int64_t r = 0; r < rows; ++r, to += x.n * (Bfloats ? 2 : 4)) {
    const float* const from = sums + (r / kTile * 2 * kTile + r % kTile) * kTile;
    vf v[kBlock / kLanes];
#pragma GCC unroll 8
    for (int i = 0; i < kBlock / kLanes; ++i) {
      v[i] = load(from + i * kLanes / kTile * kTileWords + i * kLanes % kTile);
      if (x.bias) v[i] += load_until(x.bias, column + i * kLanes < x.n ? column + i * kLanes : x.n, x.n, 0.0f);
    }
    if (Bfloats && column + kBlock <= x.n && multiplier.narrow(v, reinterpret_cast<uint16_t*>(to) + column)) continue;
#pragma GCC unroll 8
    for (int i = 0; i < kBlock / kLanes; ++i)
      if (column + i * kLanes < x.n) At<Bfloats>::store(to, column + i * kLanes, x.n, v[i]);
  }
}

}  // namespace

int64_t matmul_scratch(const Matmul& x) {
  const int64_t steps = ceil_div(x.k, kDepth), panels = 2 * ceil_div(x.n, kBlock);
  return (panels + 2 * x.threads) * steps * kTileWords * static_cast<int64_t>(sizeof(uint32_t));
}

void matmul(const Matmul& x) {
  const int64_t steps = ceil_div(x.k, kDepth), panels = 2 * ceil_div(x.n, kBlock), panel = steps * kTileWords;
  const int64_t useful = x.m * x.n * x.k / kWorthAThread;
  parallel(useful < x.threads ? static_cast<int>(useful) : x.threads, [&](int thread, int threads, Barrier& barrier) {
    uint32_t* const b = static_cast<uint32_t*>(x.scratch);
    uint32_t* const a = b + (panels + 2 * thread) * panel;
    const Range mine = share(panels, thread, threads);
    pack(x.b, !x.b.transposed, true, mine.begin, mine.end, x.n, x.k, b + mine.begin * panel);
    barrier.wait();
    alignas(64) float sums[2][4 * kTileWords];
    const Multiplier multiply;
    const Range rows = share(x.m, thread, threads, kBlock);
    for (int64_t row = rows.begin; row < rows.end; row += kBlock) {
      pack(x.a, x.a.transposed, false, row / kTile, row / kTile + 2, x.m, x.k, a);
      // A block is written while the next one is multiplied.
      for (int64_t column = 0, turn = 0; column < x.n + kBlock; column += kBlock, turn ^= 1) {
        if (column < x.n) multiply(a, b + column / kTile * panel, steps, sums[turn]);
        if (column == 0) continue;
        x.bfloats ? write<true>(x, multiply, sums[turn ^ 1], row, column - kBlock)
                  : write<false>(x, multiply, sums[turn ^ 1], row, column - kBlock);
      }
    }
  });
}

}  // namespace FASTLM_ISA
}  // namespace fastlm
