// Products with quantised weights against double precision, from buffers of exactly the size the header promises (the
// weight's at an odd address), so that the sanitizers see a step beyond them.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <vector>

#include "check.h"
#include "fastlm/isa.h"
#include "fastlm/linear.h"

using fastlm::InputBlock;
using fastlm::kBlock;
using fastlm::Rounding;
using fastlm::WeightKind;

namespace {

constexpr WeightKind kKinds[] = {WeightKind::kF32,  WeightKind::kF16,  WeightKind::kBF16,
                                 WeightKind::kQ8_0, WeightKind::kQ4_0, WeightKind::kQ4_1};

struct Random {
  uint64_t state = 88172645463325252u;
  uint64_t bits() {
    state ^= state << 13;
    state ^= state >> 7;
    return state ^= state << 17;
  }
  float operator()() { return static_cast<float>(static_cast<double>(bits() >> 11) / 4503599627370496.0 - 1.0); }
};

double half_value(const uint8_t* p) {
  const int bits = p[0] | p[1] << 8, exponent = bits >> 10 & 31, mantissa = bits & 1023;
  const double size = exponent == 0    ? std::ldexp(mantissa, -24)
                      : exponent == 31 ? (mantissa ? NAN : INFINITY)
                                       : std::ldexp(1024 + mantissa, exponent - 25);
  return bits >> 15 ? -size : size;
}

// Element k of a row, decoded one at a time. `parts`: the sizes that were added up, for the bound.
double weight_at(WeightKind kind, const uint8_t* row, int64_t k, double* parts = nullptr) {
  const int64_t block = k / kBlock, i = k % kBlock;
  double scaled = 0, minimum = 0;
  switch (kind) {
    case WeightKind::kF32: {
      float value;
      std::memcpy(&value, row + 4 * k, 4);
      scaled = value;
      break;
    }
    case WeightKind::kF16: scaled = half_value(row + 2 * k); break;
    case WeightKind::kBF16: {
      const uint32_t bits = static_cast<uint32_t>(row[2 * k]) << 16 | static_cast<uint32_t>(row[2 * k + 1]) << 24;
      float value;
      std::memcpy(&value, &bits, 4);
      scaled = value;
      break;
    }
    case WeightKind::kQ8_0: {
      const uint8_t* p = row + 34 * block;
      scaled = half_value(p) * static_cast<int8_t>(p[2 + i]);
      break;
    }
    case WeightKind::kQ4_0: {
      const uint8_t* p = row + 18 * block;
      const int q = i < 16 ? p[2 + i] & 15 : p[2 + i - 16] >> 4;
      scaled = half_value(p) * q;
      minimum = half_value(p) * -8;
      break;
    }
    case WeightKind::kQ4_1: {
      const uint8_t* p = row + 20 * block;
      const int q = i < 16 ? p[4 + i] & 15 : p[4 + i - 16] >> 4;
      scaled = half_value(p) * q;
      minimum = half_value(p + 2);
      break;
    }
  }
  if (parts != nullptr) *parts = std::abs(scaled) + std::abs(minimum);
  return scaled + minimum;
}

struct Case {
  WeightKind kind;
  int64_t rows, outputs, columns;
  std::vector<float> input, bias;
  std::vector<uint8_t> storage;

