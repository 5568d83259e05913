// Drawing a token from logits: fastlm/reference/sample.py, without sorting the vocabulary.
//
// A row costs one pass for the maximum and one for the weights and their sums by group; a draw walks the group sums
// and one group. top_p is decided by rejection: one pass sums the weights ahead of the drawn token, and where that
// refuses the token, the same sums serve the next draw. top_k first shrinks the row to its k candidates, found with
// the help of the groups' maxima. All sums are of integers, so that neither the lanes nor the threads matter; and this file is
// compiled without fused multiply-adds, so that every level rounds alike.
//
// Threads share the rows. To share one row between them was tried and lost: at 50,000 tokens a pass takes less time
// than the threads take to meet.
#include "fastlm/sample.h"

#include <cfloat>
#include <cstring>

#include "fastlm/philox.h"
#include "kernel_table.h"
#include "simd.h"
#include "threads.h"
#include "top_k.h"

namespace fastlm {
namespace FASTLM_ISA {
namespace {

constexpr int kGroupVectors = 32;
constexpr int64_t kGroup = kGroupVectors * kLanes;  // elements
constexpr float kInfinity = __builtin_inff();

int64_t groups_of(int64_t n) { return (n + kGroup - 1) / kGroup; }
int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// One thread's scratch.
struct Scratch {
  float* logits;     // [vocab] after bias and penalties, or after top_k
  float* e;          // [vocab, padded] relative probabilities
  uint32_t* counts;  // [vocab] of history; zero between calls
  int32_t* ids;      // [vocab] of what top_k keeps
  uint64_t* keys;    // [vocab] for top_k
  int64_t* sums;     // [groups] of weights
  float* maxima;     // [groups, kLanes]
};

Scratch scratch_of(const SampleArgs& a, int thread) {
  char* p = static_cast<char*>(a.scratch) + sample_scratch_bytes(a.scratch_vocab) * thread;
  const int64_t padded = sample_padded(a.scratch_vocab);
  const auto take = [&](int64_t bytes) {
    char* const start = p;
    p += (bytes + 63) / 64 * 64;
    return start;
  };
  Scratch s;
  s.keys = reinterpret_cast<uint64_t*>(take(padded * 8));
  s.logits = reinterpret_cast<float*>(take(padded * 4));
  s.e = reinterpret_cast<float*>(take(padded * 4));
  s.counts = reinterpret_cast<uint32_t*>(take(padded * 4));
  s.ids = reinterpret_cast<int32_t*>(take(padded * 4));
  s.sums = reinterpret_cast<int64_t*>(take(padded / 16));
  s.maxima = reinterpret_cast<float*>(take(padded / 8));
  return s;
}

// The options of one row.
struct Options {
  double temperature, top_p;
  float min_p, repetition, presence, frequency;
  int64_t top_k, history, prompt;
  uint64_t seed, sequence;
  uint32_t position;

