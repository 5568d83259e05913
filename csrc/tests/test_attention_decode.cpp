// Attention to a key-value cache against a double-precision one, in buffers whose every unused float is NaN and that
// end where the data ends, so that a stray read shows in the result or to the sanitizer.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "check.h"
#include "fastlm/attention_decode.h"
#include "fastlm/isa.h"
#include "fastlm/kv_append.h"
#include "fastlm/matmul.h"

using fastlm::AttentionDecode;

namespace {

constexpr int64_t kNoWindow = std::numeric_limits<int64_t>::max();

struct Case {
  AttentionDecode a = {};
  std::vector<float> query, key, value, slopes, output, scratch;
  std::vector<uint16_t> bfloat_key, bfloat_value;  // what a cache of another type holds, `key` and `value` its numbers
  std::vector<int8_t> int_key, int_value;
  std::vector<int64_t> lengths, rows;

  Case(int64_t heads, int64_t kv_heads, int64_t tokens, int64_t dim, int64_t positions, std::vector<int64_t> stored)
      : lengths(stored) {
    a.batch = static_cast<int64_t>(stored.size());
    a.heads = heads;
    a.kv_heads = kv_heads;
    a.tokens = tokens;
    a.dim = dim;
    a.cache_rows = a.batch + 1;
    a.positions = positions;
    a.scale = 0.3f;
    a.window = kNoWindow;
    a.threads = 2;
    query.resize(a.batch * heads * tokens * dim);
    for (float& x : query) x = random();
    // Laid out by position, then head: [rows, positions, kv_heads, dim].
    key.assign(a.cache_rows * positions * kv_heads * dim, NAN);
    value = key;
    for (int64_t b = 0; b < a.batch; ++b) {
      rows.push_back(a.cache_rows - 1 - b);
      for (int64_t i = 0; i < stored[b] * kv_heads * dim; ++i) {
        key[rows[b] * positions * kv_heads * dim + i] = random();
        value[rows[b] * positions * kv_heads * dim + i] = random();
      }
    }
    for (int64_t i = 0; i < heads; ++i) slopes.push_back(0.01f * static_cast<float>(i + 1));
    const int64_t q[3] = {heads * tokens * dim, tokens * dim, dim};
    const int64_t kv[3] = {positions * kv_heads * dim, dim, kv_heads * dim};
    for (int i = 0; i < 3; ++i) {
      a.query_stride[i] = q[i];
      a.key_stride[i] = a.value_stride[i] = kv[i];
    }
  }

  float random() {
    seed_ = seed_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<float>(static_cast<int32_t>(seed_ >> 32)) * 0x1p-30f;
  }

  const std::vector<float>& run() {
    a.query = query.data();
    point_at_cache();
    a.lengths = lengths.data();
    a.rows = rows.data();
    CHECK(fastlm::attention_decode_check(a) == 0);
    output.assign(query.size(), NAN);
    scratch.assign(fastlm::attention_decode_scratch(a, *std::max_element(lengths.begin(), lengths.end())), NAN);
    a.output = output.data();
    a.scratch = scratch.data();
    fastlm::attention_decode(a);
    return output;
  }

  // Appends keys and values to a cache of another type, and replaces them by what it holds of them.
  void keep_as(fastlm::KvType type) {
    a.type = type;
    const int64_t vectors = static_cast<int64_t>(key.size()) / a.dim, width = a.dim + 4;
    bfloat_key.assign(key.size(), 0x7fc0);
    int_key.assign(vectors * width, -1);
    bfloat_value = bfloat_key;
    int_value = int_key;
    point_at_cache();
    fastlm::KvAppend append = {1, 1, vectors, a.dim, key.data(), {0, 0, a.dim}, value.data(), {0, 0, a.dim}};
    append.type = type;
    append.keys = const_cast<void*>(a.key);
    append.values = const_cast<void*>(a.value);
    append.keys_stride[2] = append.values_stride[2] = type == fastlm::KvType::kInt8 ? width : a.dim;
    const int64_t start = 0;
    append.starts = &start;
    append.threads = 1;
    fastlm::kv_append(append);
    read_back(key, bfloat_key, int_key);
    read_back(value, bfloat_value, int_value);
    if (type == fastlm::KvType::kInt8)
      for (int64_t* stride : {a.key_stride, a.value_stride})
        for (int i = 0; i < 3; ++i) stride[i] = stride[i] / a.dim * width;
  }

