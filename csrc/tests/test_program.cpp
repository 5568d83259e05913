// Recorded kernel calls: a replay gives what the calls give, on any team, with serial and shared steps mixed.
#include <cmath>
#include <vector>

#include "check.h"
#include "fastlm/elementwise.h"
#include "fastlm/kv_append.h"
#include "fastlm/linear.h"
#include "fastlm/program.h"
#include "fastlm/norm.h"

namespace {

using fastlm::Program;

constexpr int64_t kSize = 512;  // a product of this size is worth several threads

// x = norm(W x) + x, `layers` times; then a counter moves, and the program sees it.
struct Network {
  std::vector<float> weight, x, product, norm;
  int64_t count = 0;

  Network() : weight(kSize * kSize), x(kSize), product(kSize), norm(kSize) {
    for (int64_t i = 0; i < kSize * kSize; ++i) weight[i] = 0.01f * static_cast<float>((i * 7919) % 61 - 30);
    for (int64_t i = 0; i < kSize; ++i) x[i] = 0.1f * static_cast<float>(i % 13 - 6);
  }
  fastlm::LinearArgs linear(int threads) {
    return {x.data(), nullptr, {{weight.data(), nullptr, product.data(), kSize, fastlm::WeightKind::kF32}}, 1, 1, kSize,
            fastlm::Rounding::kNone, threads};
  }
  fastlm::Norm norm_of(int threads) {
    return {product.data(), nullptr, nullptr, norm.data(), nullptr, 1, kSize, 1e-5f, false, false, threads};
  }
  fastlm::Add add(int threads) { return {x.data(), norm.data(), x.data(), kSize, threads}; }
  fastlm::Offset advance() { return {&count, nullptr, 1, &count, nullptr, 1, 1}; }

  void run(int layers) {
    for (int layer = 0; layer < layers; ++layer) {
      fastlm::linear(linear(1));
      fastlm::norm(norm_of(1));
      fastlm::add(add(1));
    }
    fastlm::offset(advance());
  }
  void record(Program& program, int layers, int threads) {
    for (int layer = 0; layer < layers; ++layer) {
      program.add([=] { return fastlm::linear(linear(threads)), int64_t{-1}; });
      program.add([=] { return fastlm::norm(norm_of(threads)), int64_t{-1}; });
      program.add([=] { return fastlm::add(add(threads)), int64_t{-1}; });
    }
    program.add([=] { return fastlm::offset(advance()), int64_t{-1}; });
  }
};

}  // namespace

FASTLM_TEST(program_replays_what_the_calls_do) {
  Network want;
  std::vector<float> after;
  for (int step = 0; step < 5; ++step) want.run(3);
  for (int threads : {1, 2, 3, 5}) {
    Network got;
    Program program(threads);
    got.record(program, 3, threads);
    std::vector<int64_t> log(5, -1);
    const Program::Result result = program.run(5, {&got.count, 1, nullptr, 0, log.data()}, threads);
    CHECK(result.replays == 5 && !result.refused);
    for (int64_t step = 0; step < 5; ++step) CHECK(log[step] == step + 1);
    for (int64_t i = 0; i < kSize; ++i) CHECK(got.x[i] == want.x[i]);
  }
}

FASTLM_TEST(program_stops_after_a_stop_value) {
  for (int threads : {1, 3}) {
    Network network;
    Program program(threads);
    network.record(program, 1, threads);
    const int64_t stops[] = {99, 4};
    std::vector<int64_t> log(9, -1);
    Program::Result result = program.run(9, {&network.count, 1, stops, 2, log.data()}, threads);
    CHECK(result.replays == 4 && !result.refused && network.count == 4 && log[3] == 4 && log[4] == -1);
    result = program.run(2, {&network.count, 1, stops, 2, log.data()}, threads);
    CHECK(result.replays == 2 && network.count == 6);
  }
}

