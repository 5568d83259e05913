// Attention to a key-value cache: the memory-bound step of generation, so keys and values are read once for all query
// heads that share them.
//
// A sequence's keys are cut into chunks at fixed positions. A task is one chunk of one key/value head: it leaves, for
// each query, the chunk's largest score, its sum of exponentials and its weighted sum of values in scratch. Once all
// are done, each query's chunks are merged in order. So the tasks can go to any thread, and the numbers still depend
// on the sequence alone.
#include "fastlm/attention_decode.h"

#include "attention_decode_chunk.h"
#include "attention_decode_tiles.h"
#include "simd_math.h"
#include "threads.h"

namespace fastlm {
namespace FASTLM_ISA {

// Keys per task, multiples of kLanes: few at first, so that a short context keeps all threads busy; more behind, where
// what a task costs beside its keys would add up.
static constexpr int kNarrow = 64, kMiddle = 128;  // and then kWide
static constexpr int kMiddleFrom = 128, kWideFrom = 1024;  // positions
// Queries that share one reading of a key or value: as many as have room for their sums in registers.
#if defined(__x86_64__) && !defined(__AVX2__)
static constexpr int kTogether = 2;
#else
static constexpr int kTogether = 4;
#endif
static constexpr int64_t kTokens = 32;   // new tokens per pass: bounds the scratch
// Less work than this for each does not pay for a second thread that has to be woken, or for one of a team, awake
// already. As bytes of keys and values, those of floats, each time that they are read.
static constexpr int64_t kBytesPerThread = 128 << 10, kBytesPerTeammate = 8 << 10;

static inline int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

static constexpr int kNarrows = kMiddleFrom / kNarrow, kMiddles = (kWideFrom - kMiddleFrom) / kMiddle;
static inline int64_t chunk_of(int64_t position) {
  if (position < kMiddleFrom) return position / kNarrow;
  if (position < kWideFrom) return kNarrows + (position - kMiddleFrom) / kMiddle;
  return kNarrows + kMiddles + (position - kWideFrom) / kWide;
}
static inline int64_t chunk_begin(int64_t chunk) {
  if (chunk < kNarrows) return chunk * kNarrow;
  if (chunk < kNarrows + kMiddles) return kMiddleFrom + (chunk - kNarrows) * kMiddle;
  return kWideFrom + (chunk - kNarrows - kMiddles) * kWide;
}

static inline Visible visible(const AttentionDecode& a, int64_t b, int64_t token) {
  const int64_t position = a.lengths[b] - a.tokens + token;
  return {a.window > position ? 0 : position - a.window + 1, position + 1};
}

// One pass over a batch: tokens [first, first + tokens) of every sequence.
struct Pass {
  const AttentionDecode* a;
  int64_t first, tokens;
  int64_t chunks;  // most chunks of any sequence
  int64_t keys;    // of all sequences, in one key/value head
  float* partial;  // [batch, heads, tokens, chunks, dim + 2]: weighted sum, largest score, sum of exponentials

  int64_t first_chunk(int64_t b) const { return chunk_of(visible(*a, b, first).low); }
  int64_t chunk_count(int64_t b) const {
    return chunk_of(visible(*a, b, first + tokens - 1).high - 1) - first_chunk(b) + 1;
  }
  // The keys of a chunk that any of the tokens sees.
  Visible chunk_keys(int64_t b, int64_t chunk) const {
    const int64_t at = first_chunk(b) + chunk;
    return {larger(visible(*a, b, first).low, chunk_begin(at)),
            smaller(visible(*a, b, first + tokens - 1).high, chunk_begin(at + 1))};
  }
  float* partial_of(int64_t b, int64_t head, int64_t token, int64_t chunk) const {
    return partial + (((b * a->heads + head) * tokens + token) * chunks + chunk) * (a->dim + 2);
  }
};

static inline Pass make_pass(const AttentionDecode& a, int64_t first) {
  Pass pass = {&a, first, smaller(kTokens, a.tokens - first), 0, 0, a.scratch};
  for (int64_t b = 0; b < a.batch; ++b) {
    pass.chunks = larger(pass.chunks, pass.chunk_count(b));
    pass.keys += visible(a, b, first + pass.tokens - 1).high - visible(a, b, first).low;
  }
  return pass;
}

// Queries that share a key/value head, prepared for all chunks.
template <class T>
struct alignas(64) Group {
  float vectors[kTogether][kMaxDim];
  QueryTiles<T> tiles;
  bool with_tiles;
  int64_t unit = -1, start = -1;  // which they are

