// The small moves between larger kernels, as kernels of their own so that the replay of a decode step needs no Python.
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

// output[i] = input[i] as the other of float and bfloat16 (rounded to nearest even).
struct Convert {
  const void* input;  // [count], bfloat16 where output is float
  void* output;       // [count], overlaps nothing
  int64_t count;
  bool to_bfloats;
  int threads;
};
void convert(const Convert& args);

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
