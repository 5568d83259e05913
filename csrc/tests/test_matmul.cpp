// Products of bfloat16 against double precision: both factors turned and not, floats and bfloat16, sizes around tiles,
// guards behind what is written; the same bits for any number of threads and rows.
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "check.h"
#include "fastlm/matmul.h"

namespace {

uint16_t to_bfloat(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
float from_bfloat(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

// Numbers in a buffer that ends with them, as floats or bfloat16.
struct Numbers {
  std::vector<float> floats;
  std::vector<uint16_t> halves;
  int64_t columns;
  bool bfloats;

  Numbers(int64_t rows, int64_t width, bool narrow, uint32_t seed) : columns(width), bfloats(narrow) {
    for (int64_t i = 0; i < rows * width; ++i) {
      seed = seed * 1664525u + 1013904223u;
      floats.push_back(static_cast<float>(static_cast<int32_t>(seed)) * 0x1p-31f);
      halves.push_back(to_bfloat(floats.back()));
    }
    floats.shrink_to_fit();
  }
  double at(int64_t row, int64_t column) const { return from_bfloat(halves[row * columns + column]); }
  fastlm::MatmulInput input(bool transposed) const {
    return {bfloats ? static_cast<const void*>(halves.data()) : floats.data(), columns, transposed, bfloats};
  }
};

std::vector<float> run(fastlm::Matmul x, bool bfloats) {
  std::vector<float> c(x.m * x.n + 16, -7.0f);
  std::vector<uint16_t> halves(x.m * x.n + 16, 7);
  x.c = bfloats ? static_cast<void*>(halves.data()) : c.data();
  x.bfloats = bfloats;
  if (posix_memalign(&x.scratch, 64, fastlm::matmul_scratch(x) + 64) != 0) std::abort();
  std::memset(x.scratch, 0xff, fastlm::matmul_scratch(x));
  fastlm::matmul(x);
  std::free(x.scratch);
  for (int64_t i = x.m * x.n; i < x.m * x.n + 16; ++i) CHECK(c[i] == -7.0f && halves[i] == 7);
  c.resize(x.m * x.n);
  for (int64_t i = 0; bfloats && i < x.m * x.n; ++i) c[i] = from_bfloat(halves[i]);
  return c;
}

}  // namespace

FASTLM_TEST(matmul_every_way) {
  for (int64_t m : {1, 16, 33})
    for (int64_t n : {1, 32, 65})
      for (int64_t k : {1, 2, 31, 32, 100})
        for (int ways = 0; ways < 32; ++ways) {
          const bool turn_a = ways & 1, turn_b = ways & 2, bias = ways & 16;
          const Numbers a(turn_a ? k : m, turn_a ? m : k, ways & 4, 1), b(turn_b ? n : k, turn_b ? k : n, ways & 8, 2);
          const Numbers added(1, n, false, 3);
          fastlm::Matmul x = {a.input(turn_a), b.input(turn_b), bias ? added.floats.data() : nullptr, nullptr, false,
                              m, n, k, nullptr, 1};
          const std::vector<float> c = run(x, false), rounded = run(x, true);
          for (int64_t i = 0; i < m; ++i)
            for (int64_t j = 0; j < n; ++j) {
              double want = bias ? added.floats[j] : 0;
              for (int64_t p = 0; p < k; ++p)
                want += (turn_a ? a.at(p, i) : a.at(i, p)) * (turn_b ? b.at(j, p) : b.at(p, j));
              CHECK(std::abs(c[i * n + j] - want) <= 1e-6 * (1 + std::sqrt(static_cast<double>(k))));
              CHECK(rounded[i * n + j] == from_bfloat(to_bfloat(c[i * n + j])));
            }
        }
}

FASTLM_TEST(matmul_threads_and_rows_change_no_bit) {
  const int64_t m = 200, n = 130, k = 300;
  const Numbers a(m, k, true, 1), b(n, k, false, 2);
  fastlm::Matmul x = {a.input(false), b.input(true), nullptr, nullptr, false, m, n, k, nullptr, 1};
  const std::vector<float> expected = run(x, false);
  for (int threads : {2, 3}) {
    x.threads = threads;
    CHECK(run(x, false) == expected);
  }
  x.a.data = a.halves.data() + 7 * k;
  x.m = 5;
  const std::vector<float> some = run(x, false);
  CHECK(std::memcmp(some.data(), expected.data() + 7 * n, some.size() * sizeof(float)) == 0);
}
