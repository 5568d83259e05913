// Weights as digits for products on tiles of int8.
#include "digits.h"

#include "attention_tile.h"
#include "fastlm/pack.h"
#include "threads.h"

namespace fastlm {
namespace FASTLM_ISA {

namespace {

int64_t padded_depth(int64_t k, int64_t groups) { return panels_for(k / groups, kTileHeight) * kTileHeight * groups; }

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

// One block of 16 columns: their units, then their tiles.
void pack_block(const Columns& columns, uint8_t* to) {
  const vi largest = columns.largest();
  vf scale, unit;
  for (int lane = 0; lane < kLanes; ++lane) {
    const DigitScale by = digit_scale(largest[lane]);
    scale[lane] = by.scale;
    unit[lane] = by.unit * 65536.0f;  // what the three sums are multiples of
  }
  store(reinterpret_cast<float*>(to), unit);
  to += kTileHeight * sizeof(float);
  const int64_t depth = padded_depth(columns.k, columns.groups);
  for (int64_t at = 0; at < digit_steps(depth) * kTileDepth; at += kTileHeight) {
    vf rows[kTileHeight];
    columns.load_rows(at, rows);
    uint8_t* const tile = to + at / kTileDepth * kDigits * kTileBytes + at % kTileDepth / 4 * 64;
    for (int64_t word = 0; word < kTileHeight / 4; ++word) {
      vi d[4];
      for (int j = 0; j < 4; ++j) d[j] = to_digits(rows[word * 4 + j] * scale);
      for (int digit = 0; digit < kDigits; ++digit) {
        const int down = 16 - 8 * digit;
        vi bytes{};
        for (int j = 0; j < 4; ++j) bytes |= (d[j] >> down & 0xff) << (8 * j);
        std::memcpy(tile + digit * kTileBytes + word * 64, &bytes, sizeof(bytes));
      }
    }
  }
}
#endif

}  // namespace

int64_t packed_digits_size(int64_t k, int64_t n, int64_t gates, int64_t k_groups) {
  const int64_t blocks = gates != 0 ? panels_for(n / gates, kLanes) * gates : panels_for(n, kPanel) * 4;
  return blocks * digit_column_block(padded_depth(k, k_groups));
}

void pack_digits(const PackDigits& a) {
#if defined(__AVX512F__)
  const int64_t units = a.gates != 0 ? a.n / a.gates : a.n, vectors = a.gates != 0 ? a.gates : 4;
  const int64_t blocks = a.gates != 0 ? panels_for(units, kLanes) * a.gates : panels_for(a.n, kPanel) * 4;
  const int64_t bytes = digit_column_block(padded_depth(a.k, a.k_groups));
#pragma omp parallel for num_threads(a.threads) if (a.threads > 1)
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t panel = block / vectors, v = block % vectors;
    const int64_t first = a.gates != 0 ? panel * kLanes : block * kLanes, left = units - first;
    const float* const source = a.source + (first + (a.gates != 0 ? v * units : 0)) * a.stride_n;
    const int valid = static_cast<int>(left < 0 ? 0 : left < kLanes ? left : kLanes);
    pack_block({source, a.k, a.k_groups, a.stride_k, a.stride_n, valid},
               static_cast<uint8_t*>(a.packed) + block * bytes);
  }
#else
  (void)a;
#endif
}

}  // namespace FASTLM_ISA
}  // namespace fastlm
