// Attention and its gradients against double precision, in buffers that end where the data ends, so that a stray read
// or write shows to the sanitizer, and poisoned with NaN. The gradients are held against differences of the forward.
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <vector>

#include "check.h"
#include "fastlm/attention.h"

using fastlm::Attention;
using fastlm::AttentionBackward;
using fastlm::AttentionMask;

namespace {

// As the binding gives it: aligned to 64 bytes, and no longer than asked for.
struct Scratch {
  explicit Scratch(int64_t floats) : memory(nullptr) {
    if (posix_memalign(&memory, 64, floats * sizeof(float)) != 0) std::abort();
    for (int64_t i = 0; i < floats; ++i) data()[i] = NAN;
  }
  ~Scratch() { std::free(memory); }
  float* data() { return static_cast<float*>(memory); }
  void* memory;
};

struct Case {
  Attention a = {};
  std::vector<float> query, key, value, upstream, output, lse, bias;
  std::vector<uint8_t> mask;

  Case(int64_t heads, int64_t kv_heads, int64_t queries, int64_t keys, int64_t dim, int64_t value_dim) {
    a.batch = 2;
    a.heads = heads;
    a.kv_heads = kv_heads;
    a.queries = queries;
    a.keys = keys;
    a.dim = dim;
    a.value_dim = value_dim;
    a.scale = 0.3f;
    a.window = std::numeric_limits<int64_t>::max();
    a.causal = true;
    a.threads = 2;
    fill(&query, a.query_stride, heads, queries, dim);
    fill(&key, a.key_stride, kv_heads, keys, dim);
    fill(&value, a.value_stride, kv_heads, keys, value_dim);
    fill(&upstream, a.output_stride, heads, queries, value_dim);
    for (int64_t i = 0; i < queries * keys; ++i) {
      mask.push_back(random() > -0.5f);
      bias.push_back(random());
    }
  }

  // [batch, tokens, heads, features] behind the shape [batch, heads, tokens, features].
  void fill(std::vector<float>* to, int64_t (&stride)[3], int64_t heads, int64_t tokens, int64_t dim) {
    for (int64_t i = 0; i < a.batch * heads * tokens * dim; ++i) to->push_back(random());
    stride[0] = heads * tokens * dim;
    stride[1] = dim;
    stride[2] = heads * dim;
  }
  float random() {
    seed_ = seed_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<float>(static_cast<int32_t>(seed_ >> 32)) * 0x1p-31f;
  }

  void masked(AttentionMask kind) {
    a.mask_kind = kind;
    a.mask_stride[2] = a.keys;
    a.mask_stride[3] = 1;
  }

  void run() {
    a.query = query.data();
    a.key = key.data();
    a.value = value.data();
    if (a.mask_kind == AttentionMask::kBool) a.mask = mask.data();
    if (a.mask_kind == AttentionMask::kAdditive) a.mask = bias.data();
    output.assign(upstream.size(), NAN);
    lse.assign(a.batch * a.heads * a.queries, NAN);
    a.output = output.data();
    a.lse = lse.data();
    Scratch scratch(fastlm::attention_scratch(a));
    a.scratch = scratch.data();
    fastlm::attention(a);
  }

  // The sum of upstream * output in double precision, and the largest error of `output`.
  double exact(double* error) const {
    double loss = 0;
    *error = 0;
    for (int64_t b = 0; b < a.batch; ++b)
      for (int64_t h = 0; h < a.heads; ++h)
        for (int64_t t = 0; t < a.queries; ++t) {
          const int64_t here = t + a.keys - a.queries, shared = h / (a.heads / a.kv_heads);
          const float* q = query.data() + b * a.query_stride[0] + h * a.query_stride[1] + t * a.query_stride[2];
          std::vector<double> sum(a.value_dim, 0.0);
          double total = 0;
          for (int64_t j = 0; j < a.keys; ++j) {
            if ((a.causal && j > here) || here - j >= a.window) continue;
            if (a.mask_kind == AttentionMask::kBool && !mask[t * a.keys + j]) continue;
            const float* k = key.data() + b * a.key_stride[0] + shared * a.key_stride[1] + j * a.key_stride[2];
            const float* v = value.data() + b * a.value_stride[0] + shared * a.value_stride[1] + j * a.value_stride[2];
            double score = 0;
            for (int64_t d = 0; d < a.dim; ++d) score += double(q[d]) * k[d];
            score *= a.scale;
            if (a.softcap > 0) score = a.softcap * std::tanh(score / a.softcap);
            if (a.mask_kind == AttentionMask::kAdditive) score += bias[t * a.keys + j];
            total += std::exp(score);
            for (int64_t d = 0; d < a.value_dim; ++d) sum[d] += std::exp(score) * v[d];
          }
          const int64_t at = b * a.output_stride[0] + h * a.output_stride[1] + t * a.output_stride[2];
          for (int64_t d = 0; d < a.value_dim; ++d) {
            const double right = total == 0 ? 0 : sum[d] / total;
            loss += right * upstream[at + d];
            *error = check::worse(*error, std::abs(right - output[at + d]));
          }
        }
    return loss;
  }
  double error() {
    run();
    double error;
    exact(&error);
    return error;
  }

