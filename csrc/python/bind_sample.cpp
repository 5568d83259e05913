#include <algorithm>
#include <array>
#include <cstdlib>
#include <memory>
#include <new>

#include "bindings.h"
#include "fastlm/sample.h"

namespace fastlm {
namespace {

// The calling thread's scratch; grows, and starts as zeros.
struct Scratch {
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<void, Free> memory;
  int64_t vocab = 0;
  int threads = 0;

  void* aligned() const { return reinterpret_cast<void*>((reinterpret_cast<address>(memory.get()) + 63) & ~address{63}); }

  void reserve(int64_t wanted_vocab, int wanted_threads) {
    if (wanted_vocab <= vocab && wanted_threads <= threads) return;
    const int64_t most_vocab = std::max(vocab, wanted_vocab);
    const int most_threads = std::max(threads, wanted_threads);
    memory.reset();
    vocab = threads = 0;
    memory.reset(std::calloc(sample_scratch_bytes(most_vocab) * most_threads + 64, 1));
    if (!memory) throw std::bad_alloc();
    vocab = most_vocab;
    threads = most_threads;
  }
};

// Options come as numbers and, for those given per row, addresses of [batch] float64 or int64.
int64_t bind(address logits, int64_t row_stride, int64_t batch, int64_t vocab, std::array<double, 6> reals,
             std::array<address, 6> real_rows, std::array<int64_t, 6> integers, std::array<address, 6> integer_rows,
             address bias, int64_t bias_stride, address history, int64_t history_stride, int64_t history_length,
             address tokens, int threads) {
  if (batch < 0 || vocab < 1 || vocab > (int64_t{1} << 24) || threads < 1)
    throw py::value_error("sample: batch, vocab or threads out of range");
  const auto real = [&](int i) { return RealOption{reals[i], pointer<const double>(real_rows[i])}; };
  const auto integer = [&](int i) { return IntegerOption{integers[i], pointer<const int64_t>(integer_rows[i])}; };
  SampleArgs args{};
  args.logits = pointer<const float>(logits);
  args.row_stride = row_stride;
  args.batch = batch;
  args.vocab = vocab;
  args.temperature = real(0);
  args.top_p = real(1);
  args.min_p = real(2);
  args.repetition_penalty = real(3);
  args.presence_penalty = real(4);
  args.frequency_penalty = real(5);
  args.top_k = integer(0);
  args.seed = integer(1);
  args.sequence = integer(2);
  args.position = integer(3);
  args.history_lengths = integer(4);
  args.prompt_lengths = integer(5);
  args.bias = pointer<const float>(bias);
  args.bias_stride = bias_stride;
  args.history = pointer<const int64_t>(history);
  args.history_stride = history_stride;
  args.history_length = history_length;
  args.tokens = pointer<int64_t>(tokens);
  if (Program* const program = recording()) {
    args.scratch = program->scratch(sample_scratch_bytes(vocab) * threads, false);
    args.scratch_vocab = vocab;
  } else {
    thread_local Scratch kept;
    kept.reserve(vocab, threads);
    args.scratch = kept.aligned();
    args.scratch_vocab = kept.vocab;
  }
  args.threads = threads;
  return launch(&sample, args);
}

}  // namespace

void bind_sample(py::module_& m) {
  m.def("sample", &bind, "Writes one token per row; returns -1, or the first row that cannot be drawn from.");
}

}  // namespace fastlm
