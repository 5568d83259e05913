// Rotary position embedding.
#pragma once

#include <cstdint>

namespace fastlm {

struct Rotary {
  const float* input;       // [batch, heads, tokens, dim], features contiguous
  int64_t input_stride[3];  // of batch, heads and tokens, in floats
  const float* cos;         // [tokens, half] contiguous; those of sequence b begin at b * table_stride
  const float* sin;         // like cos
  int64_t table_stride;     // 0 where all sequences share one table
  const int64_t* starts;    // [batch], the table's row for the sequence's first token; null: 0
  float* output;            // [batch, heads, tokens, dim] contiguous; overlaps nothing
  int64_t batch, heads, tokens, dim;
  int64_t half;      // pairs that turn, 2 * half <= dim; features from 2 * half on are copied
  bool interleaved;  // pairs are (2i, 2i + 1); if false, (i, i + half)
  int threads;
};

// Turns each pair (x, y) to (x cos - y sin, y cos + x sin). Every product and sum is rounded, as in PyTorch without
// fusion, so that all instruction sets give the same bits.
void rotary(const Rotary& args);

}  // namespace fastlm
