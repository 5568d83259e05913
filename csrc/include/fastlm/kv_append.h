// Writing new keys and values behind those a cache holds.
#pragma once

#include <cstdint>

namespace fastlm {

// Strides count elements; features are contiguous.
struct KvAppend {
  int64_t batch, heads, tokens, dim;
  const float* key;  // [batch, heads, tokens, dim]
  int64_t key_stride[3];
  const float* value;  // as key
  int64_t value_stride[3];
  bool bfloats;  // the cache is bfloat16, rounded to nearest even, else float
  void* keys;    // [cache rows, heads, positions, dim]
  int64_t keys_stride[3];
  void* values;  // as keys; overlaps nothing
  int64_t values_stride[3];
  const int64_t* starts;  // [batch], the position of each entry's first new token
  const int64_t* rows;    // [batch], each entry's cache row, all different; null: b
  int threads;
};

void kv_append(const KvAppend& args);

}  // namespace fastlm