  const uint8_t* weight() const { return storage.data() + 1; }
  uint8_t* weight() { return storage.data() + 1; }
  int64_t row_bytes() const { return fastlm::weight_bytes(kind, columns); }
};

// Random bytes, but for exponents kept small enough that sums stay finite.
Case make_case(WeightKind kind, int64_t rows, int64_t outputs, int64_t columns) {
  Random next;
  Case c{kind, rows, outputs, columns, {}, {}, {}};
  for (int64_t i = 0; i < rows * columns; ++i) c.input.push_back(next() * (i % 7 == 0 ? 10.0f : 1.0f));
  for (int64_t i = 0; i < outputs; ++i) c.bias.push_back(next());
  c.storage.resize(static_cast<size_t>(1 + outputs * c.row_bytes()));
  for (uint8_t& byte : c.storage) byte = static_cast<uint8_t>(next.bits() >> 20);
  const auto tame_half = [](uint8_t* p) { p[1] = static_cast<uint8_t>((p[1] & 0x87) | 0x28); };
  uint8_t* w = c.weight();
  const int64_t bytes = outputs * c.row_bytes();
  const int64_t step = fastlm::is_quantized(kind) ? fastlm::weight_bytes(kind, kBlock) : fastlm::weight_bytes(kind, 1);
  for (int64_t at = 0; at < bytes; at += step) {
    if (kind == WeightKind::kF32) {
      const float value = next();
      std::memcpy(w + at, &value, 4);
    } else if (kind == WeightKind::kBF16) {
      w[at + 1] = static_cast<uint8_t>((w[at + 1] & 0x80) | 0x3e);
    } else {
      tame_half(w + at);
      if (kind == WeightKind::kQ4_1) tame_half(w + at + 2);
    }
  }
  return c;
}

constexpr Rounding kRoundings[] = {Rounding::kNone, Rounding::kBits8, Rounding::kBits15};
bool possible(WeightKind kind, Rounding rounding) { return rounding == Rounding::kNone || fastlm::is_quantized(kind); }

// Interleaved for the active level, in memory that is aligned, and no longer than promised.
struct Packed {
  explicit Packed(const Case& c) {
    const auto bytes = static_cast<size_t>(
        fastlm::interleaved_bytes(c.kind, c.outputs, c.columns, fastlm::simd_lanes()));
    data = static_cast<uint8_t*>(::operator new(bytes, std::align_val_t{64}));
    fastlm::interleave({c.weight(), data, c.outputs, c.columns, c.kind, 2});
  }
  Packed(const Packed&) = delete;
  ~Packed() { ::operator delete(data, std::align_val_t{64}); }
  uint8_t* data;
};

std::vector<float> run(const Case& c, Rounding rounding, int threads = 2) {
  std::vector<float> output(static_cast<size_t>(c.rows * c.outputs), NAN);
  const bool integer = rounding != Rounding::kNone;
  std::vector<InputBlock> scratch(integer ? static_cast<size_t>(fastlm::linear_scratch(c.rows, c.columns)) : 0);
  std::unique_ptr<Packed> packed(integer ? new Packed(c) : nullptr);
  const void* weight = integer ? packed->data : c.weight();
  fastlm::linear({c.input.data(), scratch.data(), {{weight, c.bias.data(), output.data(), c.outputs, c.kind}}, 1,
                  c.rows, c.columns, rounding, threads});
  return output;
}

// The inputs as the integer kernels round them.
std::vector<double> rounded(const Case& c, Rounding rounding) {
  std::vector<double> x(c.input.begin(), c.input.end());
  if (rounding == Rounding::kNone) return x;
  const size_t size = rounding == Rounding::kBits8 ? 16 : 32;
  const float steps = rounding == Rounding::kBits8 ? 127.0f : 127.0f * 128.0f;
  for (size_t b = 0; b < x.size(); b += size) {
    float largest = 0;
    for (size_t i = b; i < b + size; ++i) largest = std::fmax(largest, std::fabs(c.input[i]));
    const float inverse = steps / largest;
    for (size_t i = b; i < b + size; ++i) {
      const float scaled = c.input[i] * inverse;  // in a variable: not to be fused with the rounding
      x[i] = std::nearbyint(scaled) * static_cast<double>(largest * (1 / steps));
    }
  }
  return x;
}

bool near(const Case& c, const std::vector<float>& output, Rounding rounding, bool expected = true) {
  const std::vector<double> x = rounded(c, rounding);
  for (int64_t m = 0; m < c.rows; ++m)
    for (int64_t n = 0; n < c.outputs; ++n) {
      double sum = c.bias[n], size = std::abs(sum);
      for (int64_t k = 0; k < c.columns; ++k) {
        double parts;
        sum += x[m * c.columns + k] * weight_at(c.kind, c.weight() + n * c.row_bytes(), k, &parts);
        size += std::abs(x[m * c.columns + k]) * parts;
      }
      const double error = std::abs(output[m * c.outputs + n] - sum);
      if (!(error <= 1e-6 * size)) {
        if (expected)
          std::printf("  kind %d, row %d, output %d: error %g of %g\n", static_cast<int>(c.kind), static_cast<int>(m),
                      static_cast<int>(n), error, size);
        return false;
      }
    }
  return true;
}

}  // namespace