  bool penalised() const { return repetition != 1 || presence != 0 || frequency != 0; }
};

double at(const RealOption& option, int64_t row) { return option.rows ? option.rows[row] : option.value; }
int64_t at(const IntegerOption& option, int64_t row) { return option.rows ? option.rows[row] : option.value; }

Options options_of(const SampleArgs& a, int64_t row) {
  Options o;
  o.temperature = at(a.temperature, row);
  o.top_p = at(a.top_p, row);
  o.min_p = float(at(a.min_p, row));
  o.repetition = float(at(a.repetition_penalty, row));
  o.presence = float(at(a.presence_penalty, row));
  o.frequency = float(at(a.frequency_penalty, row));
  o.top_k = at(a.top_k, row);
  o.seed = uint64_t(at(a.seed, row));
  o.sequence = uint64_t(at(a.sequence, row));
  o.position = uint32_t(at(a.position, row));
  o.history = at(a.history_lengths, row);
  o.prompt = at(a.prompt_lengths, row);
  return o;
}

// Copies the row, with bias, to s.logits and applies the penalties. False: a history id is outside the vocabulary.
bool process(const float* logits, const float* bias, const int64_t* history, int64_t n, const Options& o,
             const Scratch& s) {
  if (bias == nullptr)
    std::memcpy(s.logits, logits, n * sizeof(float));
  else
    for (int64_t i = 0; i < n; ++i) s.logits[i] = logits[i] + bias[i];
  if (history == nullptr || !o.penalised()) return true;
  for (int64_t j = 0; j < o.history; ++j)
    if (history[j] < 0 || history[j] >= n) return false;
  // Counts are kept as 2 * (occurrences after the prompt) + 1, so that 0 means unseen; and back to 0 once applied.
  for (int64_t j = 0; j < o.history; ++j) {
    uint32_t& count = s.counts[history[j]];
    count = (count | 1) + (j >= o.prompt ? 2 : 0);
  }
  for (int64_t j = 0; j < o.history; ++j) {
    const uint32_t count = s.counts[history[j]];
    if (count == 0) continue;
    s.counts[history[j]] = 0;
    float x = s.logits[history[j]];
    x = x < 0 ? x * o.repetition : x / o.repetition;
    if (count > 1) {
      x = x - o.frequency * float(count >> 1);
      x = x - o.presence;
    }
    s.logits[history[j]] = x;
  }
  return true;
}

// The maximum of each lane of each group; NaN where the lane has NaN or +inf.
void find_maxima(const float* x, int64_t n, float* maxima) {
  for (int64_t g = 0; g < groups_of(n); ++g) {
    const int64_t end = least((g + 1) * kGroup, n);
    vf best = broadcast(-kInfinity);
    vi fine = ~vi{};
    for (int64_t i = g * kGroup; i < end; i += kLanes) {
      const vf v = load_until(x, i, end, -kInfinity);
      fine &= v < kInfinity;
      best = v > best ? v : best;
    }
    store(maxima + g * kLanes, select(fine, best, broadcast(__builtin_nanf(""))));
  }
}

// The maximum of the row; NaN where it has NaN or +inf.
float maximum_of(const float* maxima, int64_t groups) {
  vf best = broadcast(-kInfinity);
  vi fine = ~vi{};
  for (int64_t g = 0; g < groups; ++g) {
    const vf v = load(maxima + g * kLanes);
    fine &= v < kInfinity;
    best = v > best ? v : best;
  }
  return any(~fine) ? __builtin_nanf("") : reduce_max(best);
}

int64_t first_maximum(const float* x, int64_t n, float maximum, const float* maxima) {
  int64_t g = 0;
  while (!any(load(maxima + g * kLanes) == maximum)) ++g;
  int64_t i = g * kGroup;
  while (i < n && x[i] != maximum) ++i;
  return i;
}

// Shrinks the row to its k largest elements, in order of id, in s.logits and s.ids; x may be s.logits. Returns how
// many there are: less than k where the others are -inf.
int64_t keep_top_k(const float* x, int64_t n, float maximum, int64_t k, const Scratch& s) {
  const int64_t groups = groups_of(n);
  // Each of the maxima is an element, so a threshold that k of them reach will do, and there are few to look at.
  float threshold = threshold_for(s.maxima, groups * kLanes, maximum, k);
  if (threshold == -FLT_MAX) threshold = threshold_for(x, n, maximum, k);
  int64_t found = 0;
  for (int64_t g = 0; g < groups; ++g) {
    if (!any(load(s.maxima + g * kLanes) >= threshold)) continue;
    const int64_t end = least((g + 1) * kGroup, n);
    for (int64_t i = g * kGroup; i < end; i += kLanes) {
      for (uint32_t lanes = lanes_of(load_until(x, i, end, -kInfinity) >= threshold); lanes; lanes &= lanes - 1) {
        const int64_t id = i + __builtin_ctz(lanes);
        s.logits[found] = x[id];
        s.ids[found++] = int32_t(id);
      }
    }
  }
  if (found <= k) return found;
  const auto key = [&](int64_t i) { return rank_key(s.logits[i], uint32_t(s.ids[i])); };
  for (int64_t i = 0; i < found; ++i) s.keys[i] = key(i);
  const uint64_t last = kth_largest(s.keys, found, k);
  int64_t kept = 0;
  for (int64_t i = 0; i < found; ++i) {
    if (key(i) < last) continue;
    s.logits[kept] = s.logits[i];
    s.ids[kept++] = s.ids[i];
  }
  return kept;
}

// Adding 1.5 * 2^23 rounds a float to an integer, half to even, and leaves it in the low bits.
constexpr float kRound = 0x1.8p23f;

// 2^y for -40 <= y <= 0. The exponent is added as an integer.
FASTLM_INLINE vf exp2(vf y) {
  const vf rounded = y + kRound;
  const vf f = y - (rounded - kRound);
  vf p = f * 0x1.5bba14p-10f + 0x1.3cea88p-7f;
  p = p * f + 0x1.c6b752p-5f;
  p = p * f + 0x1.ebf9bcp-3f;
  p = p * f + 0x1.62e42ap-1f;
  p = p * f + 1.0f;
  return (vf)((vu)p + ((vu)rounded << 23));
}

// The sum of weights, e * 2^38 rounded half to even. Adding 16 leaves e in units of 2^-19 in the low bits; adding
// 1.5 * 2^-15 to what that rounded off leaves the rest in units of 2^-38. The constants' own bits are taken off at the
// end; up to 2^12 additions cannot overflow.
struct WeightSum {
  vu high{}, low{};
  uint32_t additions = 0;

