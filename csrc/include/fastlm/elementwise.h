// The small moves between a decode step's larger kernels, as kernels of their own so that a replay needs no Python.
#pragma once

#include <cstdint>

namespace fastlm {

// output[i] = a[i] + b[i].
struct Add {
  const float* a;  // [count]; either may be the output, otherwise nothing overlaps
  const float* b;
  float* output;
  int64_t count;
  int threads;
};
void add(const Add& args);

// Rows of `row_bytes` bytes from one array to another: target row target_index[i] = source row source_index[i]; an
// index may be null: i. Rows of the target are distinct, and no array overlaps another.
struct CopyRows {
  const void* source;
  const int64_t* source_index;  // [rows] or null
  void* target;
  const int64_t* target_index;  // [rows] or null
  int64_t rows, row_bytes;
  int threads;
};
void copy_rows(const CopyRows& args);

// Integers: target[target_index[i]] = source[source_index[i]] + amount, the indices as above. The target may be the
// source, under the same index. Positions and lengths advance so.
struct Offset {
  const int64_t* source;
  const int64_t* source_index;  // [count] or null
  int64_t amount;
  int64_t* target;
  const int64_t* target_index;  // [count] or null
  int64_t count;
  int threads;
};
void offset(const Offset& args);

}  // namespace fastlm
