// Attention forward: blocks of rows over blocks of keys with a running softmax (Milakov & Gimelshein, 2018,
// https://arxiv.org/abs/1805.02867; Dao et al., 2022, https://arxiv.org/abs/2205.14135).
#include "fastlm/attention.h"

#include "attention_bfloat.h"
#include "threads.h"

namespace fastlm {
namespace FASTLM_ISA {

namespace {

constexpr int64_t kProductsPerThread = 1 << 20;  // less work than this does not pay for waking a thread

// One thread's memory.
struct Buffers {
  float* transposed;  // [dim][kBlockRows]
  float* s;           // [kBlockKeys][kBlockRows]
  float* mask;        // as s
  float* output;      // [kBlockRows][value width]
  float* values;      // [kBlockKeys][value width]

  Buffers(const Attention& a, Cut* cut) {
    const int64_t width = round_up(a.value_dim, kLanes);
    transposed = cut->take(a.dim * kBlockRows);
    s = cut->take(kBlockKeys * kBlockRows);
    mask = cut->take(a.mask_kind != AttentionMask::kNone ? kBlockKeys * kBlockRows : 0);
    output = cut->take(kBlockRows * width);
    values = cut->take(a.value_dim != width ? kBlockKeys * width : 0);
  }
};

// The running softmax of a block's rows.
struct Softmax {
  alignas(64) float top[kBlockRows];    // largest exponent so far
  alignas(64) float total[kBlockRows];  // sum of 2^(exponent - top)
  alignas(64) float keep[kBlockRows];   // what the last block of keys has left of the sums before it
};

// Takes the scores of one block of keys in, and leaves the weights in their place.
void update(const Scores& x, int vector, Softmax* softmax) {
  const Span seen = x.some(vector);
  float* s = x.s + vector * kLanes;
  vf tops[4];
  for (vf& top : tops) top = load(softmax->top + vector * kLanes);
  int64_t j = seen.low;
  for (; j + 4 <= seen.high; j += 4)
    for (int i = 0; i < 4; ++i) {
      const vf score = load(s + (j + i) * kBlockRows);
      tops[i] = tops[i] > score ? tops[i] : score;
    }
  for (; j < seen.high; ++j) {
    const vf score = load(s + j * kBlockRows);
    tops[0] = tops[0] > score ? tops[0] : score;
  }
  tops[0] = tops[0] > tops[1] ? tops[0] : tops[1];
  tops[2] = tops[2] > tops[3] ? tops[2] : tops[3];
  const vf top = tops[0] > tops[2] ? tops[0] : tops[2];
  // Where every score is -inf, subtracting it would give NaN.
  const vf shift = top == -kInfinity ? vf{} : top;
  const vf keep = exp2_negative(load(softmax->top + vector * kLanes) - shift);
  vf total = {};
  for (j = 0; j < seen.low; ++j) store(s + j * kBlockRows, vf{});
  for (; j < seen.high; ++j) {
    const vf weight = exp2_negative(load(s + j * kBlockRows) - shift);
    store(s + j * kBlockRows, weight);
    total += weight;
  }
  for (; j < x.count; ++j) store(s + j * kBlockRows, vf{});
  store(softmax->top + vector * kLanes, top);
  store(softmax->keep + vector * kLanes, keep);
  store(softmax->total + vector * kLanes, load(softmax->total + vector * kLanes) * keep + total);
}

void finish(const RowBlock& block, const Softmax& softmax, const float* sums, int64_t width) {
  const Attention& a = *block.a;
  for (int r = 0; r < block.count; ++r) {
    const float total = softmax.total[r], inverse = total == 0.0f ? 0.0f : 1.0f / total;
    float* output = a.output + block.b * a.output_stride[0] + block.head(r) * a.output_stride[1] +
                    block.token(r) * a.output_stride[2];
    const float* sum = sums + r * width;
    for (int64_t d = 0; d < a.value_dim; ++d) output[d] = sum[d] * inverse;
    if (a.lse != nullptr)
      a.lse[(block.b * a.heads + block.head(r)) * a.queries + block.token(r)] =
          total == 0.0f ? -kInfinity : (softmax.top[r] + __builtin_log2f(total)) / kLog2E;
  }
}

void attend(const RowBlock& block, const Buffers& to) {
  const Attention& a = *block.a;
  const int64_t width = round_up(a.value_dim, kLanes);
  const float* values = a.value + block.b * a.value_stride[0] + block.kv_head * a.value_stride[1];
  transpose_rows(
      block,
      [&](int r) {
        return a.query + block.b * a.query_stride[0] + block.head(r) * a.query_stride[1] +
               block.token(r) * a.query_stride[2];
      },
      a.dim, query_factor(a), to.transposed);
  Softmax softmax;
  for (int r = 0; r < kBlockRows; ++r) softmax.top[r] = -kInfinity, softmax.total[r] = 0.0f;
  std::memset(to.output, 0, sizeof(float) * kBlockRows * width);
  const int64_t end = block.span(block.count - 1).high;
  for (int64_t base = block.span(0).low / kBlockKeys * kBlockKeys; base < end; base += kBlockKeys) {
    const int count = static_cast<int>(smaller(kBlockKeys, end - base));
    const Scores x = {&block, base, count, to.transposed, to.s, to.mask, nullptr};
    scores(x);
    for (int v = 0; v < block.vectors; ++v) update(x, v, &softmax);
    int64_t stride = a.value_stride[2];
    const float* block_values = padded(values + base * stride, &stride, a.value_dim, count, to.values);
    add_seen(x, to.s, block_values, stride, softmax.keep, to.output, width);
  }
  finish(block, softmax, to.output, width);
}

// The floats of one key/value head.
struct Copies {
  float *query, *key, *value, *output;

