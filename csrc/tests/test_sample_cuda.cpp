// The CUDA sampler's device code on the CPU: the tokens of the CPU's sampler, without a race.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "../cuda/sample.cu"
#include "check.h"

namespace {

using fastlm::SampleArgs;
using fastlm::device::SampleScratch;

struct Random {
  uint32_t state;
  float uniform() { return float((state = state * 1664525u + 1013904223u) >> 8) / (1 << 24); }
  int64_t below(int64_t n) { return int64_t(uniform() * float(n)) % n; }
};

// Rows with options of their own, drawn at random; what both samplers take.
struct Case {
  int64_t batch, vocab;
  std::vector<float> logits, bias;
  std::vector<int64_t> history, tokens;
  std::vector<double> reals[6];
  std::vector<int64_t> integers[6];
  std::vector<char> host_scratch;
  SampleArgs args{};

  Case(int64_t batch_, int64_t vocab_, Random& random)
      : batch(batch_), vocab(vocab_), logits(batch_ * vocab_), bias(vocab_), history(batch_ * 9), tokens(batch_, -2),
        host_scratch(fastlm::sample_scratch_bytes(vocab_) + 64) {
    // Coarse, so that there are equal logits; some are forbidden.
    const float step = random.below(3) == 0 ? 0.5f : 1.0f / 1024;
    for (float& x : logits) {
      x = std::round((random.uniform() + random.uniform() + random.uniform() - 1.5f) * 8 / step) * step;
      if (random.below(50) == 0) x = -INFINITY;
    }
    for (int64_t row = 0; row < batch; ++row) logits[row * vocab + random.below(vocab)] = 2;
    for (float& x : bias) x = random.uniform();
    for (int64_t& id : history) id = random.below(std::min<int64_t>(vocab, 12));
    const double active[6] = {0.7, 0.8, 0.05, 1.4, 0.6, 0.3}, idle[6] = {1, 1, 0, 1, 0, 0};
    const bool penalties = random.below(3) == 0;
    for (int k = 0; k < 6; ++k)
      for (int64_t row = 0; row < batch; ++row) {
        const bool on = random.below(2) == 0 && (k < 3 || penalties);
        reals[k].push_back(on ? active[k] : idle[k]);
        if (k == 0 && random.below(8) == 0) reals[k].back() = random.below(2) == 0 ? 0 : 30;
      }
    for (int64_t row = 0; row < batch; ++row) {
      integers[0].push_back(random.below(2) == 0 ? 0 : random.below(random.below(2) == 0 ? 10 : 2 * vocab));
      integers[1].push_back(random.below(1000) * 0x3456789ABCDEF);
      integers[2].push_back(row);
      integers[3].push_back(random.below(5000));
      integers[4].push_back(random.below(10));
      integers[5].push_back(random.below(10));
    }
    fastlm::RealOption* const real[6] = {&args.temperature,        &args.top_p,            &args.min_p,
                                         &args.repetition_penalty, &args.presence_penalty, &args.frequency_penalty};
    fastlm::IntegerOption* const integer[6] = {&args.top_k,    &args.seed,            &args.sequence,
                                               &args.position, &args.history_lengths, &args.prompt_lengths};
    for (int k = 0; k < 6; ++k) {
      real[k]->rows = reals[k].data();
      integer[k]->rows = integers[k].data();
    }
    args.logits = logits.data();
    args.row_stride = vocab;
    args.batch = batch;
    args.vocab = vocab;
    if (random.below(3) == 0) args.bias = bias.data();
    if (penalties) args.history = history.data();
    args.history_stride = args.history_length = 9;
    args.tokens = tokens.data();
  }

  std::vector<int64_t> on_host() {
    SampleArgs host = args;
    void* aligned = host_scratch.data();
    std::size_t space = host_scratch.size();
    host.scratch = std::align(64, space - 64, aligned, space);
    host.scratch_vocab = vocab;
    host.threads = 1;
    tokens.assign(batch, -2);
    fastlm::sample(host);
    return tokens;
  }
};

// What the device code needs, and a watch over all of it.
struct Device {
  std::vector<uint64_t> scratch;
  SampleArgs args;
  int64_t batch;

