// Conversions between float32 and bfloat16 against the bits: every bfloat16, roundings to even, what is not finite,
// every length around a vector, with guards behind the output.
#include <cmath>
#include <cstring>
#include <vector>

#include "check.h"
#include "fastlm/elementwise.h"

namespace {

uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}
float of_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

// The nearest bfloat16, the even one of two as near, by comparing distances in double; NaN stays one.
uint16_t nearest(float x) {
  if (std::isnan(x)) return 0x7FC0;
  const auto down = uint16_t(bits_of(x) >> 16);
  if (std::isinf(x) || (bits_of(x) & 0xFFFF) == 0) return down;
  const auto up = uint16_t(down + 1);  // of larger magnitude; beyond the largest, infinity stands for 2^128
  const auto value = [](uint16_t b) {
    if ((b & 0x7FFF) == 0x7F80) return b & 0x8000 ? -0x1p128 : 0x1p128;
    return double(of_bits(uint32_t{b} << 16));
  };
  const double below = std::fabs(x - value(down)), above = std::fabs(value(up) - x);
  return below < above || (below == above && down % 2 == 0) ? down : up;
}

bool same(uint16_t found, float from) {
  return std::isnan(from) ? (found & 0x7FFF) > 0x7F80 : found == nearest(from);
}

}  // namespace

FASTLM_TEST(convert_every_bfloat_there_and_back) {
  std::vector<uint16_t> all(1 << 16), back(1 << 16);
  std::vector<float> wide(1 << 16);
  for (uint32_t b = 0; b < all.size(); ++b) all[b] = uint16_t(b);
  for (const int threads : {1, 3}) {
    fastlm::convert({all.data(), wide.data(), int64_t(all.size()), false, threads});
    fastlm::convert({wide.data(), back.data(), int64_t(all.size()), true, threads});
    for (uint32_t b = 0; b < all.size(); ++b) {
      const float exact = of_bits(b << 16);
      CHECK(std::isnan(exact) ? std::isnan(wide[b]) : bits_of(wide[b]) == b << 16);
      CHECK(same(back[b], exact));
    }
  }
}

FASTLM_TEST(convert_rounds_to_the_nearest_even) {
  std::vector<float> x;
  for (uint32_t high = 0; high < 1 << 16; high += 37)  // in every binade, subnormals, and next to infinity
    for (const uint32_t low : {0x0001u, 0x7FFFu, 0x8000u, 0x8001u, 0xFFFFu}) x.push_back(of_bits(high << 16 | low));
  for (const uint32_t bits :
       {0x7F7F8000u, 0x7F7F7FFFu, 0xFF7FFFFFu, 0x00000001u, 0x80008000u, 0x7F800001u, 0xFFFFFFFFu})
    x.push_back(of_bits(bits));
  std::vector<uint16_t> found(x.size());
  fastlm::convert({x.data(), found.data(), int64_t(x.size()), true, 1});
  int up = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    CHECK(same(found[i], x[i]));
    up += found[i] != uint16_t(bits_of(x[i]) >> 16);
  }
  CHECK(up > int(x.size()) / 4);  // truncation is not what was asked for
}

FASTLM_TEST(convert_every_length) {
  for (const int64_t count : {0, 1, 3, 4, 7, 8, 15, 16, 17, 31, 33, 63, 65, 70001})
    for (const int threads : {1, 2, 3}) {
      std::vector<float> x(count), wide(count + 16, -7.0f);
      std::vector<uint16_t> narrow(count + 16, 7);
      for (int64_t i = 0; i < count; ++i) x[i] = 0.3f * float(i % 1013 - 500);
      fastlm::convert({x.data(), narrow.data(), count, true, threads});
      fastlm::convert({narrow.data(), wide.data(), count, false, threads});
      for (int64_t i = 0; i < count; ++i) {
        CHECK(narrow[i] == nearest(x[i]));
        CHECK(bits_of(wide[i]) == uint32_t{narrow[i]} << 16);
      }
      for (int64_t i = count; i < count + 16; ++i) CHECK(narrow[i] == 7 && wide[i] == -7.0f);
    }
}
