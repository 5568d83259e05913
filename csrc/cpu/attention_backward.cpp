// Attention backward: the weights are computed again from the scores and their log-sum-exp, block by block, as in Dao,
// 2023 (https://arxiv.org/abs/2307.08691), but with the rows in the outer loop: they are what has to be transposed.
#include "attention_bfloat.h"
#include "threads.h"

namespace fastlm {
namespace FASTLM_ISA {

namespace {

constexpr int64_t kTasks = 16;  // wanted at least, so that many threads find work
constexpr int64_t kProductsPerThread = 1 << 19;

// The rows of a key/value head are dealt out to `splits` tasks in turn, block by block, so that each has its share of a
// causal triangle. A task adds up the gradients of keys and values over its own rows, in order; with several splits in
// memory of its own, and these are added up in order too.
struct Plan {
  int64_t heads, splits, key_width, value_width, partial;
  bool direct;  // gradients of keys and values are summed where they belong

  explicit Plan(const Attention& a) {
    heads = a.batch * a.kv_heads;
    splits = smaller((kTasks + heads - 1) / heads, row_blocks(a));
    key_width = round_up(a.dim, kLanes);
    value_width = round_up(a.value_dim, kLanes);
    direct = splits == 1 && key_width == a.dim && value_width == a.value_dim;
    partial = direct ? 0 : round_up(a.keys * (key_width + value_width), 16);
  }
};

// One thread's memory.
struct Buffers {
  float *queries, *grads;                        // [rows][width], of the output for grads
  float *queries_transposed, *grads_transposed;  // [dim][rows]
  float* grad_queries;                           // [rows][width]
  float *weights, *grad_weights;                 // [keys][rows]
  float *mask, *derivative;                      // as weights
  float* keys;                                   // [keys][width]

  Buffers(const Attention& a, const Plan& plan, Cut* cut) {
    const int64_t scores = kBlockKeys * kBlockRows;
    queries = cut->take(kBlockRows * plan.key_width);
    grads = cut->take(kBlockRows * plan.value_width);
    queries_transposed = cut->take(a.dim * kBlockRows);
    grads_transposed = cut->take(a.value_dim * kBlockRows);
    grad_queries = cut->take(kBlockRows * plan.key_width);
    weights = cut->take(scores);
    grad_weights = cut->take(scores);
    mask = cut->take(a.mask_kind != AttentionMask::kNone ? scores : 0);
    derivative = cut->take(a.softcap > 0 ? scores : 0);
    keys = cut->take(plan.key_width != a.dim ? kBlockKeys * plan.key_width : 0);
  }
};

// The floats of one key/value head, and of its gradients; those of keys and values in whole vectors.
struct Copies {
  float *query, *key, *value, *output, *grad_output, *grad_query, *grad_key, *grad_value;