  // The largest difference from the formula in double precision.
  double error() {
    run();
    double largest = 0;
    for (int64_t b = 0; b < a.batch; ++b)
      for (int64_t h = 0; h < a.heads; ++h)
        for (int64_t t = 0; t < a.tokens; ++t) {
          const int64_t here = lengths[b] - a.tokens + t;
          const int64_t shared = (rows[b] * a.positions * a.kv_heads + h / (a.heads / a.kv_heads)) * a.dim;
          const float* q = query.data() + ((b * a.heads + h) * a.tokens + t) * a.dim;
          std::vector<double> sum(a.dim, 0.0);
          double total = 0;
          for (int64_t j = 0; j <= here; ++j) {
            if (here - j >= a.window) continue;
            double score = 0;
            for (int64_t d = 0; d < a.dim; ++d) score += double(q[d]) * key[shared + j * a.kv_heads * a.dim + d];
            score *= a.scale;
            if (a.softcap > 0) score = a.softcap * std::tanh(score / a.softcap);
            if (a.slopes != nullptr) score += a.slopes[h] * static_cast<double>(j - here);
            total += std::exp(score);
            for (int64_t d = 0; d < a.dim; ++d)
              sum[d] += std::exp(score) * value[shared + j * a.kv_heads * a.dim + d];
          }
          for (int64_t d = 0; d < a.dim; ++d) {
            const double off =
                std::abs(sum[d] / total - output[((b * a.tokens + t) * a.heads + h) * a.dim + d]);
            largest = check::worse(largest, off);
          }
        }
    return largest;
  }

 private:
  void point_at_cache() {
    switch (a.type) {
      case fastlm::KvType::kFloat: a.key = key.data(), a.value = value.data(); break;
      case fastlm::KvType::kBfloat16: a.key = bfloat_key.data(), a.value = bfloat_value.data(); break;
      case fastlm::KvType::kInt8: a.key = int_key.data(), a.value = int_value.data(); break;
    }
  }

  void read_back(std::vector<float>& plain, const std::vector<uint16_t>& bfloats, const std::vector<int8_t>& ints) const {
    for (size_t i = 0; i < plain.size(); ++i) {
      if (a.type == fastlm::KvType::kBfloat16) {
        const uint32_t bits = static_cast<uint32_t>(bfloats[i]) << 16;
        std::memcpy(&plain[i], &bits, sizeof(bits));
      } else {
        const int8_t* vector = ints.data() + i / a.dim * (a.dim + 4);
        float scale;
        std::memcpy(&scale, vector + a.dim, sizeof(scale));
        plain[i] = vector[i % a.dim] * scale;
      }
    }
  }

  uint64_t seed_ = 42;
};

}  // namespace

FASTLM_TEST(attention_decode_agrees_with_the_formula) {
  for (int64_t dim : {1, 7, 17, 64})
    for (int64_t tokens : {1, 3, 33})
      for (int64_t window : {kNoWindow, int64_t{1}, int64_t{100}, int64_t{256}}) {
        Case c(6, 2, tokens, dim, 300, {300, 35, 257});
        c.a.window = window;
        if (dim % 2 == 0) c.a.slopes = c.slopes.data();
        if (tokens == 3) c.a.softcap = 2.0f;
        CHECK(c.error() < 2e-5);
      }
  Case wide(2, 1, 1, 256, 70, {70});
  CHECK(wide.error() < 2e-5);
}

FASTLM_TEST(attention_decode_reads_caches_of_fewer_bytes) {
  for (fastlm::KvType type : {fastlm::KvType::kBfloat16, fastlm::KvType::kInt8})
    for (int64_t dim : {5, 64, 100})
      for (int64_t tokens : {1, 3}) {
        Case c(tokens == 1 ? 8 : 6, 2, tokens, dim, 300, {300, 35, 257});
        const std::vector<float> before = c.key;
        c.keep_as(type);
        CHECK(c.key != before);
        CHECK(c.error() < 2e-5);
      }
}

// Where the processor has tiles: what they give and what floats do, each within the bound and one close to the other.
FASTLM_TEST(attention_decode_by_tiles_agrees_with_floats) {
  for (fastlm::KvType type : {fastlm::KvType::kBfloat16, fastlm::KvType::kInt8})
    for (int64_t dim : {32, 64, 128, 192, 256})
      for (int64_t tokens : {1, 3})
        for (int64_t window : {kNoWindow, int64_t{100}}) {
          Case c(tokens == 1 ? 6 : 4, 2, tokens, dim, 1400, {1400, 35, 129});
          c.a.window = window;
          c.a.scale = 1.0f / static_cast<float>(dim);
          c.a.slopes = c.slopes.data();
          c.keep_as(type);
          CHECK(c.error() < 2e-6);
          const std::vector<float> by_tiles = c.output;
          fastlm::matmul_allow_tiles(false);
          CHECK(c.error() < 2e-6);
          fastlm::matmul_allow_tiles(true);
          float apart = 0;
          for (size_t i = 0; i < by_tiles.size(); ++i) apart = std::fmax(apart, std::abs(by_tiles[i] - c.output[i]));
          CHECK(apart < 2e-6);
          // Of whole numbers the unit adds up exactly, floats do not: equal bits would mean that one of them did not run.
          const bool tiles = fastlm::matmul_tiles() && std::strcmp(fastlm::isa_active(), "avx512") == 0;
          if (tiles && dim * (type == fastlm::KvType::kInt8 ? 1 : 2) % 64 == 0) CHECK(by_tiles != c.output);
        }
}

