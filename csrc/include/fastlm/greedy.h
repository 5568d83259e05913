// The largest output of a linear layer, found without reading most of its weight: greedy decoding's last product.
//
// Beside W lies a coarse copy Q of it in 4 bits a weight. Of the difference R = W - Q, its products P with the k main
// directions B of the inputs are kept, in 4 bits too. With g = B x in floats and x_o = x - B^T g, whatever B is,
//
//   w_i x = q_i x + p_i g + (r_i B^T - p_i) g + r_i x_o,
//
// of which the first two terms, C_i, are read and computed for every row, and the rest is bounded by Cauchy and Schwarz,
// for any positive d_1 .. d_k and s:
//
//   |the rest| <= a_i e,  a_i = sqrt(sum_j d_j^2 (r_i B_j - p_ij)^2 + s^2 |r_i|^2),
//                         e = sqrt(sum_j (g_j / d_j)^2 + |x_o|^2 / s^2).
//
// Rounding: let y_i be the output as `linear` computes it, n_i = |w_i| + |q_i| + |B|_F |p_i|. An input rounded to 15
// bits by blocks of 32 (linear.h) is off by at most 2^-12 of its length, n sums of products by n 2^-24 of the sum of
// their magnitudes, in any order. So, biases and the additions below included, with n = columns + k,
//
//   y_i <= C_i + c_i max(e, |x| / f) + 2^-20 |C_i| + floor,  c_i = a_i + (2^-12 + (2 n + 256) 2^-24) n_i f
//
// for any f > 0; `floor` is for what is too small for relative errors. Only rows whose right side is not less than the
// true output of some row, which is taken from where C is largest, can be the largest: these are computed as `linear`
// does it, and compared. Which rows those are has no influence on the result.
//
// Rows for which the bound could overflow, or whose input isn't finite, are computed whole.
#pragma once

#include <cstdint>

#include "fastlm/linear.h"

namespace fastlm {

constexpr int kDirections = 32;  // k: a block of the coarse copy

// What is kept of a weight [outputs, columns], beside it. fastlm/ops/greedy.py makes it.
struct Screen {
  const void* coarse;     // [Q, P]: kQ4_0 [outputs, columns + 32], as `interleave` made it
  const uint16_t* slack;  // c_i rounded up, bfloat16 [outputs]
  const float* basis;     // B [32, columns], contiguous
  const float* inverses;  // 1 / d_1, .., 1 / d_k, 1 / s, 1 / f: [34]
  float off;       // bounds |x_o - what is computed of it| / |x|
  float floor;
  float most;      // |x| up to which no sum overflows
};

struct Greedy {
  const float* input;  // [rows, columns], contiguous
  LinearWeight weight;  // not kQ4_0 and kQ4_1; its output is not used. kQ8_0 interleaved
  Screen screen;
  int64_t rows, columns;  // columns a multiple of 32
  int64_t* tokens;  // out, [rows]: the lowest index of the largest output
  int64_t* counts;  // [2], added to: rows of weight computed exactly, and calls
  float* bounds;    // out, [rows, outputs]: the right sides above; NaN where all is computed
  void* scratch;    // greedy_scratch(args) bytes, aligned to 64
  int threads;
};

// Returns -1, or the first row that has NaN, +inf or nothing but -inf among its outputs; its token is -1.
int64_t greedy(const Greedy& args);
int64_t greedy_scratch(const Greedy& args);

// Rounds rows of floats to kQ4_0 blocks, and leaves what is left of them.
struct Coarsen {
  float* rows;      // [count, columns], contiguous; out: rows - blocks
  uint8_t* blocks;  // out: rows `stride` bytes apart
  int64_t count, columns, stride;  // columns a multiple of 32
  int threads;
};
void coarsen(const Coarsen& args);

}  // namespace fastlm
