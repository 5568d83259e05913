// Norms and their gradients against double precision, at every length around a vector, with guards behind the output.
#include <cmath>
#include <cstring>
#include <vector>

#include "check.h"
#include "fastlm/norm.h"

namespace {

struct Problem {
  int64_t rows, dim;
  bool centre;
  float eps = 0.125f;
  std::vector<float> x, w, b, g;

  Problem(int64_t n, int64_t d, bool c) : rows(n), dim(d), centre(c), x(n * d), w(d), b(d), g(n * d) {
    for (int64_t i = 0; i < n * d; ++i) x[i] = 5.0f * c + 0.37f * static_cast<float>(i % 61 - 29);
    for (int64_t i = 0; i < n * d; ++i) g[i] = 0.1f * static_cast<float>(i % 17 - 5);
    for (int64_t i = 0; i < d; ++i) w[i] = 1.0f + 0.01f * static_cast<float>(i % 7), b[i] = c * 0.1f * (i % 5);
  }

  // The row's normalised values, and the factor that made them.
  std::vector<double> exact(int64_t row, double* scale) const {
    const float* at = x.data() + row * dim;
    double mean = 0, variance = 0;
    for (int64_t i = 0; centre && i < dim; ++i) mean += static_cast<double>(at[i]) / dim;
    for (int64_t i = 0; i < dim; ++i) variance += (at[i] - mean) * (at[i] - mean) / dim;
    *scale = 1 / std::sqrt(variance + eps);
    std::vector<double> n(dim);
    for (int64_t i = 0; i < dim; ++i) n[i] = (at[i] - mean) * *scale;
    return n;
  }
};

float from_bfloat(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float x;
  std::memcpy(&x, &wide, sizeof(x));
  return x;
}

}  // namespace

FASTLM_TEST(norm_every_length) {
  for (bool centre : {false, true})
    for (int64_t dim : {1, 3, 4, 5, 15, 16, 17, 63, 64, 65, 200, 576})
      for (int64_t rows : {0, 1, 2, 7, 100})
        for (int threads : {1, 3}) {
          Problem p(rows, dim, centre);
          std::vector<float> y(rows * dim + 16, -7.0f);
          std::vector<uint16_t> half(rows * dim + 16, 7);
          fastlm::norm({p.x.data(), p.w.data(), p.b.data(), y.data(), nullptr, rows, dim, p.eps, centre, false, threads});
          fastlm::norm({p.x.data(), p.w.data(), p.b.data(), half.data(), nullptr, rows, dim, p.eps, centre, true, threads});
          for (int64_t r = 0; r < rows; ++r) {
            double scale;
            const std::vector<double> n = p.exact(r, &scale);
            for (int64_t i = 0; i < dim; ++i) {
              const float got = y[r * dim + i];
              CHECK(std::abs(got - (n[i] * p.w[i] + p.b[i])) <= 4e-6);
              CHECK(std::abs(from_bfloat(half[r * dim + i]) - got) <= std::abs(got) / 256);
            }
            // A row alone, in place and without parameters, normalises to the same bits.
            std::vector<float> alone(p.x.begin() + r * dim, p.x.begin() + (r + 1) * dim), again(dim);
            fastlm::norm({alone.data(), p.w.data(), p.b.data(), again.data(), nullptr, 1, dim, p.eps, centre, false, 1});
            for (int64_t i = 0; i < dim; ++i) CHECK(again[i] == y[r * dim + i]);
            fastlm::norm({alone.data(), nullptr, nullptr, alone.data(), nullptr, 1, dim, p.eps, centre, false, 1});
            for (int64_t i = 0; i < dim; ++i)
              CHECK(std::abs(alone[i] * p.w[i] + p.b[i] - y[r * dim + i]) <= 1e-6);
          }
          for (int64_t i = rows * dim; i < rows * dim + 16; ++i) CHECK(y[i] == -7.0f && half[i] == 7);
        }
}

