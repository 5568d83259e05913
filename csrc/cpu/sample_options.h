// What a row of sample.cpp is drawn with: its options, and its logits after bias and penalties.
#pragma once

#include <cstring>

#include "fastlm/sample.h"
#include "simd.h"

namespace fastlm {
namespace FASTLM_ISA {
namespace {

// The options of one row.
struct Options {
  double temperature, top_p;
  float min_p, repetition, presence, frequency;
  int64_t top_k, history, prompt;
  uint64_t seed, sequence;
  uint32_t position;

  bool penalised() const { return repetition != 1 || presence != 0 || frequency != 0; }
};

double at(const RealOption& option, int64_t row) { return option.rows ? option.rows[row] : option.value; }
int64_t at(const IntegerOption& option, int64_t row) { return option.rows ? option.rows[row] : option.value; }

Options options_of(const SampleArgs& a, int64_t row) {
  Options o;
  o.temperature = at(a.temperature, row);
  o.top_p = at(a.top_p, row);
  o.min_p = float(at(a.min_p, row));
  o.repetition = float(at(a.repetition_penalty, row));
  o.presence = float(at(a.presence_penalty, row));
  o.frequency = float(at(a.frequency_penalty, row));
  o.top_k = at(a.top_k, row);
  o.seed = uint64_t(at(a.seed, row));
  o.sequence = uint64_t(at(a.sequence, row));
  o.position = uint32_t(at(a.position, row));
  o.history = at(a.history_lengths, row);
  o.prompt = at(a.prompt_lengths, row);
  return o;
}

// Copies the row, with bias, to `processed` and applies the penalties. False: a history id is outside the vocabulary.
// `counts` [n] are zero before and after.
bool process(const float* logits, const float* bias, const int64_t* history, int64_t n, const Options& o,
             float* processed, uint32_t* counts) {
  if (bias == nullptr)
    std::memcpy(processed, logits, n * sizeof(float));
  else
    for (int64_t i = 0; i < n; ++i) processed[i] = logits[i] + bias[i];
  if (history == nullptr || !o.penalised()) return true;
  for (int64_t j = 0; j < o.history; ++j)
    if (history[j] < 0 || history[j] >= n) return false;
  // Counts are kept as 2 * (occurrences after the prompt) + 1, so that 0 means unseen; and back to 0 once applied.
  for (int64_t j = 0; j < o.history; ++j) {
    uint32_t& count = counts[history[j]];
    count = (count | 1) + (j >= o.prompt ? 2 : 0);
  }
  for (int64_t j = 0; j < o.history; ++j) {
    const uint32_t count = counts[history[j]];
    if (count == 0) continue;
    counts[history[j]] = 0;
    float x = processed[history[j]];
    x = x < 0 ? x * o.repetition : x / o.repetition;
    if (count > 1) {
      x = x - o.frequency * float(count >> 1);
      x = x - o.presence;
    }
    processed[history[j]] = x;
  }
  return true;
}

}  // namespace
}  // namespace FASTLM_ISA
}  // namespace fastlm