// Of many new tokens the first see nothing of a late chunk, the last nothing of an early one behind the window.
FASTLM_TEST(attention_decode_of_few_bytes_takes_chunks_that_no_query_sees) {
  for (fastlm::KvType type : {fastlm::KvType::kBfloat16, fastlm::KvType::kInt8})
    for (int64_t window : {kNoWindow, int64_t{20}}) {
      Case c(4, 2, 40, 64, 300, {80, 150, 290});
      c.a.window = window;
      c.keep_as(type);
      CHECK(c.error() < 2e-5);
    }
}

FASTLM_TEST(attention_decode_of_few_bytes_depends_on_the_sequence_alone) {
  for (fastlm::KvType type : {fastlm::KvType::kBfloat16, fastlm::KvType::kInt8}) {
    Case c(6, 2, 3, 64, 1400, {1400, 3, 1025, 128});
    c.a.window = 900;
    c.keep_as(type);
    const std::vector<float> together = c.run();
    for (int threads : {1, 3, 16}) {
      c.a.threads = threads;
      CHECK(c.run() == together);
    }
    const size_t entry = together.size() / 4;
    for (size_t b = 0; b < 4; ++b) {
      Case one = c;
      one.a.batch = 1;
      one.query.assign(c.query.begin() + b * entry, c.query.begin() + (b + 1) * entry);
      one.lengths = {c.lengths[b]};
      one.rows = {c.rows[b]};
      CHECK(one.run() == std::vector<float>(together.begin() + b * entry, together.begin() + (b + 1) * entry));
    }
  }
}

FASTLM_TEST(attention_decode_of_few_bytes_hides_no_nan_and_takes_any_magnitude) {
  for (fastlm::KvType type : {fastlm::KvType::kBfloat16, fastlm::KvType::kInt8})
    for (float bad : {NAN, INFINITY}) {
      Case c(6, 2, 1, 64, 300, {300, 200});
      c.keep_as(type);
      c.query[64 * 4 + 7] = bad;  // head 4 of the first sequence
      const std::vector<float>& output = c.run();
      for (size_t i = 0; i < output.size(); ++i) CHECK(std::isnan(output[i]) == (i / 64 == 4));
    }
  for (float scale : {0.0f, 1e-35f, 1e-10f}) {
    Case c(6, 2, 1, 64, 300, {300, 200});
    c.keep_as(fastlm::KvType::kInt8);
    c.a.scale = scale;
    CHECK(c.error() < 2e-6);
  }
}

FASTLM_TEST(attention_decode_comparison_finds_a_wrong_formula) {
  Case c(6, 2, 1, 16, 300, {300, 35});
  CHECK(c.error() < 2e-5);
  c.a.window = 100;
  c.run();
  const std::vector<float> windowed = c.output;
  c.a.window = 101;
  c.run();
  double difference = 0;
  for (size_t i = 0; i < windowed.size(); ++i) difference = std::fmax(difference, std::abs(windowed[i] - c.output[i]));
  CHECK(difference > 1e-4);  // one key in a hundred is well above the bound
}

FASTLM_TEST(attention_decode_threads_and_batch_change_no_bit) {
  Case c(8, 2, 2, 24, 900, {900, 2, 512, 513});
  const std::vector<float> together = c.run();
  for (int threads : {1, 3, 16}) {
    c.a.threads = threads;
    CHECK(c.run() == together);
  }
  const size_t entry = together.size() / 4;
  for (size_t b = 0; b < 4; ++b) {
    Case one = c;
    one.a.batch = 1;
    one.query.assign(c.query.begin() + b * entry, c.query.begin() + (b + 1) * entry);
    one.lengths = {c.lengths[b]};
    one.rows = {c.rows[b]};
    CHECK(one.run() == std::vector<float>(together.begin() + b * entry, together.begin() + (b + 1) * entry));
  }
}

FASTLM_TEST(attention_decode_names_the_entry_out_of_range) {
  Case c(2, 1, 2, 8, 10, {5, 10, 2});
  c.run();
  const auto check = [&c](std::vector<int64_t> lengths, std::vector<int64_t> rows) {
    c.a.lengths = lengths.data();
    c.a.rows = rows.empty() ? nullptr : rows.data();
    return fastlm::attention_decode_check(c.a);
  };
  CHECK(check({5, 10, 2}, {}) == 0);
  CHECK(check({5, 11, 2}, {}) == 2);
  CHECK(check({5, 10, 1}, {}) == 3);
  CHECK(check({-1, 10, 2}, {}) == 1);
  CHECK(check({5, 10, 2}, {3, 0, 0}) == 0);
  CHECK(check({5, 10, 2}, {0, 4, 0}) == -2);
  CHECK(check({5, 10, 2}, {0, 0, -1}) == -3);
  c.a.batch = 4;
  CHECK(check({5, 10, 2, 2}, {}) == 0);
  c.a.cache_rows = 3;
  CHECK(check({5, 10, 2, 2}, {}) == -4);
}
