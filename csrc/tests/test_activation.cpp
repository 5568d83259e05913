// Activations and their gradients against double precision, at every length around a vector, with guards behind the
// output.
#include <cmath>
#include <cstring>
#include <vector>

#include "check.h"
#include "fastlm/activation.h"

using fastlm::ActivationFunction;

namespace {

double exact(ActivationFunction f, double x) {
  if (f == ActivationFunction::kSilu) return x / (1 + std::exp(-x));
  return x / (1 + std::exp(-2 * std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
}

double slope(ActivationFunction f, double x) {
  const double h = 1e-6;
  return (exact(f, x + h) - exact(f, x - h)) / (2 * h);
}

// Exact for these inputs: the low halves of their bits are zero.
std::vector<uint16_t> bfloats(const std::vector<float>& x) {
  std::vector<uint16_t> halves(x.size());
  for (size_t i = 0; i < x.size(); ++i) std::memcpy(&halves[i], reinterpret_cast<const char*>(&x[i]) + 2, 2);
  return halves;
}

float from_bfloat(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float x;
  std::memcpy(&x, &wide, sizeof(x));
  return x;
}

}  // namespace

FASTLM_TEST(activation_every_length) {
  for (ActivationFunction f : {ActivationFunction::kSilu, ActivationFunction::kGeluTanh})
    for (int64_t count : {0, 1, 3, 4, 7, 8, 15, 16, 17, 31, 33, 40000})
      for (int threads : {1, 2, 3}) {
        std::vector<float> x(count), u(count), g(count), y(count + 16, -7.0f), dx = y, du = y;
        for (int64_t i = 0; i < count; ++i) {
          x[i] = 0.375f * static_cast<float>(i % 61 - 30);
          u[i] = 1.0f + 0.0625f * static_cast<float>(i % 7);
          g[i] = 0.5f * static_cast<float>(i % 5 - 2);
        }
        fastlm::activation({x.data(), u.data(), y.data(), count, f, false, threads});
        fastlm::activation_backward({g.data(), x.data(), u.data(), dx.data(), du.data(), count, f, false, threads});
        const auto xb = bfloats(x), ub = bfloats(u), gb = bfloats(g);
        std::vector<uint16_t> yb(count + 16, 7), dxb = yb, dub = yb;
        fastlm::activation({xb.data(), ub.data(), yb.data(), count, f, true, threads});
        fastlm::activation_backward({gb.data(), xb.data(), ub.data(), dxb.data(), dub.data(), count, f, true, threads});
        for (int64_t i = 0; i < count; ++i) {
          const double value = exact(f, x[i]), want = value * u[i], grad = g[i] * u[i] * slope(f, x[i]);
          // The rounding of an exponent of up to 90 shows that many times over.
          CHECK(std::abs(y[i] - want) <= 2e-5 * std::abs(want) + 1e-37);
          CHECK(std::abs(du[i] - g[i] * value) <= 2e-5 * std::abs(g[i] * value) + 1e-37);
          CHECK(std::abs(dx[i] - grad) <= 1e-6 + 2e-5 * std::abs(grad));
          CHECK(std::abs(from_bfloat(yb[i]) - y[i]) <= std::abs(y[i]) / 256 + 1e-37);
          CHECK(std::abs(from_bfloat(dxb[i]) - dx[i]) <= std::abs(dx[i]) / 256 + 1e-37);
          CHECK(std::abs(from_bfloat(dub[i]) - du[i]) <= std::abs(du[i]) / 256 + 1e-37);
        }
        for (int64_t i = count; i < count + 16; ++i) CHECK(y[i] == -7.0f && dx[i] == -7.0f && du[i] == -7.0f);
        for (int64_t i = count; i < count + 16; ++i) CHECK(yb[i] == 7 && dxb[i] == 7 && dub[i] == 7);
        // In place, and without the factor.
        fastlm::activation_backward({g.data(), x.data(), nullptr, g.data(), nullptr, count, f, false, threads});
        for (int64_t i = 0; i < count; ++i) CHECK(std::abs(g[i] * u[i] - dx[i]) <= 1e-6 * std::abs(dx[i]));
        fastlm::activation({x.data(), nullptr, x.data(), count, f, false, threads});
        for (int64_t i = 0; i < count; ++i) CHECK(std::abs(x[i] * u[i] - y[i]) <= 1e-6 * std::abs(y[i]));
      }
}
