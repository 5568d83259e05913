// Drawing one token per row of logits. fastlm/reference/sample.py is the specification: same token, whatever the
// instruction-set level, batch size or thread count. Threads share the rows, and large rows one by one.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastlm {

// An option of all rows (`rows` null) or of each: rows[b], [batch].
struct RealOption {
  double value;
  const double* rows;
};
struct IntegerOption {
  int64_t value;
  const int64_t* rows;
};

struct SampleArgs {
  const float* logits;  // [batch, vocab], rows `row_stride` elements apart, each contiguous
  int64_t row_stride;
  int64_t batch;
  int64_t vocab;  // 1 <= vocab < 2^25, so that the sum of weights is less than 2^63

  RealOption temperature;  // >= 0; 0: the largest logit, lowest id
  RealOption top_p;        // (0, 1]
  RealOption min_p;        // [0, 1]
  RealOption repetition_penalty, presence_penalty, frequency_penalty;
  IntegerOption top_k;  // >= 0; 0: all
  IntegerOption seed, sequence, position;

  const float* bias;  // added to the logits: [batch, vocab], rows `bias_stride` apart (0: one for all); null: none
  int64_t bias_stride;
  const int64_t* history;  // token ids, [batch, history_length], rows `history_stride` apart (0: one for all); null: none
  int64_t history_stride;
  int64_t history_length;
  IntegerOption history_lengths;  // [0, history_length]: entries that count
  IntegerOption prompt_lengths;   // entries before it are the prompt: presence and frequency do not count them

  int64_t* tokens;  // out, [batch]; aliases nothing

  // sample_scratch_bytes(scratch_vocab) bytes for each of `threads`, scratch_vocab >= vocab, aligned to 64. All zero
  // before its first use; every call leaves it fit for others of the same scratch_vocab. One call at a time.
  void* scratch;
  int64_t scratch_vocab;
  int threads;
};

// Elements that arrays of scratch have, so that any level may write whole vectors and groups.
constexpr int64_t sample_padded(int64_t vocab) { return (vocab + 1023) / 1024 * 1024; }

// Per element: sort keys (8), processed logits, relative probabilities, history counts, ids (4 each); per 32 elements
// at most a maximum (4), per 128 at most a sum (8); and a line for what threads tell each other.
constexpr std::size_t sample_scratch_bytes(int64_t vocab) {
  return std::size_t(sample_padded(vocab) * 24 + sample_padded(vocab) * 3 / 16 + 64);
}

// Returns -1, or the lowest row that cannot be drawn from: NaN, +inf or nothing but -inf in its logits after bias and
// penalties, or a history id outside the vocabulary. The tokens of such rows are -1, the others are drawn.
int64_t sample(const SampleArgs& args);

}  // namespace fastlm
