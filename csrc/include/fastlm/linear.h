// y = x W^T + b with W in one of GGUF's formats: read in place with float arithmetic, interleaved with integers.
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

// How inputs are rounded for integer products; see fastlm.reference.linear.quantize_activations. The larger scheme
// takes twice the instructions: nothing where a few rows of input wait for the weights, and too much where many do not.
enum class Rounding : int { kNone = 0, kBits8 = 1, kBits15 = 2 };

// 32 rounded inputs. kBits8: scales[i] * first[16 i + j]. kBits15: scales[0] * (128 * first[j] + second[j]).
struct alignas(32) InputBlock {
  int8_t first[kBlock];
  float scales[2];
  int32_t minus_8[2];  // -8 times the sum of the integers that each scale belongs to
  float sum;           // of all 32, scaled
  int8_t second[kBlock];
};

constexpr int kMostWeights = 4;

struct LinearWeight {
  // Float arithmetic: [outputs, weight_bytes(kind, columns)], contiguous, of any alignment. Q kinds with a Rounding:
  // as `interleave` made it, aligned to 64 bytes. Only read.
  const void* weight;
  const float* bias;  // [outputs] or null
  float* output;      // [rows, outputs], contiguous; overlaps nothing
  int64_t outputs;
  WeightKind kind;
};

struct LinearArgs {
  const float* input;  // [rows, columns], contiguous
  InputBlock* scratch;  // [linear_scratch(...)], used during the call only; null where rounding is kNone
  LinearWeight weights[kMostWeights];  // of one number of columns; their products are computed side by side
  int count;
  int64_t rows, columns;
  Rounding rounding;  // for the weights of Q kinds
  int threads;
  int64_t ahead = 0;  // for linear_outputs: so many bytes further on are the weights to fetch; 0: those that follow
};

// How many InputBlocks of scratch a call wants: rows come in tiles of 8 where there is a unit for them.
constexpr int64_t linear_scratch(int64_t rows, int64_t columns) { return (rows + 7) / 8 * 8 * (columns / kBlock); }

// Every weight is read from memory once for a dozen rows. An output depends on its own row of the input and of the
// weight alone: neither `rows`, `count` nor `threads` changes a bit of it.
void linear(const LinearArgs& args);

// Rows of a weight are interleaved by as many as the active level has lanes (fastlm/isa.h: simd_lanes), so that one
// load has the same columns of all of them: blocks of 32 columns follow each other, each with its rows' scales, their
// minima (Q4_1), and then their codes, 4 bytes of each row in turn. Missing rows at the end are zeros.
constexpr int64_t interleaved_bytes(WeightKind kind, int64_t outputs, int64_t columns, int lanes) {
  return (outputs + lanes - 1) / lanes * lanes * weight_bytes(kind, columns);
}

struct Interleave {
  const void* weight;   // [outputs, weight_bytes(kind, columns)], contiguous, of any alignment; only read
  uint8_t* packed;      // [interleaved_bytes(...)]; overlaps nothing
  int64_t outputs, columns;
  WeightKind kind;  // a Q kind
  int threads;
};
void interleave(const Interleave& args);

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