FASTLM_TEST(linear_is_as_near_as_float_allows) {
  for (WeightKind kind : kKinds)
    for (int64_t rows : {1, 2, 3, 4, 7, 17})
      for (int64_t outputs : {1, 5, 16, 33})
        for (int64_t columns : {32, 96, 224}) {
          const Case c = make_case(kind, rows, outputs, columns);
          for (Rounding rounding : kRoundings)
            if (possible(kind, rounding)) CHECK(near(c, run(c, rounding), rounding));
        }
}

FASTLM_TEST(linear_of_plain_floats_takes_any_number_of_columns) {
  for (WeightKind kind : {WeightKind::kF32, WeightKind::kF16, WeightKind::kBF16})
    for (int64_t columns : {0, 1, 15, 31, 33, 63}) {
      const Case c = make_case(kind, 5, 6, columns);
      CHECK(near(c, run(c, Rounding::kNone), Rounding::kNone));
    }
}

FASTLM_TEST(linear_comparison_sees_planted_faults) {
  for (WeightKind kind : {WeightKind::kQ8_0, WeightKind::kQ4_0, WeightKind::kQ4_1})
    for (Rounding rounding : kRoundings) {
      const Case c = make_case(kind, 2, 5, 96);
      Case fault = c;
      fault.weight()[c.row_bytes() - 1] ^= 0x10;  // one code
      CHECK(!near(c, run(fault, rounding), rounding, false));
      fault = c;
      fault.weight()[0] ^= 0x80;  // a scale
      CHECK(!near(c, run(fault, rounding), rounding, false));
      CHECK(!near(c, std::vector<float>(10, 0.0f), rounding, false));
    }
}

FASTLM_TEST(linear_row_depends_on_nothing_else) {
  for (WeightKind kind : kKinds)
    for (Rounding rounding : kRoundings) {
      if (!possible(kind, rounding)) continue;
      const Case all = make_case(kind, 11, 300, 256);
      const std::vector<float> one_thread = run(all, rounding, 1);
      for (int threads : {2, 3}) CHECK(run(all, rounding, threads) == one_thread);
      for (int64_t m = 0; m < all.rows; ++m) {
        Case alone = all;
        alone.rows = 1;
        alone.input.assign(all.input.begin() + m * all.columns, all.input.begin() + (m + 1) * all.columns);
        const std::vector<float> y = run(alone, rounding);
        CHECK(std::memcmp(y.data(), one_thread.data() + m * all.outputs, y.size() * sizeof(float)) == 0);
      }
    }
}

// One row goes by vector instructions, more by the unit that multiplies tiles where there is one: to the bit the same.
FASTLM_TEST(linear_row_is_the_same_among_any_number_of_rows) {
  for (WeightKind kind : {WeightKind::kQ8_0, WeightKind::kQ4_0, WeightKind::kQ4_1})
    for (int64_t columns : {32, 64, 96, 160, 576})
      for (int64_t outputs : {1, 15, 49, 112}) {
        Case all = make_case(kind, 17, outputs, columns);
        const std::vector<float> input = all.input;
        std::vector<float> alone;
        for (int64_t m = 0; m < 17; ++m) {
          all.rows = 1;
          all.input.assign(input.begin() + m * columns, input.begin() + (m + 1) * columns);
          const std::vector<float> y = run(all, Rounding::kBits15);
          alone.insert(alone.end(), y.begin(), y.end());
        }
        for (int64_t rows = 1; rows <= 17; ++rows) {
          all.rows = rows;
          all.input.assign(input.begin(), input.begin() + rows * columns);
          const std::vector<float> y = run(all, Rounding::kBits15);
          CHECK(std::memcmp(y.data(), alone.data(), y.size() * sizeof(float)) == 0);
        }
      }
}