  void keep(int64_t of_unit, int64_t from, int count, int dim) {
    unit = of_unit;
    start = from;
    if (with_tiles) tiles.fill(vectors, count, dim);
  }
};

// One chunk for Q of the queries that share a key/value head.
template <int Q, class T>
static void attend(const AttentionDecode& a, const Group<T>& group, const Query* queries, int64_t base, Rows<T> keys,
                   Rows<T> values, float* const* partials) {
  const int dim = static_cast<int>(a.dim);
  alignas(64) float scores[Q][kWide], sums[Q][kMaxDim];
  // The keys that any of them sees, and those that all do.
  int64_t low = kWide, high = 0, all_low = 0, all_high = kWide;
  for (int q = 0; q < Q; ++q) {
    const int64_t from = queries[q].keys.low - base, to = queries[q].keys.high - base;
    if (from < to) low = smaller(low, from), high = larger(high, to);
    all_low = larger(all_low, from);
    all_high = smaller(all_high, to);
  }
  alignas(64) float key_scales[sizeof(T) == 1 ? kWide : 1], value_scales[sizeof(T) == 1 ? kWide : 1];
#if defined(__AVX512VNNI__)
  if constexpr (kHasTiles<T>)
    if (group.with_tiles && low < high) score_by_tiles<Q>(group.tiles, keys, values, low, high, dim, scores);
#endif
  if (!group.with_tiles) score<Q>(queries, keys, low, high, dim, scores);
  if (sizeof(T) == 1) {
    keys.scales(low, high, dim, key_scales);
    values.scales(low, high, dim, value_scales);
  }
  softmax<Q, T>(a, queries, base, key_scales, value_scales, scores, partials);
  float* sum[Q];
  const float* weights[Q];
  for (int q = 0; q < Q; ++q) {
    sum[q] = sums[q];
    weights[q] = scores[q];
    for (int d = 0; d < dim; d += kLanes) store(&sums[q][d], vf{});
  }
#if defined(__AVX512VNNI__)
  if constexpr (sizeof(T) == 1)
    if (group.with_tiles) {
      if (low >= high) {  // merged with a factor of 0, which NaN would survive
        for (int q = 0; q < Q; ++q) std::memset(partials[q], 0, sizeof(float) * a.dim);
        return;
      }
      const int64_t from = low / kStep * kStep, to = round_up(high, kStep);
      for (int q = 0; q < Q; ++q) {
        const int64_t own_low = (queries[q].keys.low - base) / kLanes * kLanes;
        const int64_t own_high = round_up(queries[q].keys.high - base, kLanes);
        for (int64_t j = from; j < to; j += kLanes)
          if (j < own_low || j >= own_high) store(scores[q] + j, vf{});
      }
      return add_values_by_tiles<Q>(partials, weights, values, low, high, dim);
    }
#endif
  // In order for each query: what it alone sees before the common keys, these, what is behind them.
  if (all_low >= all_high) all_low = all_high = kWide;
  for (int q = 0; q < Q; ++q)
    add_values<1>(sum + q, weights + q, values, queries[q].keys.low - base,
                  smaller(queries[q].keys.high - base, all_low), dim);
  add_values<Q>(sum, weights, values, all_low, all_high, dim);
  for (int q = 0; q < Q; ++q)
    add_values<1>(sum + q, weights + q, values, larger(queries[q].keys.low - base, all_high),
                  queries[q].keys.high - base, dim);
  for (int q = 0; q < Q; ++q) std::memcpy(partials[q], sums[q], sizeof(float) * a.dim);
}

// In a replay a layer's weights have passed since the cache was last read, and pushed it far out: its lines are asked
// for at once, not one after another as they are needed.
template <class T>
static void fetch(Rows<T> keys, Rows<T> values, int64_t from, int64_t to, int64_t dim) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (const Rows<T>& rows : {keys, values})
    for (int64_t j = from; j < to; ++j)
      for (int64_t d = 0; d < dim; d += kLine) __builtin_prefetch(rows.row(j) + d, 0, 2);
}

template <class T>
static void run_task(const Pass& pass, Group<T>& prepared, int64_t b, int64_t kv_head, int64_t chunk) {
  const AttentionDecode& a = *pass.a;
  const int64_t row = a.rows != nullptr ? a.rows[b] : b;
  const int64_t base = chunk_begin(pass.first_chunk(b) + chunk), end = chunk_begin(pass.first_chunk(b) + chunk + 1);
  const int64_t group = a.heads / a.kv_heads;
  const auto rows = [&](const void* cache, const int64_t* stride) {
    return Rows<T>{static_cast<const T*>(cache) + row * stride[0] + kv_head * stride[1] + base * stride[2], stride[2]};
  };
  const Rows<T> keys = rows(a.key, a.key_stride), values = rows(a.value, a.value_stride);
  if (current_team() != nullptr) {
    const Visible seen = pass.chunk_keys(b, chunk);
    fetch(keys, values, seen.low - base, seen.high - base, a.dim);
  }
  Query queries[kTogether];
  float* partials[kTogether];
  const int64_t total = group * pass.tokens;
  for (int64_t start = 0; start < total; start += kTogether) {
    const int count = static_cast<int>(smaller(kTogether, total - start));
    const bool known = prepared.unit == b * a.kv_heads + kv_head && prepared.start == start;
    for (int i = 0; i < count; ++i) {
      const int64_t head = kv_head * group + (start + i) / pass.tokens, token = (start + i) % pass.tokens;
      const int64_t position = a.lengths[b] - a.tokens + pass.first + token;
      const Visible own = visible(a, b, pass.first + token);
      const float* source =
          a.query + b * a.query_stride[0] + head * a.query_stride[1] + (pass.first + token) * a.query_stride[2];
      float* const vector = prepared.vectors[i];
      if (!known) {
        for (int64_t d = 0; d < a.dim; ++d) vector[d] = source[d] * a.scale;
        for (int64_t d = a.dim; d % kLanes != 0; ++d) vector[d] = 0.0f;
      }
      queries[i] = {vector, position, {larger(own.low, base), smaller(own.high, end)},
                    a.slopes != nullptr ? a.slopes[b * a.slopes_stride + head] : 0.0f};
      partials[i] = pass.partial_of(b, head, token, chunk);
    }
    if (!known) prepared.keep(b * a.kv_heads + kv_head, start, count, static_cast<int>(a.dim));
    if (count == 1) attend<1>(a, prepared, queries, base, keys, values, partials);
    if (count == 2) attend<2>(a, prepared, queries, base, keys, values, partials);
    if constexpr (kTogether > 2) {
      if (count == 3) attend<3>(a, prepared, queries, base, keys, values, partials);
      if (count == 4) attend<4>(a, prepared, queries, base, keys, values, partials);
    }
  }
}

// A thread's share of the tasks.
template <class T>
static void run_tasks(const Pass& pass, int thread, int threads) {
  const AttentionDecode& a = *pass.a;
  Group<T> prepared;
  // Each thread's share of the keys is in one piece, so that it merges what it has computed itself: of the chunks those
  // whose middle is in it.
  const Range mine = share(2 * a.kv_heads * pass.keys, thread, threads);
  const auto run = [&] {
    int64_t before = 0;
    for (int64_t b = 0; b < a.batch; ++b) {
      const int64_t chunks = pass.chunk_count(b);
      for (int64_t kv_head = 0; kv_head < a.kv_heads; ++kv_head)
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
          const Visible keys = pass.chunk_keys(b, chunk);
          const int64_t middle = 2 * before + keys.high - keys.low;
          before += keys.high - keys.low;
          if (middle >= mine.begin && middle < mine.end) run_task<T>(pass, prepared, b, kv_head, chunk);
        }
    }
  };
  prepared.with_tiles = false;
  if (kHasTiles<T> && a.dim * sizeof(T) % 64 == 0) {
    const TileUnit unit;
    prepared.with_tiles = unit.tiles() && (sizeof(T) > 1 || digit_tiles());
    run();
  } else {
    run();
  }
}

