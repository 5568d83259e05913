// Attention to a key-value cache: the memory-bound step of generation, so keys and values are read once for all query
// heads that share them.
//
// A sequence's keys are cut into chunks at fixed positions. A task is one chunk of one key/value head: it leaves, for
// each query, the chunk's largest score, its sum of exponentials and its weighted sum of values in scratch. Once all
// are done, each query's chunks are merged in order. So the tasks can go to any thread, and the numbers still depend
// on the sequence alone.
#include "fastlm/attention_decode.h"

#include <utility>

#include "simd_math.h"
#include "threads.h"

namespace fastlm {
namespace FASTLM_ISA {

static constexpr int kChunk = 64;        // keys per task, so that a short context keeps all threads busy; a multiple of kLanes
static constexpr int kKeysInL1 = 32;     // values that stay in the first cache while all queries take their share
static constexpr int kRows = 16;         // queries scored together: bounds the stack
static constexpr int64_t kTokens = 32;   // new tokens per pass: bounds the scratch
static constexpr int64_t kBytesPerThread = 128 << 10;  // less work than this does not pay for waking a thread
static constexpr int kMaxDim = kAttentionDecodeMaxDim;

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// The keys [low, high) that one query sees.
struct Visible {
  int64_t low, high;
};
static inline Visible visible(const AttentionDecode& a, int64_t b, int64_t token) {
  const int64_t position = a.lengths[b] - a.tokens + token;
  return {a.window > position ? 0 : position - a.window + 1, position + 1};
}

// One pass over a batch: tokens [first, first + tokens) of every sequence.
struct Pass {
  const AttentionDecode* a;
  int64_t first, tokens;
  int64_t chunks;  // most chunks of any sequence
  float* partial;  // [batch, heads, tokens, chunks, dim + 2]: weighted sum, largest score, sum of exponentials