  __attribute__((always_inline)) void add(vf e) {
    const vf coarse = e + 16.0f;
    const vf fine = (e - (coarse - 16.0f)) + 0x1.8p-15f;
    high += (vu)coarse;
    low += (vu)fine;
    ++additions;
  }
  __attribute__((always_inline)) int64_t total() const {
    const uint32_t count = additions * kLanes;
    const uint32_t coarse = reduce_add(high) - count * bits_of(16.0f);
    const int32_t fine = int32_t(reduce_add(low) - count * bits_of(0x1.8p-15f));
    return (int64_t(coarse) << 19) + fine;
  }
};

int64_t weight_of(float e) {
  const double rounded = double(e) * 0x1p38 + 0x1.8p52;
  int64_t bits;
  std::memcpy(&bits, &rounded, 8);
  return bits - 0x4338000000000000;
}

// Relative probabilities and the groups' sums of weights; returns their total.
int64_t weigh(const float* x, int64_t n, float maximum, float scale, const Scratch& s) {
  int64_t total = 0;
  for (int64_t g = 0; g < groups_of(n); ++g) {
    const int64_t end = least((g + 1) * kGroup, n);
    WeightSum sum;
    for (int64_t i = g * kGroup; i < end; i += kLanes) {
      vf y = (load_until(x, i, end, -kInfinity) - maximum) * scale;
      y = y > -40.0f ? y : broadcast(-40.0f);
      const vf e = exp2(y);
      store(s.e + i, e);
      sum.add(e);
    }
    s.sums[g] = sum.total();
    total += s.sums[g];
  }
  return total;
}

// A prefix of the order "larger e first, then lower index": all elements ahead of (e, index).
struct Prefix {
  float e = -1;
  int64_t index = 0;

