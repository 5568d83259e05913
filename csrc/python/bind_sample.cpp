#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>

#include "sample_args.h"

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

int64_t bind(address logits, int64_t row_stride, int64_t batch, int64_t vocab, std::array<double, 6> reals,
             std::array<address, 6> real_rows, std::array<int64_t, 6> integers, std::array<address, 6> integer_rows,
             address bias, int64_t bias_stride, address history, int64_t history_stride, int64_t history_length,
             address tokens, int threads) {
  if (threads < 1) throw py::value_error("sample: threads out of range");
  SampleArgs args = sample_args(logits, row_stride, batch, vocab, reals, real_rows, integers, integer_rows, bias,
                                bias_stride, history, history_stride, history_length, tokens);
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
