// Rotary embedding against the formula, bit for bit, from tokens-first input, with guards behind the output.
#include <vector>

#include "check.h"
#include "fastlm/rotary.h"

namespace {

// Through memory, so that the compiler can't fuse them here.
float product(float a, float b) {
  volatile float p = a * b;
  return p;
}

}  // namespace

FASTLM_TEST(rotary_equals_the_formula) {
  const int64_t batch = 2, heads = 3;
  for (int64_t tokens : {1, 5, 60})
    for (int64_t dim : {1, 2, 7, 32, 70})
      for (int64_t half : {int64_t{0}, dim / 2, dim / 3})
        for (bool interleaved : {false, true})
          for (bool per_sequence : {false, true})
            for (int threads : {1, 3}) {
              const int64_t n = batch * heads * tokens * dim, tables = (per_sequence ? batch : 1) * tokens * half;
              std::vector<float> x(n), y(n + 16, -7.0f), cos(tables), sin(tables);
              for (int64_t i = 0; i < n; ++i) x[i] = 0.37f * static_cast<float>(i % 61 - 29);
              for (int64_t i = 0; i < tables; ++i) {
                cos[i] = 0.013f * static_cast<float>(i % 67 - 31);
                sin[i] = 0.017f * static_cast<float>(i % 53 - 25);
              }
              fastlm::Rotary a = {};
              a.input = x.data();  // [batch, tokens, heads, dim]
              a.input_stride[0] = tokens * heads * dim;
              a.input_stride[1] = dim;
              a.input_stride[2] = heads * dim;
              a.cos = cos.data();
              a.sin = sin.data();
              a.table_stride = per_sequence ? tokens * half : 0;
              a.output = y.data();
              a.batch = batch;
              a.heads = heads;
              a.tokens = tokens;
              a.dim = dim;
              a.half = half;
              a.interleaved = interleaved;
              a.threads = threads;
              fastlm::rotary(a);
              bool equal = true;
              for (int64_t b = 0; b < batch; ++b)
                for (int64_t h = 0; h < heads; ++h)
                  for (int64_t t = 0; t < tokens; ++t) {
                    const float* from = &x[((b * tokens + t) * heads + h) * dim];
                    const float* to = &y[((b * heads + h) * tokens + t) * dim];
                    for (int64_t i = 0; i < half; ++i) {
                      const int64_t first = interleaved ? 2 * i : i, second = interleaved ? 2 * i + 1 : half + i;
                      const int64_t at = b * a.table_stride + t * half + i;
                      equal &= to[first] == product(from[first], cos[at]) - product(from[second], sin[at]);
                      equal &= to[second] == product(from[second], cos[at]) + product(from[first], sin[at]);
                    }
                    for (int64_t i = 2 * half; i < dim; ++i) equal &= to[i] == from[i];
                  }
              CHECK(equal);
              for (int64_t i = n; i < n + 16; ++i) CHECK(y[i] == -7.0f);
            }
}
