// Packing into digits, and a product of two matrices by them.
#include "digits.h"

#include "amx.h"
#include "attention_tile.h"
#include "fastlm/pack.h"
#include "recurrence_digits.h"
#include "simd_math.h"

namespace fastlm {
namespace FASTLM_ISA {

namespace {

int64_t padded_depth(int64_t k, int64_t groups) { return panels_for(k / groups, kTileHeight) * kTileHeight * groups; }

// Of 16 columns as parts.
int64_t parts_bytes(int64_t k) {
  return panels_for(k, kDepth) * kParts * kTileWords * static_cast<int64_t>(sizeof(uint32_t));
}

int64_t blocks_of(int64_t n, int64_t gates) {  // of 16 columns
  return gates != 0 ? panels_for(n / gates, kLanes) * gates : panels_for(n, kPanel) * 4;
}

// Of 16 columns.
int64_t block_bytes(int64_t k, int64_t groups) {
  return groups == 0 ? parts_bytes(k) : digit_column_block(padded_depth(k, groups));
}

#if defined(__AVX512F__)
// Sixteen columns of the source, some of them beyond its end.
struct Columns {
  const float* source;
  int64_t k, groups, stride_k, stride_n;
  int valid;

  // Number of the row in the source of the row `at`, a multiple of 16, of the padded ones, and how many there are of 16.
  int64_t row(int64_t at, int64_t& rows) const {
    const int64_t size = k / groups, padded = panels_for(size, kTileHeight) * kTileHeight;
    const int64_t group = at / padded, within = at - group * padded;
    rows = group >= groups ? 0 : size - within < kTileHeight ? size - within : kTileHeight;
    return group * size + within;
  }

  // The 16 padded rows from `at`, a vector of columns each.
  void load_rows(int64_t at, vf (&to)[kTileHeight]) const {
    int64_t rows;
    const float* const from = source + row(at, rows) * stride_k;
    if (rows == kTileHeight && valid == kLanes && stride_k == 1) {
      for (int i = 0; i < kLanes; ++i) to[i] = load(from + i * stride_n);
      transpose(to);
    } else if (stride_n == 1) {
      for (int64_t i = 0; i < kTileHeight; ++i) to[i] = i < rows ? load_partial_or_all(from + i * stride_k) : vf{};
    } else {
      for (int64_t i = 0; i < kTileHeight; ++i)
        for (int lane = 0; lane < kLanes; ++lane)
          to[i][lane] = i < rows && lane < valid ? from[i * stride_k + lane * stride_n] : 0.0f;
    }
  }

  vi largest() const {
    vi most{};
    if (stride_k == 1) {
      for (int lane = 0; lane < valid; ++lane) most[lane] = largest_magnitude(source + lane * stride_n, k);
      return most;
    }
    for (int64_t at = 0; at < padded_depth(k, groups); at += kTileHeight) {
      vf rows[kTileHeight];
      load_rows(at, rows);
      for (const vf& v : rows) most = larger(most, magnitudes(v));
    }
    return most;
  }

