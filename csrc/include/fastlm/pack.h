// Weights rearranged into panels for the products of rows with a matrix; see cpu/gemm_panel.h.
#pragma once

#include <cstdint>

namespace fastlm {

// Packs a matrix into [panels][k][4 or 3][L] (see cpu/gemm_panel.h): element (a, b), a < k, b < n, is read from
// source[a * stride_k + b * stride_n].
struct PackPanels {
  const void* source;  // float, or bfloat16 where `bfloat`
  int64_t k, n;
  int64_t stride_k, stride_n;
  int64_t gates;  // n counts 3 or 4 gates of n/gates units, and a panel takes L units of each; 0: panels of 4L columns
  void* packed;   // out: packed_size(k, n, gates) numbers of the same kind
  int threads;
  bool bfloat = false;
};
void pack_panels(const PackPanels& args);

// Numbers in a packed matrix: ceil((n / gates) / L) panels of k * gates * L, or ceil(n / (4L)) of k * 4L without gates;
// of bfloat16, k made even.
int64_t packed_size(int64_t k, int64_t n, int64_t gates, bool bfloat = false);

// Whether this processor multiplies tiles of int8 and the operating system lets this process do it, at the level in use.
bool digit_tiles();

// Packs floats for products in digits (cpu/digits.h), behind which is each column's norm, or, keeping their range, in
// parts (cpu/amx.h); where digit_tiles() alone. Fields as in PackPanels.
struct PackDigits {
  const float* source;
  int64_t k, n;
  int64_t stride_k, stride_n;
  int64_t gates;     // of n, as in PackPanels
  int64_t k_groups;  // k counts so many groups of rows, each filled up to a multiple of 16; 1: none
                     // 0: as parts
  void* packed;      // out: packed_digits_size(k, n, gates, k_groups) bytes, aligned to 64
  int threads;
};
void pack_digits(const PackDigits& args);
int64_t packed_digits_size(int64_t k, int64_t n, int64_t gates, int64_t k_groups);

// Whether digits are exact enough for each of some rows of inputs: for others a recurrent layer needs W_ih as parts too.
struct InputsInDigits {
  const float* input;  // [rows, k], contiguous
  int64_t rows, k;
  const void* w_ih;  // [n, k] packed as digits, `gates`
  int64_t n, gates;
  bool normalised;  // the sums are divided by their size
  int threads;
};
int64_t inputs_in_digits(const InputsInDigits& args);  // 1 or 0

// Whether digits, integers in units of the largest of a row or a column, keep as much of a matrix as sums of floats do:
// bit 0, no row has a number more than 7 times its root mean square; bit 1, no column has. Set where there is NaN.
struct Evenness {
  const float* matrix;  // [rows, columns], contiguous
  int64_t rows, columns;
  int threads;
};
int64_t evenness(const Evenness& args);

// c [m, n] = a [m, k] b [k, n] by digits; where digit_tiles() alone. For gradients: c's error is a few roundings of
// float of (the largest number of a row of a) (the largest of a column of b) sqrt(k).
struct DigitMatmul {
  const float* a;
  int64_t a_stride;
  bool a_across;   // element (i, k) of a is at a[k * a_stride + i], else at a[i * a_stride + k]
  const float* b;  // element (k, j) at b[k * b_stride + j]
  int64_t b_stride;
  float* c;        // contiguous; overlaps nothing
  int64_t m, n, k;
  void* scratch;  // digit_matmul_scratch(args) bytes, aligned to 64
  int threads;
};
void digit_matmul(const DigitMatmul& args);
int64_t digit_matmul_scratch(const DigitMatmul& args);

}  // namespace fastlm
