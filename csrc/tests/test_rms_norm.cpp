// RMS norm against double precision, at every length around a vector, with guards behind the output.
#include <cmath>
#include <vector>

#include "check.h"
#include "fastlm/rms_norm.h"

FASTLM_TEST(rms_norm_every_length) {
  for (int64_t dim : {1, 3, 4, 5, 15, 16, 17, 63, 64, 65, 200, 576})
    for (int64_t rows : {0, 1, 2, 7, 100})
      for (int threads : {1, 3}) {
        std::vector<float> x(rows * dim), w(dim), y(rows * dim + 16, -7.0f);
        for (int64_t i = 0; i < rows * dim; ++i) x[i] = 0.37f * static_cast<float>(i % 61 - 29);
        for (int64_t i = 0; i < dim; ++i) w[i] = 1.0f + 0.01f * static_cast<float>(i % 7);
        const float eps = 0.125f;
        fastlm::rms_norm({x.data(), w.data(), y.data(), rows, dim, eps, threads});
        for (int64_t r = 0; r < rows; ++r) {
          double mean = 0;
          for (int64_t i = 0; i < dim; ++i) mean += static_cast<double>(x[r * dim + i]) * x[r * dim + i] / dim;
          for (int64_t i = 0; i < dim; ++i) {
            const double want = x[r * dim + i] / std::sqrt(mean + eps) * w[i];
            CHECK(std::abs(y[r * dim + i] - want) <= 1e-6 * std::abs(want));
          }
          // A row alone, in place and without the weight, normalises to the same bits.
          fastlm::rms_norm({x.data() + r * dim, nullptr, x.data() + r * dim, 1, dim, eps, threads});
          for (int64_t i = 0; i < dim; ++i) CHECK(x[r * dim + i] * w[i] == y[r * dim + i]);
        }
        for (int64_t i = rows * dim; i < rows * dim + 16; ++i) CHECK(y[i] == -7.0f);
      }
}
