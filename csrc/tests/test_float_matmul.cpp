// Products of floats by parts in bfloat16 against double precision, beside what plain float sums give: both factors
// turned and not, narrower second factors, sizes around tiles and blocks, guards behind what is written; the same bits
// for any number of threads and rows; what is not finite. With the tile unit, where there is one, and without.
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <vector>

#include "check.h"
#include "fastlm/matmul.h"

namespace {

using fastlm::Numbers;

constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Random {
  uint32_t state;
  float operator()() {  // -1 to 1, of 24 bits
    state = state * 1664525u + 1013904223u;
    return static_cast<float>(static_cast<int32_t>(state) >> 8) * 0x1p-23f;
  }
};

// A matrix in a buffer that ends with it; `as` its numbers are, rounded to that type.
struct Factor {
  int64_t columns;
  Numbers numbers;
  std::vector<float> values;
  std::vector<uint16_t> halves;

  Factor(int64_t rows, int64_t width, uint32_t seed, Numbers as = Numbers::kFloat) : columns(width), numbers(as) {
    Random random{seed};
    for (int64_t i = 0; i < rows * width; ++i) {
      float x = random();
      uint16_t half = 0;
      if (as == Numbers::kBfloat) {
        uint32_t bits;
        std::memcpy(&bits, &x, sizeof(bits));
        half = static_cast<uint16_t>(bits >> 16);
        bits &= 0xffff0000;
        std::memcpy(&x, &bits, sizeof(x));
      } else if (as == Numbers::kHalf) {  // 1.mantissa, of either sign
        half = static_cast<uint16_t>(0x3c00 | (static_cast<int>((x + 1) * 0x3ff) & 0x3ff) | (x < 0 ? 0x8000 : 0));
        x = (1 + static_cast<float>(half & 0x3ff) / 1024) * (x < 0 ? -1.0f : 1.0f);
      }
      values.push_back(x);
      halves.push_back(half);
    }
    values.shrink_to_fit();
    halves.shrink_to_fit();
  }
  const void* data() const {
    return numbers == Numbers::kFloat ? static_cast<const void*>(values.data()) : halves.data();
  }
  double at(int64_t row, int64_t column, bool turned) const {
    return values[turned ? column * columns + row : row * columns + column];
  }
};

std::vector<float> run(fastlm::FloatMatmul x, float before = -7.0f) {
  std::vector<float> c((x.m - 1) * x.c_stride + x.n + 16, before);
  x.c = c.data();
  if (posix_memalign(&x.scratch, 64, fastlm::float_matmul_scratch(x)) != 0) std::abort();
  std::memset(x.scratch, 0xff, fastlm::float_matmul_scratch(x));
  fastlm::float_matmul(x);
  std::free(x.scratch);
  std::vector<float> result;
  for (int64_t i = 0; i < static_cast<int64_t>(c.size()); ++i)
    if (i / x.c_stride < x.m && i % x.c_stride < x.n)
      result.push_back(c[i]);
    else
      CHECK(c[i] == before);
  return result;
}

fastlm::FloatMatmul product(const Factor& a, bool turn_a, const Factor& b, bool turn_b, int64_t m, int64_t n,
                            int64_t k) {
  return {a.values.data(), a.columns, turn_a, b.data(), b.columns, turn_b, b.numbers, nullptr, nullptr, n, false,
          m,               n,         k,      nullptr,  1};
}

// Runs `test` by the tile unit and without.
template <typename Test>
void both_ways(const Test& test) {
  for (bool tiles : {true, false}) {
    fastlm::matmul_allow_tiles(tiles);
    test();
  }
  fastlm::matmul_allow_tiles(true);
}

}  // namespace

FASTLM_TEST(float_matmul_every_way) {
  both_ways([] {
    for (int64_t m : {1, 16, 19})
      for (int64_t n : {1, 16, 32, 77})
        for (int64_t k : {0, 1, 16, 33, 300})
          for (int ways = 0; ways < 16; ++ways) {
            const bool turn_a = ways & 1, turn_b = ways & 2, bias = ways & 4, add = ways & 8;
            const auto as = static_cast<Numbers>((m + n + ways) % 3);
            const Factor a(turn_a ? k : m, turn_a ? m : k, 1), b(turn_b ? n : k, turn_b ? k : n, 2, as), added(1, n, 3);
            fastlm::FloatMatmul x = product(a, turn_a, b, turn_b, m, n, k);
            x.bias = bias ? added.values.data() : nullptr;
            x.add = add;
            x.c_stride = n + (ways & 8 ? 5 : 0);
            const std::vector<float> c = run(x, 0.5f);
            for (int64_t i = 0; i < m; ++i)
              for (int64_t j = 0; j < n; ++j) {
                double want = (bias ? added.values[j] : 0) + (add ? 0.5 : 0), size = 2;
                for (int64_t p = 0; p < k; ++p) {
                  want += a.at(i, p, turn_a) * b.at(p, j, turn_b);
                  size += std::abs(a.at(i, p, turn_a) * b.at(p, j, turn_b));
                }
                CHECK(std::abs(c[i * n + j] - want) <= 1e-7 * size);
              }
          }
  });
}

