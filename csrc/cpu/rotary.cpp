// Compiled with -ffp-contract=off. The loops are left to the compiler, which vectorises both.
#include "fastlm/rotary.h"

#include <cstring>

#include "light_work.h"
#include "simd.h"

namespace fastlm {
namespace FASTLM_ISA {
namespace {

FASTLM_INLINE void turn_halves(const float* __restrict x, const float* __restrict cos, const float* __restrict sin,
                               float* __restrict y, int64_t half) {
  for (int64_t i = 0; i < half; ++i) {
    y[i] = x[i] * cos[i] - x[half + i] * sin[i];
    y[half + i] = x[half + i] * cos[i] + x[i] * sin[i];
  }
}

FASTLM_INLINE void turn_pairs(const float* __restrict x, const float* __restrict cos, const float* __restrict sin,
                              float* __restrict y, int64_t half) {
  for (int64_t i = 0; i < half; ++i) {
    y[2 * i] = x[2 * i] * cos[i] - x[2 * i + 1] * sin[i];
    y[2 * i + 1] = x[2 * i + 1] * cos[i] + x[2 * i] * sin[i];
  }
}

}  // namespace

void rotary(const Rotary& a) {
  const int64_t heads = a.batch * a.heads * a.tokens;
  parallel(light_threads(heads * a.dim, a.threads), [&](int thread, int threads, Barrier&) {
    const Range mine = share(heads, thread, threads);
    for (int64_t head = mine.begin; head < mine.end; ++head) {
      const int64_t t = head % a.tokens, h = head / a.tokens % a.heads, b = head / a.tokens / a.heads;
      const float* x = a.input + b * a.input_stride[0] + h * a.input_stride[1] + t * a.input_stride[2];
      const int64_t table = b * a.table_stride + ((a.starts ? a.starts[b] : 0) + t) * a.half;
      float* y = a.output + head * a.dim;
      if (a.interleaved)
        turn_pairs(x, a.cos + table, a.sin + table, y, a.half);
      else
        turn_halves(x, a.cos + table, a.sin + table, y, a.half);
      if (2 * a.half < a.dim) std::memcpy(y + 2 * a.half, x + 2 * a.half, (a.dim - 2 * a.half) * sizeof(float));
    }
  });
}

}  // namespace FASTLM_ISA
}  // namespace fastlm
