#include "fastlm/sample.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "check.h"
#include "fastlm/elementwise.h"
#include "fastlm/philox.h"
#include "fastlm/program.h"

namespace {

using fastlm::SampleArgs;

const float kInfinity = std::numeric_limits<float>::infinity();

// Buffers of exactly the size promised, so that a sanitizer sees one byte too far.
struct Case {
  int64_t batch, vocab;
  std::vector<float> logits, bias;
  std::vector<int64_t> history, tokens;
  std::unique_ptr<void, void (*)(void*)> scratch{nullptr, std::free};
  SampleArgs args{};

  Case(int64_t batch_, int64_t vocab_, int threads = 1)
      : batch(batch_), vocab(vocab_), logits(batch_ * vocab_), bias(vocab_), history(batch_ * 7), tokens(batch_, -2) {
    uint32_t state = uint32_t(vocab_ * 31 + batch_);
    const auto uniform = [&] { return float((state = state * 1664525u + 1013904223u) >> 8) / (1 << 24); };
    for (float& x : logits) {
      x = uniform();
      x += uniform();
      x += uniform();
      x = 8 * (x - 1.5f);
    }
    for (float& x : bias) x = uniform();
    for (int64_t& id : history) id = int64_t(uniform() * vocab_);
    const std::size_t bytes = fastlm::sample_scratch_bytes(vocab_) * threads;
    scratch.reset(std::aligned_alloc(64, bytes));
    std::fill_n(static_cast<char*>(scratch.get()), bytes, 0);
    args.logits = logits.data();
    args.row_stride = vocab;
    args.batch = batch;
    args.vocab = vocab;
    args.temperature.value = args.top_p.value = args.repetition_penalty.value = 1;
    args.tokens = tokens.data();
    args.scratch = scratch.get();
    args.scratch_vocab = vocab;
    args.threads = threads;
    args.history_lengths.value = args.history_length = args.history_stride = 7;
  }
  int64_t run() { return fastlm::sample(args); }
  int64_t argmax(int64_t row) const {
    const auto begin = logits.begin() + row * vocab;
    return std::max_element(begin, begin + vocab) - begin;
  }
};

}  // namespace

FASTLM_TEST(philox_known_answers) {
  const uint32_t expected[3][4] = {{0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8},
                                   {0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD},
                                   {0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1}};
  uint32_t counters[3][4] = {{0, 0, 0, 0},
                             {~0u, ~0u, ~0u, ~0u},
                             {0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344}};
  const uint32_t keys[3][2] = {{0, 0}, {~0u, ~0u}, {0xA4093822, 0x299F31D0}};
  for (int i = 0; i < 3; ++i) {
    fastlm::philox4x32(counters[i], keys[i][0], keys[i][1]);
    CHECK(std::equal(counters[i], counters[i] + 4, expected[i]));
  }
}

FASTLM_TEST(sample_same_tokens_at_every_level_and_thread_count) {
  static std::map<std::string, std::vector<int64_t>> seen;  // what the first level drew
  uint64_t hash = 0xCBF29CE484222325;                       // FNV-1a of all tokens
  for (const int64_t vocab : {1, 2, 3, 15, 17, 127, 128, 129, 255, 511, 512, 513, 1000, 4099})
    for (const int64_t batch : {1, 5})
      for (int options = 0; options < 64; ++options) {
        const int threads = options & 1 ? 2 : 1;
        Case c(batch, vocab, threads);
        if (options & 2) c.args.top_p.value = 0.8;
        if (options & 4) c.args.top_k.value = 20;
        if (options & 8) c.args.min_p.value = 0.02;
        if (options & 16) c.args.bias = c.bias.data();
        if (options & 32) {
          c.args.history = c.history.data();
          c.args.repetition_penalty.value = 1.3;
          c.args.frequency_penalty.value = 0.37;
          c.args.prompt_lengths.value = 2;
        }
        CHECK(c.run() == -1);
        for (const int64_t token : c.tokens) {
          CHECK(token >= 0 && token < vocab);
          hash = (hash ^ uint64_t(token)) * 0x100000001B3;
        }
        const std::string name = std::to_string(vocab) + " " + std::to_string(batch) + " " + std::to_string(options / 2);
        CHECK(seen.emplace(name, c.tokens).first->second == c.tokens);
      }
  // The same on every architecture, and in every release: a user's seed is to give the same text for ever.
  CHECK(hash == 0x87A157928D764A57);
}

