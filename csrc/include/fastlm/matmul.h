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

// How the second factor of `float_matmul` lies in memory; half precision is IEEE's.
enum class Numbers : int { kFloat, kBfloat, kHalf };

struct FloatMatmul {
  const float* a;  // [m, k], or [k, m] where turned
  int64_t a_stride;  // floats between rows of what lies there
  bool turn_a;
  const void* b;  // [k, n], or [n, k] where turned
  int64_t b_stride;
  bool turn_b;
  Numbers b_numbers;
  const float* bias;  // [n], added last, or null
  float* c;           // [m, n]; overlaps nothing
  int64_t c_stride;
  bool add;  // to what is in c
  int64_t m, n, k;
  void* scratch;  // float_matmul_scratch(args) bytes, aligned to 64
  int threads;
};

// c (+)= a b + bias as accurate as in float, by tiles of bfloat16 (cpu/amx.h says how and what its limits are). An
// element's sum goes over k in one order: neither the other rows and columns nor `threads` change a bit of it. Works on
// every processor, at speed where matmul_tiles().
void float_matmul(const FloatMatmul& args);
int64_t float_matmul_scratch(const FloatMatmul& args);

// Whether this processor multiplies tiles of bfloat16, the operating system lets this process do it, and
// matmul_allow_tiles does.
bool matmul_tiles();

// Not thread-safe: meant for start-up and tests.
void matmul_allow_tiles(bool allowed);

}  // namespace fastlm