FASTLM_TEST(program_ends_where_a_kernel_refuses) {
  // The third lookup meets an id that the table does not have.
  std::vector<float> table(6 * 8, 1.5f), row(8, 0.0f);
  for (int threads : {1, 2}) {
    int64_t id = 3;
    Program program(threads);
    const fastlm::DequantizeArgs lookup = {table.data(), &id, row.data(), 0, 1, 6, 8, fastlm::WeightKind::kF32, threads};
    const fastlm::Offset advance = {&id, nullptr, 1, &id, nullptr, 1, 1};
    program.add([=] { return fastlm::dequantize_rows(lookup); });
    program.add([=] { return fastlm::offset(advance), int64_t{-1}; });
    std::vector<int64_t> log(9, -1);
    const Program::Result result = program.run(9, {&id, 1, nullptr, 0, log.data()}, threads);
    CHECK(result.refused && result.replays == 3 && id == 6 && row[7] == 1.5f);
  }
}

FASTLM_TEST(program_scratch_is_aligned_and_shared_only_where_asked) {
  Program program(1);
  char* const own = static_cast<char*>(program.scratch(100, false));
  char* const first = static_cast<char*>(program.scratch(1000, true));
  CHECK(own != first && program.scratch(900, true) == first && program.scratch(1100, true) != first);
  CHECK(program.scratch(50, false) != own);
  for (char* block : {own, first}) CHECK(reinterpret_cast<std::uintptr_t>(block) % 64 == 0);
  for (int i = 0; i < 100; ++i) CHECK(own[i] == 0);
}

FASTLM_TEST(elementwise_moves_what_it_should) {
  for (int64_t n : {0, 1, 7, 16, 33, 20000})
    for (int threads : {1, 3}) {
      std::vector<float> a(n), b(n), sum(n + 1, -7.0f);
      for (int64_t i = 0; i < n; ++i) a[i] = 0.5f * i, b[i] = 3.0f - i;
      fastlm::add({a.data(), b.data(), sum.data(), n, threads});
      for (int64_t i = 0; i < n; ++i) CHECK(sum[i] == a[i] + b[i]);
      CHECK(sum[n] == -7.0f);
    }
  const int64_t source[] = {10, 20, 30}, pick[] = {2, 0}, place[] = {1, 3};
  int64_t target[] = {-1, -1, -1, -1};
  fastlm::offset({source, pick, 5, target, place, 2, 1});
  CHECK(target[0] == -1 && target[1] == 35 && target[2] == -1 && target[3] == 15);
  int64_t rows[] = {0, 0, 0, 0};
  fastlm::copy_rows({source, pick, rows, place, 2, sizeof(int64_t), 1});
  CHECK(rows[0] == 0 && rows[1] == 30 && rows[2] == 0 && rows[3] == 10);
}

FASTLM_TEST(kv_append_writes_those_places_alone) {
  const int64_t batch = 2, heads = 3, tokens = 2, dim = 5, cache_rows = 4, positions = 6;
  const int64_t starts[] = {4, 1}, rows[] = {3, 0};
  std::vector<float> key(batch * tokens * heads * dim), value(key.size());  // [batch, tokens, heads, dim]
  for (std::size_t i = 0; i < key.size(); ++i) key[i] = 1.0f + i, value[i] = -1.0f - i;
  std::vector<float> keys(cache_rows * heads * positions * dim, 0.0f), values(keys.size(), 0.0f);
  fastlm::KvAppend a = {};
  a.batch = batch, a.heads = heads, a.tokens = tokens, a.dim = dim;
  a.key = key.data(), a.value = value.data(), a.keys = keys.data(), a.values = values.data();
  const int64_t stride[] = {tokens * heads * dim, dim, heads * dim};
  const int64_t cache_stride[] = {heads * positions * dim, positions * dim, dim};
  for (int i = 0; i < 3; ++i) {
    a.key_stride[i] = a.value_stride[i] = stride[i];
    a.keys_stride[i] = a.values_stride[i] = cache_stride[i];
  }
  a.starts = starts, a.rows = rows, a.threads = 1;
  fastlm::kv_append(a);
  std::size_t written = 0;
  for (float x : keys) written += x != 0.0f;
  CHECK(written == key.size());
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t t = 0; t < tokens; ++t)
        for (int64_t d = 0; d < dim; ++d) {
          const float want = key[b * stride[0] + h * stride[1] + t * stride[2] + d];
          const int64_t at = rows[b] * cache_stride[0] + h * cache_stride[1] + (starts[b] + t) * dim + d;
          CHECK(keys[at] == want && values[at] == -want);
        }
}
