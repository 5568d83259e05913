// Writing new keys and values behind those a cache holds.
#pragma once

#include <cstdint>

namespace fastlm {

// How a cache holds keys and values: as float, as bfloat16 rounded to nearest even, or as `dim` integers of -127 to 127
// followed by the four bytes of their float scale, the largest magnitude / 127 (0 below kKvSmallest, with integers 0; NaN
// where a number is not finite).
enum class KvType { kFloat, kBfloat16, kInt8 };
constexpr float kKvSmallest = 1e-30f;

// Strides count elements; features are contiguous.
struct KvAppend {
  int64_t batch, heads, tokens, dim;
  const float* key;  // [batch, heads, tokens, dim]
  int64_t key_stride[3];
  const float* value;  // as key
  int64_t value_stride[3];
  KvType type;
  void* keys;  // [cache rows, heads, positions, dim], dim + 4 for kInt8
  int64_t keys_stride[3];
  void* values;  // as keys; overlaps nothing
  int64_t values_stride[3];
  const int64_t* starts;  // [batch], the position of each entry's first new token
  const int64_t* rows;    // [batch], each entry's cache row, all different; null: b
  int threads;
};

void kv_append(const KvAppend& args);

}  // namespace fastlm
