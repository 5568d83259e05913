// Drawing a token from logits: fastlm/reference/sample.py, without sorting the vocabulary.
//
// A row costs one pass for the maximum and one for the weights and their sums by group; a draw walks the group sums
// and one group. top_p is decided by rejection: one pass sums the weights ahead of the drawn token, and where that
// refuses the token, the same sums serve the next draw. top_k first shrinks the row to its k candidates, found with
// the help of the groups' maxima. All sums are of integers, so that neither the lanes nor the threads matter; and this
// file is compiled without fused multiply-adds, so that every level rounds alike.
//
// Weights exact to the bit cost twice what weights within 2^-20 do, and the token is nearly always the same: so the
// latter are found first, with a bound on their sums' error, and if the draw falls further than that from where
// another token would begin, it is the exact one's result. If not, or if top_p might refuse it, the row is drawn again
// exactly.
//
// Threads share the rows; what is left over of them, and of a vocabulary large enough, all work on row by row.
#include "fastlm/sample.h"

#include <cfloat>

#include "fastlm/philox.h"
#include "kernel_table.h"
#include "sample_options.h"
#include "sample_weights.h"
#include "simd.h"
#include "threads.h"
#include "top_k.h"

namespace fastlm {
namespace FASTLM_ISA {
namespace {

constexpr int64_t kHeadStart = 10240;

// The threads that draw a row together: all go through the same steps, each over groups of its own, and come to the
// same decisions.
struct Crew {
  int thread, threads;
  Barrier& barrier;

  Range groups(int64_t n) const { return share(groups_of(n), thread, threads); }
  // The same for the first step, to which the first thread comes some 0.3 µs before the others: kHeadStart elements.
  Range first_groups(int64_t n) const {
    const int64_t ahead = threads > 1 ? kHeadStart / kGroup : 0, all = groups_of(n) + (threads - 1) * ahead;
    const auto begin = [&](int t) { return t == 0 ? 0 : all * t / threads - ahead * (t - 1); };
    return {begin(thread), begin(thread + 1)};
  }
  void meet() const {
    if (threads > 1) barrier.wait();
  }
};

// A row of so many elements is drawn with near weights first.
constexpr int64_t kNearFrom = 1024;
// So many elements are work for a thread, four times as many where only their maximum and a few others are looked at:
// for less, meeting the others takes longer.
constexpr int64_t kThreadFrom = 16384;

// What each thread of a crew has found, for the others.
struct Share {
  int64_t weight;
  float maximum;
};

// What a crew works in.
struct Scratch {
  float* logits;     // [vocab] after bias and penalties, or after top_k
  float* e;          // [vocab, padded] relative probabilities
  uint32_t* counts;  // [vocab] of history; zero between calls
  int32_t* ids;      // [vocab] of what top_k keeps
  uint64_t* keys;    // [vocab] for top_k
  int64_t* sums;     // [groups] of weights
  float* maxima;     // [groups, kLanes]
  char* shares;      // a Share at the beginning of each thread's scratch
  int64_t stride;    // from one to the next, bytes