  // The largest relative error of the gradients along random directions.
  double gradient_error() {
    run();
    AttentionBackward g = {};
    std::vector<float> dq(query.size(), NAN), dk(key.size(), NAN), dv(value.size(), NAN);
    g.a = a;
    g.grad_output = upstream.data();
    g.grad_query = dq.data();
    for (int i = 0; i < 3; ++i) {
      g.grad_output_stride[i] = a.output_stride[i];
      g.grad_query_stride[i] = a.query_stride[i];
    }
    g.grad_key = dk.data();
    g.grad_value = dv.data();
    const auto contiguous = [&](int64_t dim, int64_t* stride) {
      stride[2] = dim, stride[1] = a.keys * dim, stride[0] = a.kv_heads * a.keys * dim;
    };
    contiguous(a.dim, g.grad_key_stride);
    contiguous(a.value_dim, g.grad_value_stride);
    g.threads = a.threads;
    Scratch scratch(fastlm::attention_backward_scratch(g));
    g.a.scratch = scratch.data();
    fastlm::attention_backward(g);
    const double worst[] = {along(&query, dq, false, 1, 1), along(&key, dk, true, a.keys, a.dim),
                            along(&value, dv, true, a.keys, a.value_dim)};
    double largest = 0;
    for (double w : worst) largest = check::worse(largest, w);
    return largest;
  }

 private:
  // `contiguous`: the gradient is [batch, heads, tokens, dim], the input [batch, tokens, heads, dim].
  double along(std::vector<float>* input, const std::vector<float>& gradient, bool contiguous, int64_t tokens,
               int64_t dim) {
    const std::vector<float> before = *input;
    double slope = 0, largest = 0;
    std::vector<float> step;
    for (size_t i = 0; i < before.size(); ++i) step.push_back(random() > 0 ? 0x1p-8f : -0x1p-8f);
    for (size_t i = 0; i < before.size(); ++i) {
      size_t at = i;
      if (contiguous) {
        const int64_t d = i % dim, h = i / dim % a.kv_heads, t = i / dim / a.kv_heads % tokens;
        const int64_t b = i / dim / a.kv_heads / tokens;
        at = ((b * a.kv_heads + h) * tokens + t) * dim + d;
      }
      slope += double(gradient[at]) * step[i];
      largest += std::abs(double(gradient[at]) * step[i]);
    }
    double unused;
    for (size_t i = 0; i < before.size(); ++i) (*input)[i] = before[i] + step[i];
    const double above = exact(&unused);
    for (size_t i = 0; i < before.size(); ++i) (*input)[i] = before[i] - step[i];
    const double below = exact(&unused);
    *input = before;
    return std::abs((above - below) / 2 - slope) / (largest / std::sqrt(double(before.size())));
  }
  uint64_t seed_ = 42;
};

}  // namespace

FASTLM_TEST(attention_agrees_with_the_formula) {
  for (int64_t dim : {1, 3, 16, 40})
    for (int64_t queries : {1, 5, 40}) {  // with three heads in a group, blocks of rows begin within and after
      Case c(6, 2, queries, 200, dim, dim == 40 ? 17 : dim);
      CHECK(c.error() < 1e-5);
      c.a.window = 100;
      c.a.softcap = dim == 16 ? 2.0f : 0.0f;
      CHECK(c.error() < 1e-5);
      c.a.causal = false;
      c.masked(dim % 2 ? AttentionMask::kBool : AttentionMask::kAdditive);
      CHECK(c.error() < 1e-5);
    }
  Case blind(2, 1, 20, 3, 8, 8), wide(2, 2, 3, 7, 256, 256);
  CHECK(blind.error() < 1e-5);
  CHECK(wide.error() < 1e-5);
}

FASTLM_TEST(attention_comparison_finds_a_wrong_formula) {
  Case c(6, 2, 60, 200, 16, 16);
  c.a.window = 50;
  c.run();
  double error;
  c.exact(&error);
  CHECK(error < 1e-5);
  c.a.window = 51;
  c.exact(&error);
  CHECK(error > 1e-3);
}

FASTLM_TEST(attention_gradients_agree_with_differences) {
  for (int64_t dim : {3, 16, 18})
    for (int64_t queries : {1, 40}) {
      Case c(6, 2, queries, 200, dim, dim == 18 ? 5 : dim);
      CHECK(c.gradient_error() < 2e-2);
      c.a.window = 100;
      c.a.softcap = dim == 16 ? 2.0f : 0.0f;
      c.masked(dim % 2 ? AttentionMask::kBool : AttentionMask::kAdditive);
      CHECK(c.gradient_error() < 2e-2);
    }
  Case blind(2, 1, 20, 3, 8, 8);
  CHECK(blind.gradient_error() < 2e-2);
}