// Also badly scaled, and with sums that cancel.
FASTLM_TEST(float_matmul_is_as_accurate_as_floats) {
  both_ways([] {
    const int64_t m = 5, n = 40;
    for (int64_t k : {32, 512, 1500})
      for (int kind = 0; kind < 3; ++kind) {
        Factor a(m, k, 4), b(k, n, 5);
        for (int64_t p = 0; p < k; ++p) {
          const float scale = kind == 1 ? std::ldexp(1.0f, static_cast<int>(p * 7 % 61) - 30) : 1.0f;
          for (int64_t i = 0; i < m; ++i) {
            a.values[i * k + p] *= scale;
            if (kind == 2 && p % 2 == 1) a.values[i * k + p] = a.values[i * k + p - 1];
          }
          for (int64_t j = 0; j < n; ++j) {
            b.values[p * n + j] /= scale;
            if (kind == 2 && p % 2 == 1) b.values[p * n + j] = -b.values[(p - 1) * n + j] * (1 + 0x1p-20f);
          }
        }
        const std::vector<float> c = run(product(a, false, b, false, m, n, k));
        double worst = 0, worst_plain = 0;
        for (int64_t i = 0; i < m; ++i)
          for (int64_t j = 0; j < n; ++j) {
            double want = 0, size = 0;
            float plain = 0;
            for (int64_t p = 0; p < k; ++p) {
              want += a.at(i, p, false) * b.at(p, j, false);
              size += std::abs(a.at(i, p, false) * b.at(p, j, false));
              plain = std::fma(a.values[i * k + p], b.values[p * n + j], plain);
            }
            worst = check::worse(worst, std::abs(c[i * n + j] - want) / size);
            worst_plain = std::max(worst_plain, std::abs(plain - want) / size);
          }
        CHECK(worst <= worst_plain);
      }
  });
}

FASTLM_TEST(float_matmul_threads_and_rows_change_no_bit) {
  both_ways([] {
    const int64_t m = 200, n = 330, k = 300;
    const Factor a(m, k, 6), b(n, k, 7);
    fastlm::FloatMatmul x = product(a, false, b, true, m, n, k);
    const std::vector<float> expected = run(x);
    for (int threads : {2, 3, 4}) {
      x.threads = threads;
      CHECK(run(x) == expected);
    }
    x.a += 7 * k;
    for (x.m = 1; x.m <= 17; x.m += 4) {
      const std::vector<float> some = run(x);
      CHECK(std::memcmp(some.data(), expected.data() + 7 * n, some.size() * sizeof(float)) == 0);
    }
  });
}

FASTLM_TEST(float_matmul_of_what_is_not_finite) {
  both_ways([] {
    const int64_t m = 3, n = 33, k = 40;
    float odd_nan, low_nan;
    const uint32_t odd_bits = 0x7fffffff, low_bits = 0x7f800001;
    std::memcpy(&odd_nan, &odd_bits, sizeof(float));
    std::memcpy(&low_nan, &low_bits, sizeof(float));
    for (float bad : {kInfinity, -kInfinity, odd_nan, low_nan})
      for (bool first : {true, false}) {
        Factor a(m, k, 8), b(k, n, 9);
        (first ? a.values[1 * k + 35] : b.values[35 * n + 20]) = bad;
        const std::vector<float> c = run(product(a, false, b, false, m, n, k));
        for (int64_t i = 0; i < m; ++i)
          for (int64_t j = 0; j < n; ++j) CHECK(std::isfinite(c[i * n + j]) == (first ? i != 1 : j != 20));
      }
    // The largest float has no bfloat16 above it; what is far below 2^-110 comes close and no more.
    Factor a(m, k, 10), b(k, n, 11);
    for (float& x : a.values) x = 0;
    for (float& x : b.values) x = 0.25f;
    a.values[0] = std::numeric_limits<float>::max();
    a.values[k] = 0x1.234568p-100f;
    a.values[2 * k] = 0x1.234568p-124f;
    const std::vector<float> c = run(product(a, false, b, false, m, n, k));
    CHECK(c[0] == std::numeric_limits<float>::max() / 4 && c[n] == 0x1.234568p-102f);
    CHECK(std::abs(c[2 * n] - 0x1.234568p-126f) <= 0x1p-126f);
  });
}
