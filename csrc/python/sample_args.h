// The sampler's arguments as Python gives them, the same for CPU and CUDA.
#pragma once

#include <array>

#include "bindings.h"
#include "fastlm/sample.h"

namespace fastlm {

// Options come as numbers and, for those given per row, addresses of [batch] float64 or int64.
inline SampleArgs sample_args(address logits, int64_t row_stride, int64_t batch, int64_t vocab,
                              const std::array<double, 6>& reals, const std::array<address, 6>& real_rows,
                              const std::array<int64_t, 6>& integers, const std::array<address, 6>& integer_rows,
                              address bias, int64_t bias_stride, address history, int64_t history_stride,
                              int64_t history_length, address tokens) {
  if (batch < 0 || vocab < 1 || vocab >= (int64_t{1} << 25)) throw py::value_error("sample: batch or vocab out of range");
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
  return args;
}

}  // namespace fastlm