  Copies(const Attention& a, Cut* cut) {
    const int64_t rows = a.queries * (a.heads / a.kv_heads);
    query = cut->take(rows * a.dim);
    key = cut->take(a.keys * a.dim);
    value = cut->take(a.keys * a.value_dim);
    output = cut->take(rows * a.value_dim);
  }
};

int64_t thread_scratch(const Attention& a) {
  Cut cut = {nullptr};
  Buffers(a, &cut);
  if (a.bfloats) Copies(a, &cut);
  return cut.used;
}

void attend_head(const HeadMemory& head, const Buffers& buffers, const Copies& to) {
  const Attention& a = *head.a;
  head.each_query(a.query, a.query_stride, to.query, a.dim, Widen{a.dim});
  head.each_key(a.key, a.key_stride, to.key, a.dim, Widen{a.dim});
  head.each_key(a.value, a.value_stride, to.value, a.value_dim, Widen{a.value_dim});
  const Attention alone =
      head.alone(to.query, to.key, to.value, to.output, a.lse != nullptr ? a.lse + head.lse() : nullptr);
  for (int64_t block = row_blocks(alone); block-- > 0;) attend(row_block(alone, 0, block), buffers);
  head.each_query(a.output, a.output_stride, to.output, a.value_dim, Round{a.value_dim});
}

}  // namespace

int64_t attention_scratch(const Attention& a) { return thread_scratch(a) * a.threads; }

void attention(const Attention& a) {
  const int64_t blocks = a.bfloats ? 1 : row_blocks(a), tasks = a.batch * a.kv_heads * blocks;
  const int64_t products = a.batch * a.heads * a.queries * a.keys * (a.dim + a.value_dim);
  const int64_t threads = smaller(smaller(a.threads, tasks), 1 + products / kProductsPerThread);
  int64_t next = 0;
  parallel(static_cast<int>(threads), [&](int thread, int team, Barrier&) {
    Cut cut = {a.scratch + thread_scratch(a) * thread};
    const Buffers buffers(a, &cut);
    if (a.bfloats) {
      const Copies copies(a, &cut);
      return each_head(a, team, &next, [&](const HeadMemory& head) { attend_head(head, buffers, copies); });
    }
    // Head by head, so that its keys stay in the caches; the late rows of a causal head, which take longest, first.
    for (int64_t task; (task = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < tasks;)
      attend(row_block(a, task / blocks, blocks - 1 - task % blocks), buffers);
  });
}

}  // namespace FASTLM_ISA
}  // namespace fastlm