  Copies(const Attention& a, const Plan& plan, Cut* cut) {
    const int64_t rows = a.queries * (a.heads / a.kv_heads);
    query = cut->take(rows * a.dim);
    key = cut->take(a.keys * a.dim);
    value = cut->take(a.keys * a.value_dim);
    output = cut->take(rows * a.value_dim);
    grad_output = cut->take(rows * a.value_dim);
    grad_query = cut->take(rows * a.dim);
    grad_key = cut->take(a.keys * plan.key_width);
    grad_value = cut->take(a.keys * plan.value_width);
  }
};

int64_t thread_scratch(const Attention& a) {
  Cut cut = {nullptr};
  Buffers(a, Plan(a), &cut);
  if (a.bfloats) Copies(a, Plan(a), &cut);
  return cut.used;
}

// Of each row of a block.
struct RowSums {
  alignas(64) float lse[kBlockRows];    // as an exponent of 2; infinite where no weight is to come out
  alignas(64) float delta[kBlockRows];  // gradient of the output times the output
};

template <typename From>
void copy_rows(const RowBlock& block, const From& from, int64_t dim, int64_t width, float* to) {
  for (int r = 0; r < block.count; ++r) {
    std::memcpy(to + r * width, from(r), dim * sizeof(float));
    std::memset(to + r * width + dim, 0, (width - dim) * sizeof(float));
  }
}

float dot(const float* x, const float* y, int64_t n) {
  vf sum = {};
  for (int64_t i = 0; i < n; i += kLanes) sum += load_until(x, i, n, 0.0f) * load_until(y, i, n, 0.0f);
  return reduce_add(sum);
}

// From scores and gradients of the weights: the weights, and the gradients of scale * q.k before the soft cap, times
// the scale. Both are 0 for keys that no row of the vector sees.
void differentiate(const Scores& x, int vector, const RowSums& rows, float* grad_weights) {
  const Attention& a = *x.block->a;
  const Span seen = x.some(vector);
  const vf lse = load(rows.lse + vector * kLanes), delta = load(rows.delta + vector * kLanes);
  for (int64_t j = 0; j < x.count; ++j) {
    const int64_t at = j * kBlockRows + vector * kLanes;
    vf weight = {}, grad = {};
    if (j >= seen.low && j < seen.high) {
      weight = exp2_negative(load(x.s + at) - lse);
      grad = weight * (load(grad_weights + at) - delta) * a.scale;
      if (a.softcap > 0) grad *= load(x.derivative + at);
    }
    store(x.s + at, weight);
    store(grad_weights + at, grad);
  }
}

// A task's sums for the keys of its head, or for the values: `width` floats each, `stride` apart.
struct KeySums {
  float* data;
  int64_t stride;
};

// to[j] += from[j][rows] b[rows] over the rows of the block that may see key j.
void add_rows(const Scores& x, const float* from, const float* b, int64_t width, const float* ones,
              const KeySums& to) {
  const RowBlock& block = *x.block;
  int begin = 0, end = 0;
  for (int64_t j = 0; j < x.count; j += kTileRows) {
    const int64_t rows = smaller(kTileRows, x.count - j);
    while (end < block.vectors && x.some(end).low < j + rows) ++end;
    while (begin < end && x.some(begin).high <= j) ++begin;
    if (begin == end) continue;
    const int64_t first = begin * kLanes, last = smaller(end * kLanes, block.count);
    const Product p = {from + j * kBlockRows + first, kBlockRows, b + first * width, width, last - first,
                       to.data + (x.base + j) * to.stride, to.stride, ones};
    product<false>(p, static_cast<int>(rows), static_cast<int>(width / kLanes));
  }
}

void differentiate_block(const AttentionBackward& g, const RowBlock& block, const Plan& plan, const Buffers& to,
                         const KeySums& grad_keys, const KeySums& grad_values) {
  const Attention& a = g.a;
  const auto row = [&](auto* of, const int64_t* stride) {
    return [=, &block](int r) {
      return of + block.b * stride[0] + block.head(r) * stride[1] + block.token(r) * stride[2];
    };
  };
  const auto queries = row(a.query, a.query_stride), grads = row(g.grad_output, g.grad_output_stride);
  const auto outputs = row(a.output, a.output_stride), grad_queries = row(g.grad_query, g.grad_query_stride);
  transpose_rows(block, queries, a.dim, query_factor(a), to.queries_transposed);
  transpose_rows(block, grads, a.value_dim, 1.0f, to.grads_transposed);
  copy_rows(block, queries, a.dim, plan.key_width, to.queries);
  copy_rows(block, grads, a.value_dim, plan.value_width, to.grads);
  std::memset(to.grad_queries, 0, sizeof(float) * kBlockRows * plan.key_width);
  RowSums sums;
  float ones[kBlockRows];
  for (int r = 0; r < kBlockRows; ++r) {
    ones[r] = 1.0f;
    sums.lse[r] = kInfinity;
    sums.delta[r] = 0.0f;
    if (r >= block.count) continue;
    const float lse = a.lse[(block.b * a.heads + block.head(r)) * a.queries + block.token(r)];
    if (lse != -kInfinity) sums.lse[r] = lse * kLog2E;
    sums.delta[r] = dot(outputs(r), grads(r), a.value_dim);
  }
  const float* keys = a.key + block.b * a.key_stride[0] + block.kv_head * a.key_stride[1];
  const float* values = a.value + block.b * a.value_stride[0] + block.kv_head * a.value_stride[1];
  const int64_t end = block.span(block.count - 1).high;
  for (int64_t base = block.span(0).low / kBlockKeys * kBlockKeys; base < end; base += kBlockKeys) {
    const int count = static_cast<int>(smaller(kBlockKeys, end - base));
    const Scores x = {&block, base, count, to.queries_transposed, to.weights, to.mask, to.derivative};
    scores(x);
    key_products(x, values, a.value_stride[2], a.value_dim, to.grads_transposed, to.grad_weights);
    for (int v = 0; v < block.vectors; ++v) differentiate(x, v, sums, to.grad_weights);
    add_rows(x, to.weights, to.grads, plan.value_width, ones, grad_values);
    add_rows(x, to.grad_weights, to.queries, plan.key_width, ones, grad_keys);
    int64_t stride = a.key_stride[2];
    const float* block_keys = padded(keys + base * stride, &stride, a.dim, count, to.keys);
    add_seen(x, to.grad_weights, block_keys, stride, ones, to.grad_queries, plan.key_width);
  }
  for (int r = 0; r < block.count; ++r)
    std::memcpy(grad_queries(r), to.grad_queries + r * plan.key_width, a.dim * sizeof(float));
}

void differentiate_head(const AttentionBackward& g, const HeadMemory& head, const Plan& plan, const Buffers& buffers,
                        const Copies& to) {
  const Attention& a = g.a;
  head.each_query(a.query, a.query_stride, to.query, a.dim, Widen{a.dim});
  head.each_key(a.key, a.key_stride, to.key, a.dim, Widen{a.dim});
  head.each_key(a.value, a.value_stride, to.value, a.value_dim, Widen{a.value_dim});
  head.each_query(a.output, a.output_stride, to.output, a.value_dim, Widen{a.value_dim});
  head.each_query(g.grad_output, g.grad_output_stride, to.grad_output, a.value_dim, Widen{a.value_dim});
  AttentionBackward alone = {};
  alone.a = head.alone(to.query, to.key, to.value, to.output, a.lse + head.lse());
  alone.grad_output = to.grad_output;
  alone.grad_query = to.grad_query;
  std::memcpy(alone.grad_output_stride, alone.a.output_stride, sizeof(alone.grad_output_stride));
  std::memcpy(alone.grad_query_stride, alone.a.query_stride, sizeof(alone.grad_query_stride));
  const KeySums grad_keys = {to.grad_key, plan.key_width}, grad_values = {to.grad_value, plan.value_width};
  std::memset(to.grad_key, 0, sizeof(float) * a.keys * plan.key_width);
  std::memset(to.grad_value, 0, sizeof(float) * a.keys * plan.value_width);
  for (int64_t block = 0; block < row_blocks(alone.a); ++block)
    differentiate_block(alone, row_block(alone.a, 0, block), plan, buffers, grad_keys, grad_values);
  head.each_query(g.grad_query, g.grad_query_stride, to.grad_query, a.dim, Round{a.dim});
  head.each_key(g.grad_key, g.grad_key_stride, to.grad_key, plan.key_width, Round{a.dim});
  head.each_key(g.grad_value, g.grad_value_stride, to.grad_value, plan.value_width, Round{a.value_dim});
}

// One row of the gradients of keys or values from the tasks' sums.
void add_partials(const Plan& plan, const float* partial, int64_t dim, float* to) {
  for (int64_t d = 0; d < dim; ++d) {
    float sum = partial[d];
    for (int64_t s = 1; s < plan.splits; ++s) sum += partial[s * plan.partial + d];
    to[d] = sum;
  }
}

}  // namespace

int64_t attention_backward_scratch(const AttentionBackward& g) {
  const Plan plan(g.a);
  return thread_scratch(g.a) * g.threads + (g.a.bfloats ? 0 : plan.partial * plan.heads * plan.splits);
}

void attention_backward(const AttentionBackward& g) {
  const Attention& a = g.a;
  const Plan plan(a);
  const int64_t tasks = a.bfloats ? plan.heads : plan.heads * plan.splits, blocks = row_blocks(a), each = thread_scratch(a);
  const int64_t products = a.batch * a.heads * a.queries * a.keys * (a.dim + a.value_dim);
  const int64_t threads = smaller(smaller(g.threads, tasks), 1 + products / kProductsPerThread);
  const auto head_offset = [&](const int64_t* stride, int64_t head) {
    return head / a.kv_heads * stride[0] + head % a.kv_heads * stride[1];
  };
  int64_t next = 0;
  parallel(static_cast<int>(threads), [&](int thread, int team, Barrier& barrier) {
    Cut cut = {a.scratch + each * thread};
    const Buffers buffers(a, plan, &cut);
    if (a.bfloats) {
      const Copies copies(a, plan, &cut);
      return each_head(a, team, &next,
                       [&](const HeadMemory& head) { differentiate_head(g, head, plan, buffers, copies); });
    }
    float* const partials = a.scratch + each * g.threads;
    for (int64_t task; (task = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < tasks;) {
      const int64_t head = task / plan.splits;
      float* const own = partials + task * plan.partial;
      KeySums grad_keys = {own, plan.key_width}, grad_values = {own + a.keys * plan.key_width, plan.value_width};
      if (plan.direct) {
        grad_keys = {g.grad_key + head_offset(g.grad_key_stride, head), g.grad_key_stride[2]};
        grad_values = {g.grad_value + head_offset(g.grad_value_stride, head), g.grad_value_stride[2]};
      }
      for (int64_t j = 0; j < a.keys; ++j) {
        std::memset(grad_keys.data + j * grad_keys.stride, 0, sizeof(float) * plan.key_width);
        std::memset(grad_values.data + j * grad_values.stride, 0, sizeof(float) * plan.value_width);
      }
      for (int64_t block = task % plan.splits; block < blocks; block += plan.splits)
        differentiate_block(g, row_block(a, head, block), plan, buffers, grad_keys, grad_values);
    }
    if (plan.direct) return;
    barrier.wait();
    const Range rows = share(plan.heads * a.keys, thread, team);
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      const float* partial = partials + row / a.keys * plan.splits * plan.partial;
      const int64_t j = row % a.keys;
      add_partials(plan, partial + j * plan.key_width, a.dim,
                   g.grad_key + head_offset(g.grad_key_stride, row / a.keys) + j * g.grad_key_stride[2]);
      add_partials(plan, partial + a.keys * plan.key_width + j * plan.value_width, a.value_dim,
                   g.grad_value + head_offset(g.grad_value_stride, row / a.keys) + j * g.grad_value_stride[2]);
    }
  });
}

}  // namespace FASTLM_ISA
}  // namespace fastlm
