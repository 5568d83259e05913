// Attention of each sequence's newest tokens to its row of a key-value cache.
#pragma once

#include <cstdint>

#include "fastlm/kv_append.h"

namespace fastlm {

constexpr int kAttentionDecodeMaxDim = 256;

// Query head h reads key/value head h / (heads / kv_heads). Query t of batch entry b stands at position
// p = lengths[b] - tokens + t and sees keys j with p - window < j <= p. Scores are scale * q.k, then
// softcap * tanh(score / softcap), then + slope * (j - p).
//
// Strides count elements; the last dimension of queries, keys and values is contiguous. No array is kept.
struct AttentionDecode {
  int64_t batch, heads, kv_heads, tokens, dim;  // heads is a multiple of kv_heads; 1 <= dim <= kAttentionDecodeMaxDim
  int64_t cache_rows, positions;                // shape of the caches
  const float* query;                           // [batch, heads, tokens, dim]
  int64_t query_stride[3];
  KvType type;                                  // of keys and values
  const void* key;  // [cache_rows, kv_heads, positions, dim]; positions from a row's length on are not read
  int64_t key_stride[3];
  const void* value;  // as key; may be the same memory
  int64_t value_stride[3];
  const int64_t* lengths;  // [batch], tokens of each sequence, the new ones counted in: tokens <= lengths[b] <= positions
  const int64_t* rows;     // [batch], each entry's cache row; null: b
  const float* slopes;     // [heads], or [batch, heads] with slopes_stride = heads; null: none
  int64_t slopes_stride;   // 0 or heads
  float scale;
  float softcap;   // 0: none
  int64_t window;  // at least 1; INT64_MAX: none
  float* output;   // [batch, tokens, heads, dim], contiguous, as the projection behind it reads it; overlaps no input
  float* scratch;  // attention_decode_scratch(...) floats, for the time of the call
  int threads;     // at most; the result does not depend on it, nor on the other entries of the batch
};

// 0, or b + 1 for the first lengths[b] out of range, or -(b + 1) for the first rows[b] out of range. The functions
// below expect 0.
int64_t attention_decode_check(const AttentionDecode& a);

// Floats of scratch for sequences of up to `longest` tokens.
int64_t attention_decode_scratch(const AttentionDecode& a, int64_t longest);

void attention_decode(const AttentionDecode& a);

}  // namespace fastlm