// Brings the chunks' partial results of one query to their common largest score and adds them up, in order.
static void merge(const Pass& pass, int64_t b, int64_t head, int64_t token) {
  const AttentionDecode& a = *pass.a;
  const int64_t dim = a.dim, chunks = pass.chunk_count(b);
  float* output = a.output + ((b * a.tokens + pass.first + token) * a.heads + head) * dim;
  float top = -__builtin_inff();
  for (int64_t c = 0; c < chunks; ++c) {
    const float largest = pass.partial_of(b, head, token, c)[dim];
    top = largest > top ? largest : top;
  }
  if (top == -__builtin_inff()) top = 0.0f;
  alignas(64) float sum[kMaxDim] = {};
  float total = 0.0f;
  for (int64_t c = 0; c < chunks; ++c) {
    const float* partial = pass.partial_of(b, head, token, c);
    const float factor = exp(broadcast(partial[dim] - top))[0];
    total += factor * partial[dim + 1];
    for (int64_t d = 0; d < dim; ++d) sum[d] += factor * partial[d];
  }
  const float inverse = total == 0.0f ? 0.0f : 1.0f / total;  // a query all of whose scores are -inf gives 0
  for (int64_t d = 0; d < dim; ++d) output[d] = sum[d] * inverse;
}

int64_t attention_decode_check(const AttentionDecode& a) {
  for (int64_t b = 0; b < a.batch; ++b) {
    if (a.lengths[b] < a.tokens || a.lengths[b] > a.positions) return b + 1;
    const int64_t row = a.rows != nullptr ? a.rows[b] : b;
    if (row < 0 || row >= a.cache_rows) return -(b + 1);
  }
  return 0;
}