  explicit Device(Case& c)
      : scratch(fastlm::sample_cuda_scratch(c.batch, c.vocab, true) / 8), args(c.args), batch(c.batch) {
    args.scratch = scratch.data();
    shim::forget_all();
    shim::watch("logits", c.logits.data(), c.logits.size() * 4);
    shim::watch("bias", c.bias.data(), c.bias.size() * 4);
    shim::watch("history", c.history.data(), c.history.size() * 8);
    shim::watch("tokens", c.tokens.data(), c.tokens.size() * 8);
    shim::watch("scratch", scratch.data(), scratch.size() * 8);
    for (int k = 0; k < 6; ++k) {
      shim::watch("options", c.reals[k].data(), c.reals[k].size() * 8);
      shim::watch("options", c.integers[k].data(), c.integers[k].size() * 8);
    }
    c.tokens.assign(c.batch, -2);
  }
  ~Device() { shim::forget_all(); }

  std::string run(unsigned blocks) {
    fastlm::device::SampleLaunch launch{args, reinterpret_cast<SampleScratch*>(scratch.data()), nullptr, nullptr, blocks};
    launch.processed = reinterpret_cast<float*>(launch.rows + batch);
    launch.counts = reinterpret_cast<unsigned*>(launch.processed + batch * args.vocab);
    const char* error = fastlm::device::launch(fastlm::device::sample_kernel<float>,
                                               {unsigned(batch) * blocks, fastlm::device::kSampleThreads, 0, blocks > 1},
                                               nullptr, launch);
    return error == nullptr ? "" : error;
  }
};

}  // namespace

FASTLM_TEST_ONCE(sample_cuda_draws_the_tokens_of_the_cpu) {
  Random random{7};
  int differ = 0;
  for (int trial = 0; trial < 20; ++trial) {
    const int64_t sizes[] = {1, 2, 31, 32, 33, 100, 511, 513, 700, 1100};
    Case c(1 + random.below(3), sizes[trial % 10], random);
    const std::vector<int64_t> want = c.on_host();
    Device device(c);
    shim::options().seed = trial % 3;
    for (const unsigned blocks : {1u, 2u, 5u}) {
      const std::string error = device.run(blocks);
      if (!error.empty()) std::puts(error.c_str());
      CHECK(error.empty());
      differ += c.tokens != want;
    }
    // Fit for the next call: counts and histograms are zero, and so are the barriers but for their top bit.
    const auto* rows = reinterpret_cast<const SampleScratch*>(device.scratch.data());
    for (int64_t row = 0; row < c.batch; ++row) {
      CHECK((rows[row].barrier[0] & 0x7FFFFFFFu) == 0);
      CHECK(std::count(rows[row].histogram[0], rows[row].histogram[0] + 6 * 2048, 0u) == 6 * 2048);
    }
    const auto* counts = reinterpret_cast<const unsigned*>(reinterpret_cast<const float*>(rows + c.batch) + c.batch * c.vocab);
    CHECK(std::count(counts, counts + c.batch * c.vocab, 0u) == c.batch * c.vocab);
  }
  shim::options().seed = 0;
  CHECK(differ == 0);
}

// A barrier or fence that could be left out without the shim's noticing would be one too many, or the shim blind to it.
FASTLM_TEST_ONCE(sample_cuda_needs_every_barrier_and_fence) {
  if (!shim::logs_accesses()) return;
  const auto run = [](shim::Site without) {
    std::string error;
    for (const unsigned blocks : {1u, 3u})
      for (const int64_t top_k : {0, 40}) {
        Random random{3};
        Case c(2, 1100, random);
        c.args.history = c.history.data();
        const double options[6] = {0.9, 0.6, 0.01, 1.4, 0.6, 0.3};
        for (int k = 0; k < 6; ++k) c.reals[k].assign(2, options[k]);
        c.integers[0].assign(2, top_k);
        c.integers[4].assign(2, 9);
        const std::vector<int64_t> want = c.on_host();
        Device device(c);
        shim::options().without = without;
        for (int again = 0; again < 2 && error.empty(); ++again) error = device.run(blocks);
        shim::options() = shim::Options();
        if (error.empty() && c.tokens != want) error = "other tokens";
      }
    return error;
  };
  CHECK(run({}) == "");
  int planted = 0;
  for (const shim::Site& site : std::vector<shim::Site>(shim::sites())) {
    if (std::strstr(site.file, "sample.cuh") == nullptr && std::strstr(site.file, "device.cuh") == nullptr) continue;
    ++planted;
    const std::string error = run(site);
    if (error.empty()) std::printf("%s:%d can be left out\n", site.file, site.line);
    CHECK(!error.empty());
  }
  CHECK(planted >= 12);
}