FASTLM_TEST(norm_gradients_every_length) {
  for (bool centre : {false, true})
    for (int64_t dim : {1, 3, 5, 16, 17, 65, 200, 576})
      for (int64_t rows : {0, 1, 2, 7, 100})
        for (int threads : {1, 3}) {
          Problem p(rows, dim, centre);
          std::vector<float> y(rows * dim), statistics(2 * rows), dx(rows * dim + 16, -7.0f), dw(dim), db(dim);
          fastlm::norm({p.x.data(), p.w.data(), p.b.data(), y.data(), statistics.data(), rows, dim, p.eps, centre, false,
                        threads});
          fastlm::NormBackward a{p.g.data(), p.x.data(), p.w.data(), statistics.data(), dx.data(), dw.data(), db.data(),
                                 nullptr, rows, dim, centre, false, threads};
          std::vector<float> scratch(fastlm::norm_backward_scratch(a));
          a.scratch = scratch.data();
          fastlm::norm_backward(a);
          std::vector<double> want_dw(dim), want_db(dim);
          for (int64_t r = 0; r < rows; ++r) {
            double scale, mean = 0, product = 0;
            const std::vector<double> n = p.exact(r, &scale);
            const float* g = p.g.data() + r * dim;
            for (int64_t i = 0; i < dim; ++i) {
              mean += static_cast<double>(g[i]) * p.w[i] / dim * centre;
              product += static_cast<double>(g[i]) * p.w[i] * n[i] / dim;
              want_dw[i] += g[i] * n[i], want_db[i] += g[i];
            }
            for (int64_t i = 0; i < dim; ++i)
              CHECK(std::abs(dx[r * dim + i] - scale * (g[i] * p.w[i] - mean - n[i] * product)) <= 1e-5 * (scale + 1));
          }
          for (int64_t i = 0; i < dim; ++i) {
            CHECK(std::abs(dw[i] - want_dw[i]) <= 1e-5 * (1 + rows));
            CHECK(std::abs(db[i] - want_db[i]) <= 1e-5 * (1 + rows));
          }
          for (int64_t i = rows * dim; i < rows * dim + 16; ++i) CHECK(dx[i] == -7.0f);
          // The bias' gradient alone, in place of the incoming one.
          std::vector<float> in_place = p.g, only(dim);
          a.grad_output = a.grad_input = in_place.data();
          a.grad_weight = nullptr, a.grad_bias = only.data();
          fastlm::norm_backward(a);
          for (int64_t i = 0; i < rows * dim; ++i) CHECK(in_place[i] == dx[i]);
          for (int64_t i = 0; i < dim; ++i) CHECK(only[i] == db[i]);
        }
}

// Normalising a sum, floats or bfloat16 being added, and its gradient: the bits of the addition and the norm apart.
FASTLM_TEST(norm_of_a_sum) {
  for (bool centre : {false, true})
    for (bool half : {false, true})
      for (int64_t dim : {1, 5, 16, 17, 65, 200})
        for (int threads : {1, 3}) {
          const int64_t rows = 40, n = rows * dim;
          Problem p(rows, dim, centre);
          std::vector<float> floats(n), want(n), sum(n + 16, -7.0f), y(n), plain(n), statistics(2 * rows), again(2 * rows);
          std::vector<uint16_t> bfloats(n);
          for (int64_t i = 0; i < n; ++i) {
            bfloats[i] = static_cast<uint16_t>(0x3e80 + i % 97);
            floats[i] = from_bfloat(bfloats[i]);
            want[i] = p.x[i] + floats[i];
          }
          const void* added = half ? static_cast<const void*>(bfloats.data()) : floats.data();
          fastlm::norm({p.x.data(), p.w.data(), p.b.data(), y.data(), statistics.data(), rows, dim, p.eps, centre, false,
                        threads, added, sum.data(), half});
          fastlm::norm({want.data(), p.w.data(), p.b.data(), plain.data(), again.data(), rows, dim, p.eps, centre, false,
                        1});
          CHECK(std::memcmp(sum.data(), want.data(), n * sizeof(float)) == 0);
          CHECK(y == plain && statistics == again);
          for (int64_t i = n; i < n + 16; ++i) CHECK(sum[i] == -7.0f);
          std::vector<float> dx(n + 16, -7.0f), apart(n), upstream(n);
          for (int64_t i = 0; i < n; ++i) upstream[i] = 0.25f * static_cast<float>(i % 13);
          fastlm::NormBackward a{p.g.data(), sum.data(), p.w.data(), statistics.data(), apart.data(), nullptr, nullptr,
                                 nullptr, rows, dim, centre, false, threads};
          fastlm::norm_backward(a);
          a.grad_input = dx.data(), a.grad_sum = upstream.data();
          fastlm::norm_backward(a);
          for (int64_t i = 0; i < n; ++i)
            CHECK(std::abs(dx[i] - (apart[i] + upstream[i])) <= 1e-6 * (1 + std::abs(upstream[i]) + std::abs(apart[i])));
          for (int64_t i = n; i < n + 16; ++i) CHECK(dx[i] == -7.0f);
        }
}