 private:
  vf load_partial_or_all(const float* p) const { return valid == kLanes ? load(p) : load_partial(p, valid); }
};

// Four numbers of k of each of 16 columns as the words of each digit's tile.
FASTLM_INLINE void digit_words(const vf* of_k, vf scale, vi (&words)[kDigits]) {
  vi d[4];
  for (int j = 0; j < 4; ++j) d[j] = to_digits(of_k[j] * scale);
  for (int digit = 0; digit < kDigits; ++digit) {
    words[digit] = vi{};
    for (int j = 0; j < 4; ++j) words[digit] |= (d[j] >> (16 - 8 * digit) & 0xff) << (8 * j);
  }
}

FASTLM_INLINE void column_scales(vi largest, vf& scale, vf& unit) {
  for (int lane = 0; lane < kLanes; ++lane) {
    const DigitScale by = digit_scale(largest[lane]);
    scale[lane] = by.scale;
    unit[lane] = by.unit;
  }
}

// One block of 16 columns: their units, then their tiles.
DigitColumns pack_block(const Columns& columns, uint8_t* to) {
  const vi largest = columns.largest();
  vf scale, unit, squares{};
  column_scales(largest, scale, unit);
  store(reinterpret_cast<float*>(to), unit * 65536.0f);  // what the three sums are multiples of
  to += kTileHeight * sizeof(float);
  const int64_t depth = padded_depth(columns.k, columns.groups);
  for (int64_t at = 0; at < digit_steps(depth) * kTileDepth; at += kTileHeight) {
    vf rows[kTileHeight];
    columns.load_rows(at, rows);
    for (const vf& row : rows) squares += row * row;
    uint8_t* const tile = to + at / kTileDepth * kDigits * kTileBytes + at % kTileDepth / 4 * 64;
    for (int64_t word = 0; word < kTileHeight / 4; ++word) {
      vi words[kDigits];
      digit_words(rows + word * 4, scale, words);
      for (int digit = 0; digit < kDigits; ++digit)
        std::memcpy(tile + digit * kTileBytes + word * 64, &words[digit], sizeof(vi));
    }
  }
  return {reduce_max(sqrt(squares)), float_of(static_cast<uint32_t>(largest_of(largest)))};
}

// The same block as bfloat16 parts.
void pack_parts(const Columns& columns, uint32_t* to) {
  for (int64_t at = 0; at < columns.k; at += kDepth, to += kParts * kTileWords) {
    vf low[kTile], high[kTile];
    columns.load_rows(at, low);
    columns.load_rows(at + kTile, high);
    for (int64_t p = 0; p < kTile; ++p) {
      vu parts[kParts];
      split(low[p], high[p], parts);
      for (int j = 0; j < kParts; ++j) std::memcpy(to + j * kTileWords + p * kTile, &parts[j], sizeof(parts[j]));
    }
  }
}

// Sixteen rows, or `valid` of them, that lie across: number (row, i) is at from[i * stride + row]. `copy` is [k][16].
void put_across(const float* from, int64_t stride, int valid, const DigitRows& to, float* copy, float* units) {
  vi most{};
  for (int64_t i = 0; i < to.k; ++i) {  // once from where they are far apart
    const vf x = load_until(from + i * stride, 0, valid, 0.0f);
    most = larger(most, magnitudes(x));
    store(copy + i * kLanes, x);
  }
  vf scale, unit;
  column_scales(most, scale, unit);
  store(units, unit);
  for (int64_t at = 0; at < to.k; at += kTileDepth) {
    vf words[kDigits][kTileHeight];
    for (int64_t word = 0; word < kTileHeight; ++word) {
      vf x[4];
      for (int j = 0; j < 4; ++j) x[j] = at + 4 * word + j < to.k ? load(copy + (at + 4 * word + j) * kLanes) : vf{};
      vi bytes[kDigits];
      digit_words(x, scale, bytes);
      for (int digit = 0; digit < kDigits; ++digit) words[digit][word] = as_float(bytes[digit]);
    }
    for (int digit = 0; digit < kDigits; ++digit) {
      transpose(words[digit]);
      std::memcpy(to.at(0, at) + digit * kTileBytes, words[digit], kTileBytes);
    }
  }
}

// Of k at a time: a strip of rows stays in the level-1 cache, the second matrix's part in level 2.
int64_t depth_at_a_time(const DigitMatmul& x) {
  constexpr int64_t kMostDepth = 512;
  return digit_steps(panels_for(x.k, panels_for(x.k, kMostDepth))) * kTileDepth;  // even ones
}
int64_t bytes_per_thread(int64_t k) { return digit_strip(k) + k * kLanes * static_cast<int64_t>(sizeof(float)); }

void multiply(const DigitMatmul& x, int thread, int threads, Barrier& barrier) {
  const int64_t most = depth_at_a_time(x), panels = panels_for(x.n, kPanel);
  uint8_t* const columns = static_cast<uint8_t*>(x.scratch);
  uint8_t* const own = columns + panels * 4 * digit_column_block(most) + thread * bytes_per_thread(most);
  DigitTiles tiles;
  tiles.set_rows(kTileHeight);
  for (int64_t k = 0; k < x.k; k += most) {
    const int64_t depth = x.k - k < most ? x.k - k : most, block = digit_column_block(depth);
    const Range mine = share(panels * 4, thread, threads);
    for (int64_t i = mine.begin; i < mine.end; ++i) {
      const int64_t left = x.n - i * kLanes;
      const int valid = static_cast<int>(left < 0 ? 0 : left < kLanes ? left : kLanes);
      pack_block({x.b + k * x.b_stride + i * kLanes, depth, 1, x.b_stride, 1, valid}, columns + i * block);
    }
    barrier.wait();
    const Range strips = share(panels_for(x.m, kTileHeight), thread, threads);
    for (int64_t strip = strips.begin; strip < strips.end; ++strip) {
      const int64_t row = strip * kTileHeight, count = x.m - row < kTileHeight ? x.m - row : kTileHeight;
      const DigitRows rows = {own, depth};
      alignas(64) float units[kTileHeight] = {};
      if (x.a_across)
        put_across(x.a + k * x.a_stride + row, x.a_stride, static_cast<int>(count), rows,
                   reinterpret_cast<float*>(own + digit_strip(most)), units);
      else
        for (int64_t i = 0; i < count; ++i) put_row(x.a + (row + i) * x.a_stride + k, depth, rows, i, units + i);
      for (int64_t p = 0; p < panels; ++p) {
        alignas(64) float sums[kTileHeight * kPanel] = {};
        digit_product(rows, {units, nullptr, count, 1}, count, columns + p * 4 * block, sums, kPanel);
        for (int64_t i = 0; i < count; ++i)
          for (int64_t at = p * kPanel; at < (p + 1) * kPanel && at < x.n; at += kLanes) {
            float* const to = x.c + (row + i) * x.n + at;
            const int lanes = x.n - at < kLanes ? static_cast<int>(x.n - at) : kLanes;
            const vf sum = load(sums + i * kPanel + at - p * kPanel);
            if (lanes == kLanes)
              store(to, k == 0 ? sum : load(to) + sum);
            else
              store_partial(to, k == 0 ? sum : load_partial(to, lanes) + sum, lanes);
          }
      }
    }
    barrier.wait();
  }
}
#endif

}  // namespace

int64_t digit_matmul_scratch(const DigitMatmul& x) {
#if defined(__AVX512F__)
  const int64_t k = depth_at_a_time(x);
  return panels_for(x.n, kPanel) * 4 * digit_column_block(k) + x.threads * bytes_per_thread(k);
#else
  return x.threads;
#endif
}

void digit_matmul(const DigitMatmul& x) {
#if defined(__AVX512F__)
  constexpr int64_t kWorthAThread = 1 << 22;  // multiplications
  const int64_t useful = x.m * x.n * x.k / kWorthAThread;
  parallel(useful < x.threads ? static_cast<int>(useful) : x.threads,
           [&](int thread, int threads, Barrier& barrier) { multiply(x, thread, threads, barrier); });
#else
  (void)x;
#endif
}

int64_t packed_digits_size(int64_t k, int64_t n, int64_t gates, int64_t k_groups) {
  const auto summary = static_cast<int64_t>(sizeof(DigitColumns));
  return blocks_of(n, gates) * block_bytes(k, k_groups) + (k_groups == 0 ? 0 : summary);
}

int64_t inputs_in_digits(const InputsInDigits& a) {
  constexpr int64_t kWorthAThread = 1 << 16;  // numbers
  const int64_t useful = a.rows * a.k / kWorthAThread;
  const RowErrors errors(a.w_ih, a.k, blocks_of(a.n, a.gates), a.normalised);
  int64_t coarse = 0;
  parallel(useful < 1 ? 1 : useful < a.threads ? static_cast<int>(useful) : a.threads,
           [&](int thread, int threads, Barrier&) {
             const Range own = share(a.rows, thread, threads);
             for (int64_t i = own.begin; i < own.end; ++i)
               if (!errors.few(a.input + i * a.k)) return (void)__atomic_store_n(&coarse, 1, __ATOMIC_RELAXED);
           });
  return coarse == 0;
}

namespace {

constexpr float kEven = 7.0f;  // times the root mean square

// Of lanes that have `count` numbers each.
bool even(vf largest, vf squares, int64_t count) {
  return !any(largest * largest * static_cast<float>(count) > kEven * kEven * squares);
}

bool even_rows(const Evenness& a, Range rows) {
  for (int64_t i = rows.begin; i < rows.end; ++i) {
    vi most{};
    vf squares{};
    for (int64_t at = 0; at < a.columns; at += kLanes) {
      const vf x = load_until(a.matrix + i * a.columns, at, a.columns, 0.0f);
      most = larger(most, magnitudes(x));
      squares += x * x;
    }
    const vf row = as_float(vi{} + largest_of(most));
    if (!even(row, broadcast(reduce_add(squares)), a.columns)) return false;
  }
  return true;
}

// Some vectors of columns at a time: whole lines of the cache.
bool even_columns(const Evenness& a, Range vectors) {
  constexpr int64_t kAtOnce = 4;
  for (int64_t v = vectors.begin; v < vectors.end; v += kAtOnce) {
    const int64_t count = vectors.end - v < kAtOnce ? vectors.end - v : kAtOnce;
    vi most[kAtOnce] = {};
    vf squares[kAtOnce] = {};
    for (int64_t i = 0; i < a.rows; ++i)
      for (int64_t w = 0; w < count; ++w) {
        const vf x = load_until(a.matrix + i * a.columns, (v + w) * kLanes, a.columns, 0.0f);
        most[w] = larger(most[w], magnitudes(x));
        squares[w] += x * x;
      }
    for (int64_t w = 0; w < count; ++w)
      if (!even(as_float(most[w]), squares[w], a.rows)) return false;
  }
  return true;
}

}  // namespace

int64_t evenness(const Evenness& a) {
  constexpr int64_t kWorthAThread = 1 << 16;  // numbers
  const int64_t useful = a.rows * a.columns / kWorthAThread;
  int64_t uneven = 0;
  parallel(useful < 1 ? 1 : useful < a.threads ? static_cast<int>(useful) : a.threads,
           [&](int thread, int threads, Barrier&) {
             const bool rows = even_rows(a, share(a.rows, thread, threads));
             const bool columns = even_columns(a, share(panels_for(a.columns, kLanes), thread, threads));
             __atomic_fetch_or(&uneven, (rows ? 0 : 1) | (columns ? 0 : 2), __ATOMIC_RELAXED);
           });
  return 3 & ~uneven;
}

void pack_digits(const PackDigits& a) {
#if defined(__AVX512F__)
  const int64_t units = a.gates != 0 ? a.n / a.gates : a.n, vectors = a.gates != 0 ? a.gates : 4;
  const int64_t blocks = blocks_of(a.n, a.gates);
  const int64_t bytes = block_bytes(a.k, a.k_groups);
  uint8_t* const to = static_cast<uint8_t*>(a.packed);
  float norm = 0, most = 0;
#pragma omp parallel for reduction(max : norm, most) num_threads(a.threads) if (a.threads > 1)
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t panel = block / vectors, v = block % vectors;
    const int64_t first = a.gates != 0 ? panel * kLanes : block * kLanes, left = units - first;
    const float* const source = a.source + (first + (a.gates != 0 ? v * units : 0)) * a.stride_n;
    const int valid = static_cast<int>(left < 0 ? 0 : left < kLanes ? left : kLanes);
    if (a.k_groups == 0) {
      pack_parts({source, a.k, 1, a.stride_k, a.stride_n, valid}, reinterpret_cast<uint32_t*>(to + block * bytes));
      continue;
    }
    const DigitColumns of = pack_block({source, a.k, a.k_groups, a.stride_k, a.stride_n, valid}, to + block * bytes);
    norm = of.norm > norm ? of.norm : norm;
    most = of.most > most ? of.most : most;
  }
  if (a.k_groups == 0) return;
  const DigitColumns all = {norm, most};
  std::memcpy(to + blocks * bytes, &all, sizeof(all));
#else
  (void)a;
#endif
}

}  // namespace FASTLM_ISA
}  // namespace fastlm