  bool has(float other, int64_t i) const { return other > e || (other == e && i < index); }
  // has(other, i) is other >= threshold(i).
  float threshold(int64_t i) const { return i < index || e < 0 ? e : float_of(bits_of(e) + 1); }
};

// Reduces the groups' sums to the weights within the prefix, itself within the one they are of; returns their total.
int64_t sum_prefix(const Prefix& prefix, int64_t n, const Scratch& s) {
  int64_t total = 0;
  for (int64_t g = 0; g < groups_of(n); ++g) {
    if (s.sums[g] == 0) continue;
    const int64_t begin = g * kGroup, end = least(begin + kGroup, n);
    const auto add = [&](WeightSum& sum, int64_t from, int64_t to, vf threshold) {
      for (int64_t i = from; i < to; i += kLanes) {
        const vf e = load(s.e + i);
        sum.add(select(e >= threshold, e, vf{}));
      }
    };
    WeightSum sum;
    if (prefix.index <= begin || prefix.index >= end) {
      add(sum, begin, end, broadcast(prefix.threshold(begin)));
    } else {  // the threshold rises by one bit within the group
      const int64_t turn = prefix.index / kLanes * kLanes;
      vf mixed;
      for (int lane = 0; lane < kLanes; ++lane) mixed[lane] = prefix.threshold(turn + lane);
      add(sum, begin, turn, broadcast(prefix.threshold(begin)));
      add(sum, turn, turn + 1, mixed);
      add(sum, turn + kLanes, end, broadcast(prefix.threshold(end)));
    }
    s.sums[g] = sum.total();
    total += s.sums[g];
  }
  return total;
}

// The first element at which the running sum of weights within the prefix exceeds the target.
int64_t find(const Prefix& prefix, int64_t n, int64_t target, const Scratch& s) {
  int64_t g = 0;
  for (; target >= s.sums[g]; ++g) target -= s.sums[g];
  const int64_t end = least((g + 1) * kGroup, n);
  int64_t i = g * kGroup;
  for (; i < end - 1; ++i) {
    if (prefix.has(s.e[i], i)) target -= weight_of(s.e[i]);
    if (target < 0) break;
  }
  return i;
}

float scale_of(double temperature) {
  const double scale = 1.4426950408889634 / temperature;
  return float(scale < double(FLT_MIN) ? double(FLT_MIN) : scale > double(FLT_MAX) ? double(FLT_MAX) : scale);
}

// An element of x, drawn by the weights of those that top_p and min_p keep.
int64_t draw(const float* x, int64_t n, float maximum, const Options& o, const Scratch& s) {
  int64_t total = weigh(x, n, maximum, scale_of(o.temperature), s);
  int64_t wanted = INT64_MAX;
  if (o.top_p < 1) {
    const auto share53 = static_cast<unsigned __int128>(__builtin_nearbyint(o.top_p * 0x1p53));
    wanted = int64_t((share53 * uint64_t(total) + ((uint64_t{1} << 53) - 1)) >> 53);
  }
  Prefix prefix;
  if (o.min_p > 0) {
    prefix = {o.min_p, n};
    total = sum_prefix(prefix, n, s);
  }
  for (uint32_t lane = 0;; ++lane) {
    const uint64_t random = random64(o.seed, o.sequence, o.position, lane);
    const auto target = int64_t((static_cast<unsigned __int128>(random) * uint64_t(total)) >> 64);
    const int64_t drawn = find(prefix, n, target, s);
    if (o.top_p >= 1) return drawn;
    prefix = {s.e[drawn], drawn};
    total = sum_prefix(prefix, n, s);
    if (total < wanted || total == 0) return drawn;
  }
}

// The row's token, or -1.
int64_t sample_row(const SampleArgs& a, int64_t row, const Scratch& s) {
  const Options o = options_of(a, row);
  const float* x = a.logits + row * a.row_stride;
  const int64_t n = a.vocab;
  const int64_t* history = a.history == nullptr ? nullptr : a.history + row * a.history_stride;
  if (a.bias != nullptr || (history != nullptr && o.penalised())) {
    const float* bias = a.bias == nullptr ? nullptr : a.bias + row * a.bias_stride;
    if (!process(x, bias, history, n, o, s)) return -1;
    x = s.logits;
  }
  find_maxima(x, n, s.maxima);
  const float maximum = maximum_of(s.maxima, groups_of(n));
  if (!(maximum > -kInfinity)) return -1;
  if (o.temperature == 0) return first_maximum(x, n, maximum, s.maxima);
  if (o.top_k == 0 || o.top_k >= n) return draw(x, n, maximum, o, s);
  const int64_t kept = keep_top_k(x, n, maximum, o.top_k, s);
  return s.ids[draw(s.logits, kept, maximum, o, s)];
}

}  // namespace

int64_t sample(const SampleArgs& args) {
  const int threads = int(least(args.threads, args.batch));
  parallel(threads, [&](int thread, int team, Barrier&) {
    const Range rows = share(args.batch, thread, team);
    const Scratch scratch = scratch_of(args, thread);
    for (int64_t row = rows.begin; row < rows.end; ++row) args.tokens[row] = sample_row(args, row, scratch);
  });
  return agree([&]() -> int64_t {
    for (int64_t row = 0; row < args.batch; ++row)
      if (args.tokens[row] < 0) return row;
    return -1;
  });
}

}  // namespace FASTLM_ISA
}  // namespace fastlm