FASTLM_TEST(linear_sums_at_the_ends_of_int8_do_not_saturate) {
  for (WeightKind kind : {WeightKind::kQ8_0, WeightKind::kQ4_0, WeightKind::kQ4_1})
    for (int code : {0x00, 0x0f, 0x7f, 0x80, 0xff})
      for (float value : {3.0f, -3.0f}) {
        Case c = make_case(kind, 3, 17, 64);
        const int64_t step = fastlm::weight_bytes(kind, kBlock), header = kind == WeightKind::kQ4_1 ? 4 : 2;
        for (int64_t at = 0; at < c.outputs * c.row_bytes(); at += step)
          std::memset(c.weight() + at + header, code, static_cast<size_t>(step - header));
        for (float& x : c.input) x = value;
        for (Rounding rounding : {Rounding::kBits8, Rounding::kBits15}) CHECK(near(c, run(c, rounding), rounding));
      }
}

FASTLM_TEST(linear_keeps_a_nan_in_its_row) {
  for (WeightKind kind : kKinds)
    for (float value : {NAN, INFINITY}) {
      Case c = make_case(kind, 3, 17, 64);
      c.input[64 + 40] = value;
      for (Rounding rounding : kRoundings) {
        if (!possible(kind, rounding)) continue;
        const std::vector<float> y = run(c, rounding);
        for (int64_t i = 0; i < 3 * 17; ++i) CHECK(std::isfinite(y[i]) == (i / 17 != 1));
      }
    }
}

FASTLM_TEST(linear_of_several_weights_is_that_of_each) {
  for (Rounding rounding : kRoundings)
    for (int threads : {1, 2, 3}) {
      std::vector<Case> cases;
      for (WeightKind kind : {WeightKind::kQ4_1, WeightKind::kF16, WeightKind::kQ8_0, WeightKind::kQ4_0})
        cases.push_back(make_case(kind, 3, 5 + 90 * static_cast<int64_t>(cases.size()), 256));
      std::vector<InputBlock> scratch(static_cast<size_t>(fastlm::linear_scratch(3, 256)));
      std::vector<std::unique_ptr<Packed>> packed;
      std::vector<std::vector<float>> outputs;
      fastlm::LinearArgs args{cases[0].input.data(), scratch.data(), {}, 0, 3, 256, rounding, threads};
      for (const Case& c : cases) {
        const bool integer = rounding != Rounding::kNone && fastlm::is_quantized(c.kind);
        packed.emplace_back(integer ? new Packed(c) : nullptr);
        outputs.emplace_back(static_cast<size_t>(3 * c.outputs), NAN);
        const void* weight = integer ? packed.back()->data : c.weight();
        args.weights[args.count++] = {weight, c.bias.data(), outputs.back().data(), c.outputs, c.kind};
      }
      fastlm::linear(args);
      for (size_t i = 0; i < cases.size(); ++i)
        CHECK(outputs[i] == run(cases[i], possible(cases[i].kind, rounding) ? rounding : Rounding::kNone));
    }
}

FASTLM_TEST(dequantize_rows_is_exact) {
  for (WeightKind kind : kKinds)
    for (int64_t columns : {32, 160, 33}) {
      if (fastlm::is_quantized(kind) && columns % kBlock != 0) continue;
      const Case c = make_case(kind, 1, 9, columns);
      const std::vector<int64_t> ids = {8, 0, 0, 5};
      for (bool listed : {true, false}) {
        std::vector<float> out(static_cast<size_t>(4 * columns), NAN);
        CHECK(fastlm::dequantize_rows({c.weight(), listed ? ids.data() : nullptr, out.data(), 5, 4, 9, columns, kind,
                                       2}) == -1);
        for (int64_t i = 0; i < 4; ++i)
          for (int64_t k = 0; k < columns; ++k) {
            const int64_t row = listed ? ids[i] : 5 + i;
            // Rounded once: the product of a half and 4 or 8 bits is exact in float.
            CHECK(out[i * columns + k] == static_cast<float>(weight_at(kind, c.weight() + row * c.row_bytes(), k)));
          }
      }
    }
}

FASTLM_TEST(dequantize_rows_names_the_first_bad_id) {
  const Case c = make_case(WeightKind::kQ8_0, 1, 9, 32);
  std::vector<float> out(3 * 32);
  for (int64_t bad : {int64_t{-1}, int64_t{9}, std::numeric_limits<int64_t>::max()}) {
    const std::vector<int64_t> ids = {8, bad, bad};
    CHECK(fastlm::dequantize_rows({c.weight(), ids.data(), out.data(), 0, 3, 9, 32, WeightKind::kQ8_0, 1}) == 1);
  }
}