namespace {

std::vector<uint16_t> round_to_bfloats(std::vector<float>* x) {
  std::vector<uint16_t> rounded;
  for (float& v : *x) {
    uint32_t bits;
    std::memcpy(&bits, &v, sizeof(bits));
    bits = (bits + 0x8000) & 0xffff0000;
    std::memcpy(&v, &bits, sizeof(bits));
    rounded.push_back(static_cast<uint16_t>(bits >> 16));
  }
  return rounded;
}

double distance(const std::vector<uint16_t>& x, const std::vector<float>& y) {
  double worst = 0, largest = 0;
  for (size_t i = 0; i < y.size(); ++i) {
    const uint32_t bits = static_cast<uint32_t>(x[i]) << 16;
    float v;
    std::memcpy(&v, &bits, sizeof(v));
    worst = check::worse(worst, std::abs(v - y[i]));
    largest = std::fmax(largest, std::abs(y[i]));
  }
  return worst / largest;
}

}  // namespace

// The same numbers in floats give the same results before they are rounded.
FASTLM_TEST(attention_of_bfloats) {
  for (int64_t dim : {3, 16, 40})
    for (bool windowed : {false, true}) {
      Case c(6, 2, 40, 200, dim, dim == 40 ? 17 : dim);
      if (windowed) c.a.window = 100;
      const auto query = round_to_bfloats(&c.query), key = round_to_bfloats(&c.key), value = round_to_bfloats(&c.value);
      const auto upstream = round_to_bfloats(&c.upstream);
      c.run();
      Attention b = c.a;
      std::vector<uint16_t> output(upstream.size(), 0x7fff);
      const auto floats = [](const std::vector<uint16_t>& x) { return reinterpret_cast<const float*>(x.data()); };
      const auto writable = [](std::vector<uint16_t>& x) { return reinterpret_cast<float*>(x.data()); };
      b.bfloats = true;
      b.query = floats(query);
      b.key = floats(key);
      b.value = floats(value);
      b.output = writable(output);
      std::vector<float> lse(c.lse.size(), NAN);
      b.lse = lse.data();
      b.threads = windowed ? 2 : 1;
      Scratch scratch(fastlm::attention_scratch(b));
      b.scratch = scratch.data();
      fastlm::attention(b);
      CHECK(lse == c.lse);
      CHECK(distance(output, c.output) < 4e-3);
      // The backward is given the rounded output, in floats too.
      std::vector<float> rounded;
      for (uint16_t half : output) {
        const uint32_t bits = static_cast<uint32_t>(half) << 16;
        float v;
        std::memcpy(&v, &bits, sizeof(v));
        rounded.push_back(v);
      }
      std::vector<float> dq(query.size(), NAN), dk(key.size(), NAN), dv(value.size(), NAN);
      std::vector<uint16_t> dqb(query.size(), 0x7fff), dkb(key.size(), 0x7fff), dvb(value.size(), 0x7fff);
      AttentionBackward g = {};
      g.a = c.a;
      g.a.output = rounded.data();
      g.threads = b.threads;
      g.grad_output = c.upstream.data();
      const auto strides = [&](AttentionBackward* of) {
        std::memcpy(of->grad_output_stride, c.a.output_stride, sizeof(c.a.output_stride));
        std::memcpy(of->grad_query_stride, c.a.query_stride, sizeof(c.a.query_stride));
        std::memcpy(of->grad_key_stride, c.a.key_stride, sizeof(c.a.key_stride));
        std::memcpy(of->grad_value_stride, c.a.value_stride, sizeof(c.a.value_stride));
      };
      strides(&g);
      g.grad_query = dq.data();
      g.grad_key = dk.data();
      g.grad_value = dv.data();
      Scratch plain(fastlm::attention_backward_scratch(g));
      g.a.scratch = plain.data();
      fastlm::attention_backward(g);
      AttentionBackward h = g;
      h.a = b;
      h.grad_output = floats(upstream);
      h.grad_query = writable(dqb);
      h.grad_key = writable(dkb);
      h.grad_value = writable(dvb);
      Scratch narrow(fastlm::attention_backward_scratch(h));
      h.a.scratch = narrow.data();
      fastlm::attention_backward(h);
      CHECK(distance(dqb, dq) < 4e-3);
      CHECK(distance(dkb, dk) < 4e-3);
      CHECK(distance(dvb, dv) < 4e-3);
    }
}

FASTLM_TEST(attention_threads_change_no_bit) {
  Case c(6, 2, 70, 200, 24, 24);
  c.run();
  const std::vector<float> expected = c.output;
  for (int threads : {1, 3, 16}) {
    c.a.threads = threads;
    c.run();
    CHECK(c.output == expected);
  }
}