FASTLM_TEST_ONCE(sample_cuda_reads_the_logits_twice) {
  if (!shim::logs_accesses()) return;
  for (const unsigned blocks : {1u, 3u}) {
    Random random{4};
    Case c(2, 40000, random);
    const double plain[6] = {1, 1, 0, 1, 0, 0};
    for (int k = 0; k < 6; ++k) c.reals[k].assign(2, plain[k]);
    c.integers[0].assign(2, 0);
    for (const double temperature : {0.0, 1.0}) {
      c.reals[0].assign(2, temperature);
      Device device(c);
      CHECK(device.run(blocks) == "");
      const double readings = double(shim::touched("logits")) / double(2 * 40000 * 4);
      CHECK(readings >= (temperature == 0 ? 1 : 2) && readings < (temperature == 0 ? 1.001 : 2.15));
    }
  }
}

FASTLM_TEST_ONCE(sample_cuda_launcher_shares_rows_between_blocks) {
  Random random{11};
  shim::options().log = false;
  for (const int multiprocessors : {1, 2, 7}) {
    shim::options().multiprocessors = multiprocessors;
    Case c(2, 9000, random);
    const std::vector<int64_t> want = c.on_host();
    Device device(c);
    const char* error = fastlm::sample_cuda(device.args, fastlm::Storage::float32, nullptr);
    CHECK(error == nullptr && c.tokens == want);
    // Half precision: the same tokens as from its values in float32.
    std::vector<fastlm::device::Half> half(c.logits.size());
    std::vector<fastlm::device::BFloat16> brain(c.logits.size());
    for (size_t i = 0; i < half.size(); ++i) {
      from_float(c.logits[i], &half[i]);
      from_float(c.logits[i], &brain[i]);
    }
    const auto check = [&](const auto& stored, fastlm::Storage storage) {
      for (size_t i = 0; i < stored.size(); ++i) c.logits[i] = to_float(stored[i]);
      const std::vector<int64_t> rounded = c.on_host();
      SampleArgs args = device.args;
      args.logits = reinterpret_cast<const float*>(stored.data());
      shim::forget_all();
      CHECK(fastlm::sample_cuda(args, storage, nullptr) == nullptr && c.tokens == rounded);
    };
    check(half, fastlm::Storage::float16);
    check(brain, fastlm::Storage::bfloat16);
  }
  shim::options() = shim::Options();
}

FASTLM_TEST_ONCE(sample_cuda_refuses_rows_and_draws_the_others) {
  Random random{5};
  for (const float bad : {float(NAN), INFINITY, -INFINITY}) {
    Case c(3, 70, random);
    for (int k = 3; k < 6; ++k) c.reals[k].assign(3, k == 3 ? 1.0 : 0.0);
    if (bad == -INFINITY) std::fill_n(c.logits.begin() + 70, 70, bad);
    c.logits[139] = bad;
    Device device(c);
    CHECK(device.run(2) == "");
    CHECK(c.tokens[0] >= 0 && c.tokens[1] == -1 && c.tokens[2] >= 0);
  }
  for (const int64_t id : {int64_t{-1}, int64_t{70}, std::numeric_limits<int64_t>::max()}) {
    Case c(2, 70, random);
    c.args.history = c.history.data();
    c.reals[3].assign(2, 1.5);
    c.integers[4].assign(2, 9);
    c.history[13] = id;
    Device device(c);
    CHECK(device.run(2) == "");
    CHECK(c.tokens[0] >= 0 && c.tokens[1] == -1);
  }
}

FASTLM_TEST_ONCE(storage_conversions_round_to_nearest_even) {
  using fastlm::device::BFloat16;
  using fastlm::device::Half;
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const Half half{uint16_t(bits)};
    const BFloat16 brain{uint16_t(bits)};
    Half half_back;
    BFloat16 brain_back;
    from_float(to_float(half), &half_back);
    from_float(to_float(brain), &brain_back);
    const float h = to_float(half), b = to_float(brain);
    CHECK(std::isnan(h) ? std::isnan(to_float(half_back)) : half_back.bits == bits);
    CHECK(std::isnan(b) ? std::isnan(to_float(brain_back)) : brain_back.bits == bits);
    if (!std::isfinite(h) || (bits & 0x7FFF) >= 0x7BFF) continue;
    // The middle between neighbours goes to the even one, what is beyond it to the nearer one.
    const float next = to_float(Half{uint16_t(bits + 1)}), middle = (h + next) / 2;
    Half rounded;
    from_float(middle, &rounded);
    CHECK(rounded.bits == (bits & 1 ? bits + 1 : bits));
    from_float(std::nextafter(middle, next), &rounded);
    CHECK(rounded.bits == bits + 1);
  }
  Half half;
  from_float(65504.0f, &half);
  CHECK(half.bits == 0x7BFF);
  from_float(65520.0f, &half);
  CHECK(half.bits == 0x7C00);
}
