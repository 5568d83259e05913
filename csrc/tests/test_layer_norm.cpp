// Layer norm against double precision, at every length around a vector, with guards behind the output.
#include <cmath>
#include <vector>

#include "check.h"
#include "fastlm/layer_norm.h"

FASTLM_TEST(layer_norm_every_length) {
  for (int64_t dim : {1, 3, 4, 5, 15, 16, 17, 63, 64, 65, 200, 576})
    for (int64_t rows : {0, 1, 2, 7, 100})
      for (int threads : {1, 3}) {
        std::vector<float> x(rows * dim), w(dim), b(dim), y(rows * dim + 16, -7.0f);
        for (int64_t i = 0; i < rows * dim; ++i) x[i] = 5.0f + 0.37f * static_cast<float>(i % 61 - 29);
        for (int64_t i = 0; i < dim; ++i) w[i] = 1.0f + 0.01f * static_cast<float>(i % 7), b[i] = 0.1f * (i % 5);
        const float eps = 0.125f;
        fastlm::layer_norm({x.data(), w.data(), b.data(), y.data(), rows, dim, eps, threads});
        for (int64_t r = 0; r < rows; ++r) {
          double mean = 0, variance = 0;
          for (int64_t i = 0; i < dim; ++i) mean += static_cast<double>(x[r * dim + i]) / dim;
          for (int64_t i = 0; i < dim; ++i) variance += (x[r * dim + i] - mean) * (x[r * dim + i] - mean) / dim;
          for (int64_t i = 0; i < dim; ++i) {
            const double want = (x[r * dim + i] - mean) / std::sqrt(variance + eps) * w[i] + b[i];
            CHECK(std::abs(y[r * dim + i] - want) <= 4e-6);
          }
          // A row alone, in place and without parameters, normalises to the same bits.
          std::vector<float> alone(x.begin() + r * dim, x.begin() + (r + 1) * dim), again(dim);
          fastlm::layer_norm({alone.data(), w.data(), b.data(), again.data(), 1, dim, eps, threads});
          for (int64_t i = 0; i < dim; ++i) CHECK(again[i] == y[r * dim + i]);
          fastlm::layer_norm({alone.data(), nullptr, nullptr, alone.data(), 1, dim, eps, threads});
          for (int64_t i = 0; i < dim; ++i) CHECK(std::abs(alone[i] * w[i] + b[i] - y[r * dim + i]) <= 1e-6);
        }
        for (int64_t i = rows * dim; i < rows * dim + 16; ++i) CHECK(y[i] == -7.0f);
      }
}
