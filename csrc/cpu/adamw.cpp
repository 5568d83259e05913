#include "fastlm/adamw.h"

#include "simd_math.h"
#include "threads.h"

namespace fastlm {
namespace FASTLM_ISA {
namespace {

// Elements of a part: the unit in which squares are summed, the same for any thread count, and work is shared.
constexpr int64_t kPart = 1 << 13;
// Parts below which waking a second thread costs more than it saves.
constexpr int64_t kWorthAThread = 2;

int64_t count_parts(const AdamW& a) {
  int64_t parts = 0;
  for (int64_t i = 0; i < a.size; ++i) parts += (a.tensors[i].count + kPart - 1) / kPart;
  return parts;
}

float sum_of_squares(const float* x, int64_t n) {
  vf sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes)
    for (int k = 0; k < 4; ++k) {
      const vf v = load(x + i + k * kLanes);
      sums[k] += v * v;
    }
  for (; i < n; i += kLanes) {
    const vf v = load_until(x, i, n, 0.0f);
    sums[0] += v * v;
  }
  return reduce_add((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

FASTLM_INLINE void store_until(float* p, int64_t i, int64_t n, vf v) {
  if (i + kLanes <= n)
    store(p + i, v);
  else
    store_partial(p + i, v, static_cast<int>(n - i));
}

void update(const AdamWTensor& t, float clip, int64_t begin, int64_t end) {
  if (t.parameter == nullptr) {
    if (clip == 1.0f) return;
    for (int64_t i = begin; i < end; i += kLanes)
      store_until(t.gradient, i, end, load_until(t.gradient, i, end, 0.0f) * clip);
    return;
  }
  const double step = static_cast<double>(*t.steps) + 1;
  const float kept = static_cast<float>(1 - t.rate * t.decay);
  const float rate = static_cast<float>(t.rate / (1 - __builtin_pow(t.beta1, step)));
  const float scale = static_cast<float>(1 / __builtin_sqrt(1 - __builtin_pow(t.beta2, step)));
  const float new1 = static_cast<float>(1 - t.beta1), new2 = static_cast<float>(1 - t.beta2);
  const float old2 = static_cast<float>(t.beta2), epsilon = static_cast<float>(t.epsilon);
  for (int64_t i = begin; i < end; i += kLanes) {
    // The last few elements take the same path as all others: a scalar tail would round differently.
    const vf g = load_until(t.gradient, i, end, 0.0f) * clip;
    vf m = load_until(t.first, i, end, 0.0f), v = load_until(t.second, i, end, 0.0f);
    m += (g - m) * new1;
    v = v * old2 + g * g * new2;
    const vf p = load_until(t.parameter, i, end, 0.0f) * kept - m * rate / (sqrt(v) * scale + epsilon);
    store_until(t.first, i, end, m);
    store_until(t.second, i, end, v);
    store_until(t.parameter, i, end, p);
  }
}

// Calls f(tensor, begin, end, part) for each part of `mine`; parts are counted through all tensors.
template <typename F>
FASTLM_INLINE void each_part(const AdamW& a, Range mine, const F& f) {
  int64_t part = 0;
  for (int64_t i = 0; i < a.size && part < mine.end; ++i) {
    const AdamWTensor& t = a.tensors[i];
    for (int64_t begin = 0; begin < t.count; begin += kPart, ++part)
      if (part >= mine.begin && part < mine.end) f(t, begin, begin + kPart < t.count ? begin + kPart : t.count, part);
  }
}

}  // namespace

int64_t adamw_scratch(const AdamW& a) { return count_parts(a); }

void adamw(const AdamW& a) {
  const int64_t parts = count_parts(a), useful = parts / kWorthAThread;
  parallel(useful < a.threads ? static_cast<int>(useful) : a.threads, [&](int thread, int threads, Barrier& barrier) {
    const Range mine = share(parts, thread, threads);
    each_part(a, mine, [&](const AdamWTensor& t, int64_t begin, int64_t end, int64_t part) {
      a.scratch[part] = sum_of_squares(t.gradient + begin, end - begin);
    });
    barrier.wait();
    double squares = 0;
    for (int64_t part = 0; part < parts; ++part) squares += a.scratch[part];
    const double norm = __builtin_sqrt(squares), limit = a.max_norm / (norm + 1e-6);
    // What is not finite stays so where there is clipping, and stays in its place where there is none.
    const float clip = limit > 1 || a.max_norm == __builtin_inf() ? 1.0f : static_cast<float>(limit);
    each_part(a, mine, [&](const AdamWTensor& t, int64_t begin, int64_t end, int64_t) { update(t, clip, begin, end); });
    barrier.wait();  // everybody has read the steps
    if (thread != 0) return;
    *a.norm = static_cast<float>(norm);
    for (int64_t i = 0; i < a.size; ++i)
      if (a.tensors[i].parameter != nullptr) *a.tensors[i].steps += 1.0f;
  });
}

}  // namespace FASTLM_ISA
}  // namespace fastlm
