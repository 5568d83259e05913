#include "fastlm/greedy.h"

#include "blocks.h"
#include "linear_integer.h"
#include "linear_parts.h"
#include "threads.h"

namespace fastlm {
namespace FASTLM_ISA {
namespace {

constexpr float kInfinity = __builtin_inff();
constexpr int64_t kChunk = 32 * kLanes;  // outputs between two looks at them, while they are in level 1

// The best output of a row so far.
struct Best {
  float value;
  bool bad;  // NaN or +inf was among the outputs
  int64_t index;
};

struct Scratch {
  float* input;          // [rows, columns + 32]: x and g
  InputBlock* coarse;    // of that
  InputBlock* exact;     // [rows, columns / 32]
  float* errors;         // [rows]: e; NaN where all has to be computed
  Best *coarse_best, *best;  // [threads, rows], of the coarse outputs and of the exact ones
  int64_t* counts;           // [threads]
  char* end;
};

Scratch scratch_of(const Greedy& a) {
  char* at = static_cast<char*>(a.scratch);
  const auto take = [&](int64_t bytes) {
    char* const start = at;
    at += (bytes + 63) / 64 * 64;
    return start;
  };
  const int64_t wide = a.columns + kDirections;
  Scratch s;
  s.coarse = reinterpret_cast<InputBlock*>(take(linear_scratch(a.rows, wide) * int64_t{sizeof(InputBlock)}));
  s.exact = reinterpret_cast<InputBlock*>(take(a.rows * a.columns / kBlock * int64_t{sizeof(InputBlock)}));
  s.input = reinterpret_cast<float*>(take(a.rows * wide * int64_t{sizeof(float)}));
  s.errors = reinterpret_cast<float*>(take(a.rows * int64_t{sizeof(float)}));
  s.coarse_best = reinterpret_cast<Best*>(take(a.threads * a.rows * int64_t{sizeof(Best)}));
  s.best = reinterpret_cast<Best*>(take(a.threads * a.rows * int64_t{sizeof(Best)}));
  s.counts = reinterpret_cast<int64_t*>(take(a.threads * int64_t{sizeof(int64_t)}));
  s.end = at;
  return s;
}

float dot(const float* a, const float* b, int64_t n) {
  vf sums[2] = {};
  for (int64_t i = 0; i < n; i += kBlock)
    for (int v = 0; v < kVectors; ++v) sums[v % 2] += load(a + i + v * kLanes) * load(b + i + v * kLanes);
  return reduce_add(sums[0] + sums[1]);
}

// A bound of the length of a vector of whose n squares `squares` is the sum.
float length(float squares, int64_t n) {
  return __builtin_sqrtf(squares) * (1 + static_cast<float>(n + 64) * 0x1p-23f) + 0x1p-60f;
}

// e of a row, or NaN: see greedy.h. x has g behind it.
float error_of(const Greedy& a, const float* x) {
  const Screen& s = a.screen;
  const float* const g = x + a.columns;
  const float size = length(dot(x, x, a.columns), a.columns);
  if (!(size <= s.most)) return __builtin_nanf("");
  vf rest{};
  for (int64_t i = 0; i < a.columns; i += kLanes) {
    vf left = load(x + i), right{};
    for (int j = 0; j < kDirections; j += 2) {
      left -= load(s.basis + j * a.columns + i) * g[j];
      right -= load(s.basis + (j + 1) * a.columns + i) * g[j + 1];
    }
    left += right;
    rest += left * left;
  }
  const float off = (length(reduce_add(rest), a.columns) + s.off * size) * s.inverses[kDirections];
  float sum = off * off;
  for (int j = 0; j < kDirections; ++j) sum += g[j] * s.inverses[j] * (g[j] * s.inverses[j]);
  const float e = length(sum, kDirections), least = size * s.inverses[kDirections + 1];
  return (e > least ? e : least) * (1 + 0x1p-20f);
}

// Coarse outputs begin .. end - 1 of row m become bounds; `best` is that of the outputs.
void bound_outputs(const Greedy& a, int64_t m, int64_t begin, int64_t end, float error, Best& best) {
  float* const c = a.bounds + m * a.weight.outputs;
  const vf e = broadcast(error), least = broadcast(a.screen.floor);
  vf most = broadcast(-kInfinity);
  vi where{};
  const auto step = [&](int64_t i, vf coarse, vf slack) {
    const vf size = as_float(as_int(coarse) & 0x7fffffff);
    const vi larger = coarse > most;
    most = select(larger, coarse, most);
    where = (larger & static_cast<int32_t>(i)) | (~larger & where);
    return coarse + ((slack * e + least) + size * 0x1p-20f);
  };
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) store(c + i, step(i, load(c + i), load_bfloats(a.screen.slack + i)));
  if (i < end) {
    const int rest = static_cast<int>(end - i);
    uint16_t slack[kLanes] = {};
    std::memcpy(slack, a.screen.slack + i, rest * sizeof(uint16_t));
    store_partial(c + i, step(i, load_partial(c + i, rest, -kInfinity), load_bfloats(slack)), rest);
  }
  float values[kLanes];
  int32_t places[kLanes];
  store(values, most);
  std::memcpy(places, &where, sizeof(places));
  for (int lane = 0; lane < kLanes; ++lane)
    if (values[lane] > best.value) best = {values[lane], false, places[lane] + lane};
}

class Exact {
 public:
  Exact(const Greedy& a, const Scratch& s) : a_(a), s_(s) {}

