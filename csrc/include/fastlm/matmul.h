// Products of matrices in bfloat16, for processors that multiply tiles of it (AMX): the small products of training,
// where what a library does before and after costs more than the product.
#pragma once

#include <cstdint>

namespace fastlm {

// A matrix as it lies in memory. Floats are rounded to bfloat16 (nearest even) on their way.
struct MatmulInput {
  const void* data;
  int64_t stride;   // elements between rows, at least a row's length
  bool transposed;  // what lies there is the transpose of what is multiplied
  bool bfloats;     // else floats
};

struct Matmul {
  MatmulInput a;      // [m, k]
  MatmulInput b;      // [k, n]
  const float* bias;  // [n], added to each row before it is rounded; or null
  void* c;            // [m, n], contiguous; overlaps nothing
  bool bfloats;       // c is bfloat16, rounded to nearest even; else floats
  int64_t m, n, k;
  void* scratch;  // matmul_scratch(args) bytes, aligned to 64
  int threads;
};

// c = a b + bias, summed in float. An element's sum goes over k in one order: neither the other rows nor `threads` change
// a bit of it. Works on every processor, at speed where matmul_tiles().
void matmul(const Matmul& args);
int64_t matmul_scratch(const Matmul& args);

// Whether this processor multiplies tiles of bfloat16 and the operating system lets this process do it.
bool matmul_tiles();

}  // namespace fastlm
