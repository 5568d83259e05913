// The vector functions against double precision, at every exponent of float.
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "check.h"
#include "fastlm/math.h"

using fastlm::MathFunction;

namespace {

// Every sign and exponent, denormals to infinity and NaN, with mantissas spread over each: about two million floats.
std::vector<float> floats() {
  std::vector<float> all;
  for (uint64_t bits = 0; bits <= 0xffffffffu; bits += 2039) {
    const uint32_t pattern = static_cast<uint32_t>(bits);
    float x;
    std::memcpy(&x, &pattern, sizeof(x));
    all.push_back(x);
  }
  for (float x : {0.0f, -0.0f, INFINITY, -INFINITY, NAN, 88.72283f, 88.72284f, -87.33655f, -103.97f, -103.98f})
    all.push_back(x);
  return all;
}

// Finer where the functions are neither 0, 1 nor x.
std::vector<float> middle() {
  std::vector<float> all;
  for (int i = -1100000; i <= 1100000; ++i) all.push_back(static_cast<float>(i) * 1e-4f);
  return all;
}

// The distance between neighbouring floats at `exact`, never less than the smallest denormal.
double spacing(double exact) {
  const int exponent = std::ilogb(exact);
  return exact == 0 || exponent < -126 ? std::ldexp(1.0, -149) : std::ldexp(1.0, exponent - 23);
}

double worst(MathFunction function, double (*exact)(double), const std::vector<float>& x) {
  std::vector<float> y(x.size(), NAN);
  fastlm::math_apply(function, x.data(), y.data(), static_cast<int64_t>(x.size()));
  double largest = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    const double want = exact(x[i]);
    double error;
    if (std::isnan(want))
      error = std::isnan(y[i]) ? 0 : INFINITY;
    else if (std::isinf(static_cast<float>(want)) || std::isinf(y[i]))
      error = static_cast<float>(want) == y[i] ? 0 : INFINITY;
    else
      error = std::abs(y[i] - want) / spacing(want);
    largest = check::worse(largest, error);
  }
  return largest;
}

double sigmoid(double x) { return x < 0 ? std::exp(x) / (1 + std::exp(x)) : 1 / (1 + std::exp(-x)); }
double exponential(double x) { return std::exp(x); }
double hyperbolic_tangent(double x) { return std::tanh(x); }

void bounded(MathFunction function, double (*exact)(double), double ulp) {
  for (const std::vector<float>& x : {floats(), middle()}) {
    const double found = worst(function, exact, x);
    if (found > ulp) std::printf("  %.2f ulp, expected at most %.2f\n", found, ulp);
    CHECK(found <= ulp);
  }
}

}  // namespace

FASTLM_TEST(math_exp) { bounded(MathFunction::kExp, exponential, 1.5); }
FASTLM_TEST(math_tanh) { bounded(MathFunction::kTanh, hyperbolic_tangent, 3); }
FASTLM_TEST(math_sigmoid) { bounded(MathFunction::kSigmoid, sigmoid, 3); }

FASTLM_TEST(math_keeps_the_sign_of_zero) {
  const float x[1] = {-0.0f};
  float y[1] = {NAN};
  fastlm::math_apply(MathFunction::kTanh, x, y, 1);
  CHECK(y[0] == 0 && std::signbit(y[0]));
}

FASTLM_TEST(math_any_length_in_place) {
  for (int n = 0; n <= 40; ++n) {
    std::vector<float> x(n), y(n, NAN);  // the sanitizer sees a step beyond the end
    for (int i = 0; i < n; ++i) x[i] = 0.1f * static_cast<float>(i);
    fastlm::math_apply(MathFunction::kExp, x.data(), y.data(), n);
    fastlm::math_apply(MathFunction::kExp, x.data(), x.data(), n);
    for (int i = 0; i < n; ++i) {
      CHECK(x[i] == y[i]);
      CHECK(std::abs(y[i] - std::exp(0.1 * i)) < 1e-5 * y[i]);
    }
  }
}