  // Outputs n .. n + count - 1 of row m, count <= kLanes; n is a multiple of kLanes where the weight is interleaved. The
  // weights of those from `next` on are fetched meanwhile.
  void look(int64_t m, int64_t n, int64_t count, int64_t next, Best& best) const {
    float outputs[kLanes];
    const bool integer = is_quantized(a_.weight.kind);
    LinearWeight w = a_.weight;
    const int64_t row_bytes = weight_bytes(w.kind, a_.columns);
    w.weight = static_cast<const uint8_t*>(w.weight) + n * row_bytes;  // kLanes rows: a panel
    if (w.bias != nullptr) w.bias += n;
    w.output = outputs;
    w.outputs = count;
    LinearArgs call{};
    call.input = a_.input + m * a_.columns;
    call.scratch = s_.exact + m * (a_.columns / kBlock);
    call.rows = 1;
    call.columns = a_.columns;
    call.ahead = next == n ? 1 : (next - n) * row_bytes;  // these, if there are no others
    call.rounding = integer ? Rounding::kBits15 : Rounding::kNone;
    linear_outputs(call, w, 0, count);
    for (int64_t i = 0; i < count; ++i) {
      if (!(outputs[i] < kInfinity)) best.bad = true;
      if (outputs[i] > best.value) best.value = outputs[i], best.index = n + i;
    }
  }

  // The outputs that may be the largest of row m, among begin .. end - 1: those whose bound is not below `threshold`.
  int64_t search(int64_t m, int64_t begin, int64_t end, float threshold, Best& best) const {
    int64_t count = 0;
    for (int64_t n = find(m, begin, end, threshold); n < end;) {
      const int64_t next = find(m, n + together(), end, threshold), some = end - n < together() ? end - n : together();
      look(m, n, some, next < end ? next : n, best);
      count += some;
      if (best.value > threshold) threshold = best.value;
      n = next;
    }
    return count;
  }

  // Fetches the weights of outputs n .. n + kLanes - 1.
  void fetch(int64_t n) const {
    const int64_t row_bytes = weight_bytes(a_.weight.kind, a_.columns);
    const char* const first = static_cast<const char*>(a_.weight.weight) + n * row_bytes;
    for (int64_t line = 0; line < kLanes * row_bytes; line += 64) __builtin_prefetch(first + line, 0, 2);
  }

 private:
  // Outputs that are computed at a time.
  int64_t together() const { return is_quantized(a_.weight.kind) ? kLanes : 4; }

