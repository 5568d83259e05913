// y = x W^T + b for a few rows of x, with W in one of GGUF's formats, read in place.
//
// The formats' layouts are in fastlm/reference/quantized.py; `columns` is a multiple of 32 for the Q kinds.
#pragma once

#include <cstdint>

namespace fastlm {

// The numbers are those of fastlm.reference.quantized.KINDS.
enum class WeightKind : int { kF32 = 0, kF16 = 1, kBF16 = 2, kQ8_0 = 3, kQ4_0 = 4, kQ4_1 = 5 };
constexpr int kWeightKinds = 6;
constexpr int kBlock = 32;  // weights in a block of the Q kinds

constexpr bool is_quantized(WeightKind kind) { return kind >= WeightKind::kQ8_0; }

// Bytes of `count` weights; count is a multiple of 32 for the Q kinds.
constexpr int64_t weight_bytes(WeightKind kind, int64_t count) {
  switch (kind) {
    case WeightKind::kF32: return count * 4;
    case WeightKind::kF16:
    case WeightKind::kBF16: return count * 2;
    case WeightKind::kQ8_0: return count / kBlock * 34;
    case WeightKind::kQ4_0: return count / kBlock * 18;
    case WeightKind::kQ4_1: return count / kBlock * 20;
  }
  return 0;
}

// 32 inputs as int8 with a scale: x ~ scale * code.
struct alignas(64) InputBlock {
  int8_t codes[kBlock];
  int32_t offsets[4];  // -128 times the sum of codes 4 i .. 4 i + 3 and 16 + 4 i .. 16 + 4 i + 3
  float scale;
  float scaled_sum;  // scale * sum of the codes
};

struct LinearArgs {
  const float* input;  // [rows, columns], contiguous
  const void* weight;  // [outputs, weight_bytes(kind, columns)], contiguous, of any alignment; only read
  const float* bias;   // [outputs] or null
  float* output;       // [rows, outputs], contiguous; overlaps nothing
  // [rows, columns / 32], aligned to 64 bytes, used during the call only; null for float arithmetic. With it, inputs are rounded to
  // int8 and the products are integer ones (Q kinds only).
  InputBlock* scratch;
  int64_t rows, outputs, columns;
  WeightKind kind;
  int threads;
};

// Every weight is read from memory once for all rows. An output depends on its own row of the input and of the weight
// alone: neither `rows` nor `threads` changes a bit of it.
void linear(const LinearArgs& args);

struct DequantizeArgs {
  const void* weight;  // [outputs, weight_bytes(kind, columns)], contiguous, of any alignment; only read
  const int64_t* ids;  // [rows]: which rows of the weight, or null for `first`, `first` + 1, ...
  float* output;       // [rows, columns], contiguous; overlaps nothing
  int64_t first, rows, outputs, columns;
  WeightKind kind;
  int threads;
};

// Expands rows of a weight to float32. Returns -1, or the first position whose id is not in [0, outputs), in which
// case the output is unspecified.
int64_t dequantize_rows(const DequantizeArgs& args);

}  // namespace fastlm