  int64_t first_chunk(int64_t b) const { return visible(*a, b, first).low / kChunk; }
  int64_t chunk_count(int64_t b) const {
    return (visible(*a, b, first + tokens - 1).high - 1) / kChunk - first_chunk(b) + 1;
  }
  float* partial_of(int64_t b, int64_t head, int64_t token, int64_t chunk) const {
    return partial + (((b * a->heads + head) * tokens + token) * chunks + chunk) * (a->dim + 2);
  }
};

static inline Pass make_pass(const AttentionDecode& a, int64_t first) {
  Pass pass = {&a, first, smaller(kTokens, a.tokens - first), 0, a.scratch};
  for (int64_t b = 0; b < a.batch; ++b) pass.chunks = larger(pass.chunks, pass.chunk_count(b));
  return pass;
}

template <int... I>
FASTLM_INLINE vf add_neighbours(vf x, vf y, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(x, y, (2 * I)...) + __builtin_shufflevector(x, y, (2 * I + 1)...);
}
// Lane i of the result is the sum of x[i]'s lanes.
FASTLM_INLINE vf reduce_each(vf* x) {
  for (int n = kLanes; n > 1; n /= 2)
    for (int i = 0; i < n / 2; ++i)
      x[i] = add_neighbours(x[2 * i], x[2 * i + 1], std::make_integer_sequence<int, kLanes>());
  return x[0];
}

// The dot products of a query with kLanes keys.
FASTLM_INLINE vf dots(const float* query, const float* const* keys, int dim) {
  vf sums[kLanes] = {};
  int d = 0;
  for (; d + kLanes <= dim; d += kLanes) {
    const vf q = load(query + d);
    for (int l = 0; l < kLanes; ++l) sums[l] += q * load(keys[l] + d);
  }
  if (d < dim) {
    const vf q = load(query + d);  // padded with zeros
    for (int l = 0; l < kLanes; ++l) sums[l] += q * load_partial(keys[l] + d, dim - d);
  }
  return reduce_each(sums);
}

// sum[d] += weights[j] * values[j][d] over n values, for N vectors from d on.
template <int N>
FASTLM_INLINE void add_weighted(float* sum, const float* weights, const float* values, int64_t stride, int64_t n) {
  vf s[N];
  for (int i = 0; i < N; ++i) s[i] = load(sum + i * kLanes);
  for (int64_t j = 0; j < n; ++j) {
    const vf w = broadcast(weights[j]);
    for (int i = 0; i < N; ++i) s[i] += w * load(values + j * stride + i * kLanes);
  }
  for (int i = 0; i < N; ++i) store(sum + i * kLanes, s[i]);
}
static void add_values(float* sum, const float* weights, const float* values, int64_t stride, int64_t n, int dim) {
  int d = 0;
  for (; d + 8 * kLanes <= dim; d += 8 * kLanes) add_weighted<8>(sum + d, weights, values + d, stride, n);
  for (; d + 4 * kLanes <= dim; d += 4 * kLanes) add_weighted<4>(sum + d, weights, values + d, stride, n);
  for (; d + kLanes <= dim; d += kLanes) add_weighted<1>(sum + d, weights, values + d, stride, n);
  if (d == dim) return;
  vf s = load(sum + d);
  for (int64_t j = 0; j < n; ++j) s += broadcast(weights[j]) * load_partial(values + j * stride + d, dim - d);
  store(sum + d, s);
}

struct Query {
  const float* vector;  // scaled, padded with zeros
  int64_t position;
  Visible keys;  // within the chunk
  float slope;
};

// Scores of one query against its chunk, from the dot products in scores[j - base]; returns the largest, and leaves
// exp(score - largest) in place and their sum in *total.
static float softmax(const AttentionDecode& a, const Query& query, int64_t base, float* scores, float* total) {
  const int64_t begin = (query.keys.low - base) / kLanes * kLanes;
  const int64_t end = query.keys.high - base;
  vf iota;
  for (int l = 0; l < kLanes; ++l) iota[l] = static_cast<float>(l);
  vf largest = broadcast(-__builtin_inff());
  for (int64_t j = begin; j < end; j += kLanes) {
    vf s = load(scores + j);
    if (a.softcap > 0) s = tanh(s / a.softcap) * a.softcap;
    if (a.slopes != nullptr) s += (iota + static_cast<float>(base + j - query.position)) * query.slope;
    store(scores + j, s);
  }
  for (int64_t j = begin; j < query.keys.low - base; ++j) scores[j] = -__builtin_inff();
  for (int64_t j = end; j % kLanes != 0; ++j) scores[j] = -__builtin_inff();
  for (int64_t j = begin; j < end; j += kLanes) largest = max(largest, load(scores + j));
  const float top = reduce_max(largest);
  // Where every score is -inf, subtracting it would give NaN.
  const float shift = top == -__builtin_inff() ? 0.0f : top;
  vf sum = {};
  for (int64_t j = begin; j < end; j += kLanes) {
    const vf weight = exp(load(scores + j) - shift);
    store(scores + j, weight);
    sum += weight;
  }
  *total = reduce_add(sum);
  return top;
}

// A chunk's keys or values: row j - base is that of position j.
struct ChunkRows {
  const float* data;
  int64_t stride;
};

// The positions [low, high) of a chunk: where they are, or, of bfloat16, a copy in floats.
static ChunkRows chunk_rows(const AttentionDecode& a, const void* cache, const int64_t* stride, int64_t row,
                            int64_t kv_head, int64_t base, Visible seen, float* copy) {
  const int64_t at = row * stride[0] + kv_head * stride[1] + base * stride[2];
  if (!a.bfloats) return {static_cast<const float*>(cache) + at, stride[2]};
  for (int64_t j = seen.low - base; j < seen.high - base; ++j) {
    const uint16_t* from = static_cast<const uint16_t*>(cache) + at + j * stride[2];
    for (int64_t d = 0; d < a.dim; ++d) copy[j * a.dim + d] = float_of(static_cast<uint32_t>(from[d]) << 16);
  }
  return {copy, a.dim};
}

// One chunk for up to kRows of the queries that share a key/value head.
static void attend(const AttentionDecode& a, const Query* queries, int count, int64_t base, ChunkRows keys,
                   ChunkRows values, float* const* partials) {
  const int dim = static_cast<int>(a.dim);
  alignas(64) float scores[kRows][kChunk];
  int64_t low = base + kChunk, high = base;
  for (int i = 0; i < count; ++i) {
    if (queries[i].keys.low >= queries[i].keys.high) continue;
    low = smaller(low, queries[i].keys.low);
    high = larger(high, queries[i].keys.high);
  }
  for (int64_t block = (low - base) / kLanes * kLanes; block < high - base; block += kLanes) {
    const float* key[kLanes];
    for (int l = 0; l < kLanes; ++l)
      key[l] = keys.data + (larger(low, smaller(base + block + l, high - 1)) - base) * keys.stride;
    for (int i = 0; i < count; ++i) store(&scores[i][block], dots(queries[i].vector, key, dim));
  }
  alignas(64) float sums[kRows][kMaxDim];
  for (int i = 0; i < count; ++i) {
    for (int d = 0; d < dim; d += kLanes) store(&sums[i][d], vf{});
    partials[i][dim] = -__builtin_inff();
    partials[i][dim + 1] = 0.0f;
    if (queries[i].keys.low < queries[i].keys.high)
      partials[i][dim] = softmax(a, queries[i], base, scores[i], &partials[i][dim + 1]);
  }
  for (int64_t j = low; j < high; j += kKeysInL1) {
    for (int i = 0; i < count; ++i) {
      const int64_t from = larger(j, queries[i].keys.low), to = smaller(j + kKeysInL1, queries[i].keys.high);
      if (from < to)
        add_values(sums[i], &scores[i][from - base], values.data + (from - base) * values.stride, values.stride,
                   to - from, dim);
    }
  }
  for (int i = 0; i < count; ++i) std::memcpy(partials[i], sums[i], sizeof(float) * a.dim);
}

static void run_task(const Pass& pass, int64_t b, int64_t kv_head, int64_t chunk) {
  const AttentionDecode& a = *pass.a;
  const int64_t row = a.rows != nullptr ? a.rows[b] : b;
  const int64_t base = (pass.first_chunk(b) + chunk) * kChunk;
  const int64_t group = a.heads / a.kv_heads;
  const Visible seen = {larger(visible(a, b, pass.first).low, base),
                        smaller(visible(a, b, pass.first + pass.tokens - 1).high, base + kChunk)};
  alignas(64) float key_copy[kChunk * kMaxDim], value_copy[kChunk * kMaxDim];  // touched for bfloat16 alone
  const ChunkRows keys = chunk_rows(a, a.key, a.key_stride, row, kv_head, base, seen, key_copy);
  const ChunkRows values = chunk_rows(a, a.value, a.value_stride, row, kv_head, base, seen, value_copy);
  alignas(64) float vectors[kRows][kMaxDim];
  Query queries[kRows];
  float* partials[kRows];
  const int64_t total = group * pass.tokens;
  for (int64_t start = 0; start < total; start += kRows) {
    const int count = static_cast<int>(smaller(kRows, total - start));
    for (int i = 0; i < count; ++i) {
      const int64_t head = kv_head * group + (start + i) / pass.tokens, token = (start + i) % pass.tokens;
      const int64_t position = a.lengths[b] - a.tokens + pass.first + token;
      const Visible own = visible(a, b, pass.first + token);
      const float* source =
          a.query + b * a.query_stride[0] + head * a.query_stride[1] + (pass.first + token) * a.query_stride[2];
      for (int64_t d = 0; d < a.dim; ++d) vectors[i][d] = source[d] * a.scale;
      for (int64_t d = a.dim; d % kLanes != 0; ++d) vectors[i][d] = 0.0f;
      queries[i] = {vectors[i], position, {larger(own.low, base), smaller(own.high, base + kChunk)},
                    a.slopes != nullptr ? a.slopes[b * a.slopes_stride + head] : 0.0f};
      partials[i] = pass.partial_of(b, head, token, chunk);
    }
    attend(a, queries, count, base, keys, values, partials);
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
  const int64_t chunks = smaller(keys / kChunk + 2, longest / kChunk + 1);
  return a.batch * a.heads * smaller(a.tokens, kTokens) * chunks * (a.dim + 2);
}

void attention_decode(const AttentionDecode& a) {
  for (int64_t first = 0; first < a.tokens; first += kTokens) {
    const int64_t wanted = agree([&] {
      const Pass pass = make_pass(a, first);
      int64_t keys = 0;
      for (int64_t b = 0; b < a.batch; ++b) keys += smaller(pass.chunk_count(b) * kChunk, a.lengths[b]);
      const int64_t bytes = keys * a.kv_heads * a.dim * 2 * static_cast<int64_t>(sizeof(float));
      return larger(1, smaller(a.threads, bytes / kBytesPerThread));
    });
    parallel(static_cast<int>(wanted), [&](int thread, int threads, Barrier& barrier) {
      const Pass pass = make_pass(a, first);
      const Range tasks = share(a.batch * a.kv_heads * pass.chunks, thread, threads);
      for (int64_t task = tasks.begin; task < tasks.end; ++task) {
        const int64_t chunk = task % pass.chunks, unit = task / pass.chunks, b = unit / a.kv_heads;
        if (chunk < pass.chunk_count(b)) run_task(pass, b, unit % a.kv_heads, chunk);  // else a shorter sequence
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