  // The first of them from `begin` on, which is one, of which some bound is not below `threshold`; `end`: none.
  int64_t find(int64_t m, int64_t begin, int64_t end, float threshold) const {
    const float* const bounds = a_.bounds + m * a_.weight.outputs;
    for (int64_t i = begin / kLanes * kLanes; i < end; i += kLanes) {
      uint32_t lanes = lanes_of(~(load_until(bounds, i, end, -kInfinity) < threshold));
      if (end - i < kLanes) lanes &= (uint32_t{1} << (end - i)) - 1;
      if (i < begin) lanes = lanes >> (begin - i) << (begin - i);
      if (lanes != 0) return i + __builtin_ctz(lanes) / together() * together();
    }
    return end;
  }

  const Greedy& a_;
  const Scratch& s_;
};

// The best of a row that the threads found.
Best best_of(const Best* best, int64_t m, int64_t rows, int threads) {
  Best found{-kInfinity, false, -1};
  for (int t = 0; t < threads; ++t) {
    const Best& own = best[t * rows + m];
    const bool bad = found.bad || own.bad;
    if (own.value > found.value) found = own;  // threads have the outputs in order
    found.bad = bad;
  }
  return found;
}

// --- What is kept beside the weight ------------------------------------------------------------------------------

// The nearest half, its magnitude rounded up in the middle; infinity beyond what a half can hold.
uint16_t half_of(float x) {
  const uint32_t bits = bits_of(x), magnitude = bits & 0x7fffffff, sign = bits >> 16 & 0x8000;
  if (magnitude < 0x38800000)  // its halves are multiples of 2^-24
    return static_cast<uint16_t>(sign | static_cast<uint32_t>(float_of(magnitude) * 0x1p24f + 0.5f));
  const uint32_t rounded = ((magnitude + 0x1000) >> 13) - (112 << 10);
  return static_cast<uint16_t>(sign | (magnitude < 0x7f800000 && rounded > 0x7c00 ? 0x7c00 : rounded));
}

vi codes_of(vf w, float inverse) {
  return round_to_int(max(min(w * inverse, broadcast(7.0f)), broadcast(-8.0f)));
}

// One block: the largest magnitude, with its sign, becomes -8, as ggml has it; then the scale becomes the best one for
// the codes that this gives, and the codes those nearest.
void coarsen_block(float* x, uint8_t* block) {
  vf w[kVectors], high = broadcast(-kInfinity), low = broadcast(kInfinity);
  for (int v = 0; v < kVectors; ++v) {
    w[v] = load(x + v * kLanes);
    high = max(high, w[v]);
    low = min(low, w[v]);
  }
  const float most = reduce_max(high), least = -reduce_max(-low);
  float scale = (most > -least ? most : least) / -8;
  vf products{}, squares{};
  for (int v = 0; v < kVectors; ++v) {
    const vf code = to_float(codes_of(w[v], scale == 0 ? 0.0f : 1 / scale));
    products += code * w[v];
    squares += code * code;
  }
  const float square = reduce_add(squares);
  if (square > 0) scale = reduce_add(products) / square;
  const uint16_t half = half_of(scale);
  std::memcpy(block, &half, sizeof(half));
  const vf rounded = broadcast_half(block);
  const float inverse = rounded[0] == 0 ? 0.0f : 1 / rounded[0];
  int32_t codes[kBlock];
  for (int v = 0; v < kVectors; ++v) {
    const vi code = codes_of(w[v], inverse);
    store(x + v * kLanes, w[v] - to_float(code) * rounded);
    const vi positive = code + 8;
    std::memcpy(codes + v * kLanes, &positive, sizeof(positive));
  }
  for (int i = 0; i < kBlock / 2; ++i) block[2 + i] = static_cast<uint8_t>(codes[i] | codes[i + kBlock / 2] << 4);
}

}  // namespace

void coarsen(const Coarsen& a) {
  parallel(a.threads, [&](int thread, int threads, Barrier&) {
    const Range rows = share(a.count, thread, threads);
    for (int64_t row = rows.begin; row < rows.end; ++row)
      for (int64_t k = 0; k < a.columns; k += kBlock)
        coarsen_block(a.rows + row * a.columns + k, a.blocks + row * a.stride + weight_bytes(WeightKind::kQ4_0, k));
  });
}

int64_t greedy_scratch(const Greedy& a) { return scratch_of(a).end - static_cast<char*>(a.scratch); }

int64_t greedy(const Greedy& a) {
  const Scratch s = scratch_of(a);
  const int64_t wide = a.columns + kDirections, outputs = a.weight.outputs;
  LinearArgs coarse{};
  coarse.input = s.input;
  coarse.scratch = s.coarse;
  coarse.weights[0] = {a.screen.coarse, a.weight.bias, a.bounds, outputs, WeightKind::kQ4_0};
  coarse.count = 1;
  coarse.rows = a.rows;
  coarse.columns = wide;
  coarse.rounding = Rounding::kBits15;
  parallel(a.threads, [&](int thread, int threads, Barrier& barrier) {
    const Range products = share(a.rows * kDirections, thread, threads);
    for (int64_t i = products.begin; i < products.end; ++i) {
      const int64_t m = i / kDirections, j = i % kDirections;
      float* const x = s.input + m * wide;
      if (j == 0) std::memcpy(x, a.input + m * a.columns, a.columns * sizeof(float));
      x[a.columns + j] = dot(a.input + m * a.columns, a.screen.basis + j * a.columns, a.columns);
    }
    barrier.wait();
    round_inputs(coarse, thread, threads);
    if (is_quantized(a.weight.kind)) {
      LinearArgs exact{};
      exact.input = a.input;
      exact.scratch = s.exact;
      exact.columns = a.columns;
      exact.rounding = Rounding::kBits15;
      const Range rows = share(a.rows, thread, threads);
      for (int64_t m = rows.begin; m < rows.end; ++m) {
        exact.input = a.input + m * a.columns;
        exact.scratch = s.exact + m * (a.columns / kBlock);
        exact.rows = 1;
        round_inputs(exact, 0, 1);
      }
    }
    const Range rows = share(a.rows, thread, threads);
    for (int64_t m = rows.begin; m < rows.end; ++m) s.errors[m] = error_of(a, s.input + m * wide);
    barrier.wait();

    const Range own = share(outputs, thread, threads, kLanes);
    Best* const guesses = s.coarse_best + thread * a.rows;
    for (int64_t m = 0; m < a.rows; ++m) guesses[m] = {-kInfinity, false, -1};
    for (int64_t n = own.begin; n < own.end; n += kChunk) {
      const int64_t end = n + kChunk < own.end ? n + kChunk : own.end;
      linear_outputs(coarse, coarse.weights[0], n, end);
      for (int64_t m = 0; m < a.rows; ++m) bound_outputs(a, m, n, end, s.errors[m], guesses[m]);
    }
    barrier.wait();

    const Exact exact(a, s);
    Best* const best = s.best + thread * a.rows;
    int64_t count = 0;
    for (int64_t m = 0; m < a.rows; ++m) {
      float threshold = __builtin_nanf("");
      if (s.errors[m] == s.errors[m]) {
        Best start = best_of(s.coarse_best, m, a.rows, threads);
        const int64_t n = start.index < 0 ? 0 : start.index / kLanes * kLanes;
        start.value = -kInfinity;
        exact.fetch(n);
        exact.look(m, n, outputs - n < kLanes ? outputs - n : kLanes, n, start);
        threshold = start.value;
      }
      best[m] = {-kInfinity, false, -1};
      count += exact.search(m, own.begin, own.end, threshold, best[m]);
    }
    s.counts[thread] = count;
    barrier.wait();
    if (thread != 0) return;
    for (int64_t m = 0; m < a.rows; ++m) {
      const Best found = best_of(s.best, m, a.rows, threads);
      a.tokens[m] = found.bad ? -1 : found.index;
    }
    for (int t = 0; t < threads; ++t) a.counts[0] += s.counts[t];
    a.counts[1] += 1;
  });
  return agree([&]() -> int64_t {
    for (int64_t m = 0; m < a.rows; ++m)
      if (a.tokens[m] < 0) return m;
    return -1;
  });
}

}  // namespace FASTLM_ISA
}  // namespace fastlm