int64_t attention_decode_scratch(const AttentionDecode& a, int64_t longest) {
  // A window can begin and end within a chunk, and new tokens add to what one of them sees.
  const int64_t keys = a.window < longest ? smaller(a.window + smaller(a.tokens, kTokens), longest) : longest;
  const int64_t chunks = smaller(keys / kNarrow + 2, chunk_of(longest) + 1);
  return a.batch * a.heads * smaller(a.tokens, kTokens) * chunks * (a.dim + 2);
}

void attention_decode(const AttentionDecode& a) {
  for (int64_t first = 0; first < a.tokens; first += kTokens) {
    const int64_t wanted = agree([&] {
      const Pass pass = make_pass(a, first);
      const int64_t readings = (a.heads / a.kv_heads * pass.tokens + kTogether - 1) / kTogether;
      const int64_t bytes = pass.keys * a.kv_heads * a.dim * 2 * static_cast<int64_t>(sizeof(float)) * readings;
      return larger(1, smaller(a.threads, bytes / (current_team() ? kBytesPerTeammate : kBytesPerThread)));
    });
    parallel(static_cast<int>(wanted), [&](int thread, int threads, Barrier& barrier) {
      const Pass pass = make_pass(a, first);
      switch (a.type) {
        case KvType::kFloat: run_tasks<float>(pass, thread, threads); break;
        case KvType::kBfloat16: run_tasks<uint16_t>(pass, thread, threads); break;
        case KvType::kInt8: run_tasks<int8_t>(pass, thread, threads); break;
      }
      barrier.wait();
      const Range queries = share(a.batch * a.heads * pass.tokens, thread, threads);
      for (int64_t i = queries.begin; i < queries.end; ++i) {
        const int64_t unit = i / pass.tokens;
        merge(pass, unit / a.heads, unit % a.heads, i % pass.tokens);
      }
    });
  }
}

}  // namespace FASTLM_ISA
}  // namespace fastlm