  Share& share(int thread) const { return *reinterpret_cast<Share*>(shares + thread * stride); }
};

Scratch scratch_of(const SampleArgs& a, int thread) {
  const auto stride = int64_t(sample_scratch_bytes(a.scratch_vocab));
  char* p = static_cast<char*>(a.scratch) + stride * thread;
  const int64_t padded = sample_padded(a.scratch_vocab);
  const auto take = [&](int64_t bytes) {
    char* const start = p;
    p += (bytes + 63) / 64 * 64;
    return start;
  };
  Scratch s;
  s.shares = take(sizeof(Share));
  s.stride = stride;
  s.keys = reinterpret_cast<uint64_t*>(take(padded * 8));
  s.logits = reinterpret_cast<float*>(take(padded * 4));
  s.e = reinterpret_cast<float*>(take(padded * 4));
  s.counts = reinterpret_cast<uint32_t*>(take(padded * 4));
  s.ids = reinterpret_cast<int32_t*>(take(padded * 4));
  s.sums = reinterpret_cast<int64_t*>(take(padded / 16));
  s.maxima = reinterpret_cast<float*>(take(padded / 8));
  return s;
}

// The maximum of each lane of the groups; NaN where the lane has NaN or +inf.
void find_maxima(const float* x, int64_t n, Range groups, float* maxima) {
  alignas(64) float padded[kGroup];
  for (int64_t g = groups.begin; g < groups.end; ++g) {
    const float* const group = group_of(x, n, g, padded);
    vf best[2] = {broadcast(-kInfinity), broadcast(-kInfinity)};
    vi fine = ~vi{};
    for (int64_t i = 0; i < kGroup; i += 2 * kLanes) {
      const vf v = load(group + i), w = load(group + i + kLanes);
      fine &= (v < kInfinity) & (w < kInfinity);
      best[0] = v > best[0] ? v : best[0];
      best[1] = w > best[1] ? w : best[1];
    }
    store(maxima + g * kLanes, select(fine, max(best[0], best[1]), broadcast(__builtin_nanf(""))));
  }
}

// The maximum of the groups; NaN where they have NaN or +inf.
float maximum_of(const float* maxima, Range groups) {
  vf best = broadcast(-kInfinity);
  vi fine = ~vi{};
  for (int64_t g = groups.begin; g < groups.end; ++g) {
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

// Relative probabilities and the sums of weights of the groups.
void weigh(const float* x, int64_t n, Range groups, float maximum, float scale, const Scratch& s) {
  alignas(64) float padded[kGroup];
  for (int64_t g = groups.begin; g < groups.end; ++g) {
    const float* const group = group_of(x, n, g, padded);
    WeightSum sum;
    for (int64_t i = 0; i < kGroup; i += kLanes) {
      vf y = (load(group + i) - maximum) * scale;
      y = y > -40.0f ? y : broadcast(-40.0f);
      const vf e = exp2(y);
      store(s.e + g * kGroup + i, e);
      sum.add(e);
    }
    s.sums[g] = sum.total();
  }
}

// The same, nearly.
void weigh_nearly(const float* x, int64_t n, Range groups, float maximum, float scale, const Scratch& s) {
  alignas(64) float padded[kGroup];
  for (int64_t g = groups.begin; g < groups.end; ++g) {
    const float* const group = group_of(x, n, g, padded);
    s.sums[g] = near_sum([&](int64_t i) {
      const vf e = near_exp2((load(group + i) - maximum) * scale);
      store(s.e + g * kGroup + i, e);
      return e;
    });
  }
}

int64_t total_of(int64_t n, const Scratch& s) {
  int64_t total = 0;
  for (int64_t g = 0; g < groups_of(n); ++g) total += s.sums[g];
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

// Reduces the groups' sums to the weights within the prefix, itself within the one they are of.
void sum_prefix(const Prefix& prefix, int64_t n, Range groups, const Scratch& s) {
  for (int64_t g = groups.begin; g < groups.end; ++g) {
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
  }
}

struct Found {
  int64_t index;
  int64_t group_sum;
  int64_t slack;  // how much more or less of the target would have found the same
};

// The first element at which the running sum of weights within the prefix exceeds the target.
Found find(const Prefix& prefix, int64_t n, int64_t target, const Scratch& s) {
  int64_t g = 0;
  for (; target >= s.sums[g]; ++g) target -= s.sums[g];
  const int64_t end = least((g + 1) * kGroup, n);
  int64_t i = g * kGroup;
  const auto weight_from = [&](int64_t begin, int64_t elements) {
    WeightSum sum;
    for (int64_t at = begin; at < begin + elements; at += kLanes) {
      const vf e = load(s.e + at);
      vi within = e > prefix.e;
      if (at < prefix.index) {
        vi lane;
        for (int j = 0; j < kLanes; ++j) lane[j] = j;
        within |= (e == prefix.e) & (lane < int32_t(least(prefix.index - at, kLanes)));
      }
      sum.add(select(within, e, vf{}));
    }
    return sum.total();
  };
  constexpr int64_t kSteps[] = {8 * kLanes, kLanes};  // adding up across lanes is what takes time
  for (const int64_t step : kSteps)
    for (; i + step < end; i += step) {
      const int64_t weight = weight_from(i, step);
      if (target < weight) break;
      target -= weight;
    }
  for (;; ++i) {
    const int64_t weight = prefix.has(s.e[i], i) ? weight_of(s.e[i]) : 0;
    if (target < weight || i == end - 1) return {i, s.sums[g], least(target, weight - 1 - target)};
    target -= weight;
  }
}

// The part `random` / 2^64 of the total.
int64_t target_of(uint64_t random, int64_t total) {
  return int64_t((static_cast<unsigned __int128>(random) * uint64_t(total)) >> 64);
}

// What the tokens that top_p keeps weigh at least.
int64_t wanted_of(double top_p, int64_t total) {
  const auto share53 = static_cast<unsigned __int128>(__builtin_nearbyint(top_p * 0x1p53));
  return int64_t((share53 * uint64_t(total) + ((uint64_t{1} << 53) - 1)) >> 53);
}

float scale_of(double temperature) {
  const double scale = 1.4426950408889634 / temperature;
  return float(scale < double(FLT_MIN) ? double(FLT_MIN) : scale > double(FLT_MAX) ? double(FLT_MAX) : scale);
}

// What `draw` returns where near weights decide it; else -1.
int64_t draw_nearly(const float* x, int64_t n, float maximum, const Options& o, const Scratch& s, const Crew& crew) {
  const Range groups = crew.groups(n);
  weigh_nearly(x, n, groups, maximum, scale_of(o.temperature), s);
  crew.meet();
  int64_t total = total_of(n, s);
  const int64_t wanted = o.top_p < 1 ? wanted_of(o.top_p, total) : INT64_MAX;
  const double margin = kNearError * 2 * double(total) + 4 * double(n);  // of two sums, each within the total
  double uncertain = 0;  // what weights that may be in the prefix or not come to
  Prefix prefix;
  for (uint32_t lane = 0;; ++lane) {
    const int64_t target = target_of(random64(o.seed, o.sequence, o.position, lane), total);
    const Found drawn = find(prefix, n, target, s);
    // With the target r times the total, it and the sum up to a token differ by 1 - r times the error of what lies
    // below it and r times that of what lies above: half the total's at most, and twice the group's, of which one part
    // is summed by element and all of it as one.
    const double error = kNearError * (0.5 * double(total) + 2 * double(drawn.group_sum)) + 2 * double(n) + uncertain;
    if (double(drawn.slack) <= error) return -1;
    if (o.top_p >= 1) return drawn.index;
    // Whoever is ahead of the token is so by its near weight, unless that is within 2^-20 of the token's.
    const float e = s.e[drawn.index], low = e * (1 - 0x1p-20f), high = e * (1 + 0x1p-20f);
    // Groups that weigh less than the token have none such.
    const auto least_sum = int64_t(double(weight_of(e)) * (1 - 0x1p-19));
    int64_t sum = 0;
    for (int64_t g = groups.begin; g < groups.end; ++g) {
      if (s.sums[g] < least_sum) continue;
      sum += near_sum([&](int64_t i) {
        const vf v = load(s.e + g * kGroup + i);
        return select(v >= low, v, vf{});
      });
    }
    s.share(crew.thread).weight = sum;
    crew.meet();
    int64_t most = -weight_of(e);
    for (int thread = 0; thread < crew.threads; ++thread) most += s.share(thread).weight;
    if (double(wanted - most) > margin + uncertain) return drawn.index;
    for (int64_t g = groups.begin; g < groups.end; ++g) {
      if (s.sums[g] < least_sum) {
        s.sums[g] = 0;
        continue;
      }
      s.sums[g] = near_sum([&](int64_t i) {
        const vf v = load(s.e + g * kGroup + i);
        return select(v > high, v, vf{});
      });
    }
    crew.meet();
    total = total_of(n, s);
    if (double(total - wanted) <= margin) return -1;
    uncertain += double(most - total) + margin;
    prefix = {high, 0};
  }
}

// An element of x, drawn by the weights of those that top_p and min_p keep.
int64_t draw(const float* x, int64_t n, float maximum, const Options& o, const Scratch& s, const Crew& crew) {
  if (n >= kNearFrom && o.min_p == 0) {
    const int64_t drawn = draw_nearly(x, n, maximum, o, s, crew);
    if (drawn >= 0) return drawn;
    crew.meet();  // before what all have read is written
  }
  const Range groups = crew.groups(n);
  weigh(x, n, groups, maximum, scale_of(o.temperature), s);
  crew.meet();
  int64_t total = total_of(n, s);
  const int64_t wanted = o.top_p < 1 ? wanted_of(o.top_p, total) : INT64_MAX;
  Prefix prefix;
  const auto narrow = [&](const Prefix& to) {
    prefix = to;
    crew.meet();
    sum_prefix(prefix, n, groups, s);
    crew.meet();
    total = total_of(n, s);
  };
  if (o.min_p > 0) narrow({o.min_p, n});
  for (uint32_t lane = 0;; ++lane) {
    const int64_t target = target_of(random64(o.seed, o.sequence, o.position, lane), total);
    const int64_t drawn = find(prefix, n, target, s).index;
    if (o.top_p >= 1) return drawn;
    narrow({s.e[drawn], drawn});
    if (total < wanted || total == 0) return drawn;
  }
}

// The row's token, or -1; on the crew's first thread.
int64_t sample_row(const SampleArgs& a, int64_t row, const Scratch& s, const Crew& crew) {
  const Options o = options_of(a, row);
  const float* x = a.logits + row * a.row_stride;
  const int64_t n = a.vocab;
  const int64_t* history = a.history == nullptr ? nullptr : a.history + row * a.history_stride;
  if (a.bias != nullptr || (history != nullptr && o.penalised())) {
    const float* bias = a.bias == nullptr ? nullptr : a.bias + row * a.bias_stride;
    if (crew.thread == 0) s.sums[0] = process(x, bias, history, n, o, s.logits, s.counts);
    crew.meet();
    if (!s.sums[0]) return -1;
    x = s.logits;
  }
  const Range groups = crew.first_groups(n);
  find_maxima(x, n, groups, s.maxima);
  s.share(crew.thread).maximum = maximum_of(s.maxima, groups);
  crew.meet();
  float maximum = -kInfinity;
  for (int thread = 0; thread < crew.threads; ++thread) {
    const float other = s.share(thread).maximum;
    maximum = other <= maximum ? maximum : other;  // NaN stays
    if (maximum != maximum) return -1;
  }
  if (maximum == -kInfinity) return -1;
  if (o.temperature != 0 && (o.top_k == 0 || o.top_k >= n)) return draw(x, n, maximum, o, s, crew);
  if (crew.thread > 0) return -1;
  if (o.temperature == 0) return first_maximum(x, n, maximum, s.maxima);
  const int64_t kept = keep_top_k(x, n, maximum, o.top_k, s);
  Barrier alone(1);
  return s.ids[draw(s.logits, kept, maximum, o, s, {0, 1, alone})];
}

}  // namespace

int64_t sample(const SampleArgs& args) {
  const bool light = (args.top_k.rows == nullptr && args.top_k.value > 0) ||
                     (args.temperature.rows == nullptr && args.temperature.value == 0);
  const int64_t most = args.vocab / (light ? 4 * kThreadFrom : kThreadFrom);  // threads for one row
  parallel(int(least(args.threads, args.batch * (most > 1 ? most : 1))), [&](int thread, int team, Barrier& barrier) {
    Barrier alone(1);
    const int64_t together = most > 1 ? args.batch % team : 0;
    const Range rows = share(args.batch - together, thread, team);
    const Scratch own = scratch_of(args, thread), first = scratch_of(args, 0);
    for (int64_t row = rows.begin; row < rows.end; ++row)
      args.tokens[row] = sample_row(args, row, own, {0, 1, alone});
    for (int64_t row = args.batch - together; row < args.batch; ++row) {
      if (row > 0 && team > 1) barrier.wait();  // the scratch may be in use
      const int64_t token = sample_row(args, row, first, {thread, team, barrier});
      if (thread == 0) args.tokens[row] = token;
    }
  });
  return agree([&]() -> int64_t {
    for (int64_t row = 0; row < args.batch; ++row)
      if (args.tokens[row] < 0) return row;
    return -1;
  });
}

}  // namespace FASTLM_ISA
}  // namespace fastlm