FASTLM_TEST(sample_rows_shared_by_threads) {
  for (const int64_t vocab : {32767, 32768, 50257})
    for (const int64_t batch : {1, 2, 3})
      for (int options = 0; options < 16; ++options) {
        Case alone(batch, vocab, 1), crew(batch, vocab, 3);
        for (Case* c : {&alone, &crew}) {
          if (options & 1) c->args.top_p.value = 0.5;
          if (options & 2) c->args.top_k.value = 200;
          if (options & 4) c->args.min_p.value = 0.001;
          if (options & 8) c->args.bias = c->bias.data();
        }
        CHECK(alone.run() == -1 && crew.run() == -1);
        CHECK(alone.tokens == crew.tokens);
        alone.logits.back() = crew.logits.back() = kInfinity;
        CHECK(alone.run() == batch - 1 && crew.run() == batch - 1);
        alone.args.temperature.value = crew.args.temperature.value = 0;
        alone.logits.back() = crew.logits.back() = 1e30f;
        CHECK(alone.run() == -1 && crew.run() == -1);
        CHECK(alone.tokens == crew.tokens && crew.tokens.back() == vocab - 1);
      }
}

FASTLM_TEST(sample_replayed_by_a_team) {
  for (const int64_t batch : {1, 3})
    for (const double top_p : {1.0, 0.5}) {
      int64_t positions[3] = {}, log[3 * 8];
      Case direct(batch, 40000), replayed(batch, 40000, 2);
      for (Case* c : {&direct, &replayed}) c->args.top_p.value = top_p;
      replayed.args.position.rows = positions;
      fastlm::Program program(2);
      program.add([&] { return replayed.run(); });
      program.add([&] { return fastlm::offset({positions, nullptr, 1, positions, nullptr, batch, 1}), int64_t{-1}; });
      CHECK(program.run(8, {replayed.tokens.data(), batch, nullptr, 0, log}, 2).replays == 8);
      for (int64_t position = 0; position < 8; ++position) {
        direct.args.position.value = position;
        CHECK(direct.run() == -1 && std::equal(direct.tokens.begin(), direct.tokens.end(), log + position * batch));
      }
    }
}

// Draws where near weights decide are to be those of exact ones, which a min_p below every weight asks for. What is
// varied here, until the exact token changes from one value to the next, brings the draw as close to a boundary as
// floats allow: there the near weights' error would show.
template <typename Vary>
static void check_at_boundaries(Case& c, double low, double high, const Vary& vary) {
  const auto token = [&](double value, bool exact) {
    vary(value);
    c.args.min_p.value = exact ? 0x1p-40 : 0;
    CHECK(c.run() == -1);
    return c.tokens[0];
  };
  const int64_t last = token(high, true);
  if (token(low, true) == last) return;
  for (int step = 0; step < 60; ++step) {
    const double middle = low + (high - low) / 2;
    CHECK(token(middle, false) == token(middle, true));
    (token(middle, true) == last ? high : low) = middle;
  }
  for (const double value : {low, high, low * (1 - 1e-7), high * (1 + 1e-7), low * (1 - 1e-6), high * (1 + 1e-6)})
    CHECK(token(value, false) == token(value, true));
}

FASTLM_TEST(sample_near_weights_never_decide_wrongly) {
  for (const int64_t vocab : {1024, 3001})
    for (int seed = 0; seed < 40; ++seed) {
      Case c(1, vocab);
      c.args.seed.value = seed;
      c.args.temperature.value = seed % 2 ? 1 : 8;
      const int64_t moved = vocab / (1 + seed % 5) - 1;
      check_at_boundaries(c, 1, 12, [&](double value) { c.logits[moved] = float(value); });
      check_at_boundaries(c, 0.01, 0.99, [&](double value) { c.args.top_p.value = value; });
    }
  Case flat(1, 40000);
  for (float& x : flat.logits) x *= 0x1p-10f;
  for (int seed = 0; seed < 1000; ++seed) {
    flat.args.seed.value = seed;
    flat.args.min_p.value = 0;
    CHECK(flat.run() == -1);
    const int64_t token = flat.tokens[0];
    flat.args.min_p.value = 0x1p-40;
    CHECK(flat.run() == -1 && flat.tokens[0] == token);
  }
}

FASTLM_TEST(sample_narrow_filters_leave_the_largest) {
  for (const int64_t vocab : {1, 2, 31, 64, 513, 5000}) {
    for (int filter = 0; filter < 4; ++filter) {
      Case c(3, vocab);
      if (filter == 0) c.args.temperature.value = 0;
      if (filter == 1) c.args.top_k.value = 1;
      if (filter == 2) c.args.top_p.value = 1e-12;
      if (filter == 3) c.args.min_p.value = 1;
      CHECK(c.run() == -1);
      for (int64_t row = 0; row < 3; ++row) CHECK(c.tokens[row] == c.argmax(row));
    }
  }
}

FASTLM_TEST(sample_top_k_draws_each_of_the_k_largest_and_no_other) {
  for (const int64_t k : {2, 17, 100, 600, 899}) {
    Case c(1, 900);
    c.args.top_k.value = k;
    c.args.temperature.value = 1e6;  // all but flat
    std::vector<int64_t> order(900), drawn;
    for (int64_t i = 0; i < 900; ++i) order[i] = i;
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return c.logits[a] > c.logits[b]; });
    for (int64_t position = 0; position < 20 * k; ++position) {
      c.args.position.value = position;
      CHECK(c.run() == -1);
      drawn.push_back(c.tokens[0]);
    }
    std::sort(drawn.begin(), drawn.end());
    drawn.erase(std::unique(drawn.begin(), drawn.end()), drawn.end());
    order.resize(k);
    std::sort(order.begin(), order.end());
    CHECK(drawn == order);
  }
}

FASTLM_TEST(sample_frequencies_follow_the_weights) {
  Case c(1, 4);
  const double p[4] = {0.5, 0.125, 0.25, 0.125};
  for (int i = 0; i < 4; ++i) c.logits[i] = float(std::log(p[i]));
  const int draws = 40000;
  double counts[4] = {}, chi_square = 0;
  for (int position = 0; position < draws; ++position) {
    c.args.position.value = position;
    c.run();
    ++counts[c.tokens[0]];
  }
  for (int i = 0; i < 4; ++i) chi_square += std::pow(counts[i] - draws * p[i], 2) / (draws * p[i]);
  CHECK(chi_square < 16.3);  // 3 degrees of freedom, p = 0.001
}

FASTLM_TEST(sample_refuses_rows_and_draws_the_others) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (const int64_t vocab : {1, 5, 16, 513})
    for (const float bad : {nan, -nan, kInfinity, -kInfinity}) {
      Case c(3, vocab);
      if (bad == -kInfinity) std::fill_n(c.logits.begin() + vocab, vocab, bad);
      c.logits[2 * vocab - 1] = bad;
      CHECK(c.run() == 1);
      CHECK(c.tokens[0] >= 0 && c.tokens[1] == -1 && c.tokens[2] >= 0);
    }
  for (const int64_t id : {int64_t{-1}, int64_t{9}, std::numeric_limits<int64_t>::max()}) {
    Case c(2, 9);
    c.args.history = c.history.data();
    c.args.presence_penalty.value = 0.5;
    c.history[13] = id;
    CHECK(c.run() == 1);
    c.history[13] = 0;
    CHECK(c.run() == -1);
  }
}

FASTLM_TEST(sample_scratch_serves_smaller_vocabularies) {
  Case large(1, 2000), small(1, 130), alone(1, 130);
  for (Case* c : {&large, &small, &alone}) {
    c->args.history = c->history.data();
    c->args.frequency_penalty.value = 2;
  }
  small.args.scratch = large.args.scratch;
  small.args.scratch_vocab = 2000;
  for (int position = 0; position < 50; ++position) {
    large.args.position.value = small.args.position.value = alone.args.position.value = position;
    CHECK(large.run() == -1 && small.run() == -1 && alone.run() == -1);
    CHECK(small.tokens == alone.tokens);
  }
}
