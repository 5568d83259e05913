// Attention of many queries to many keys, forward and backward.
#pragma once

#include <cstdint>

namespace fastlm {

enum class AttentionMask : int32_t { kNone, kBool, kAdditive };

// Query head h reads key/value head h / (heads / kv_heads). Query i stands at position p = i + keys - queries. It sees
// key j where j < keys, p - window < j, with `causal` j <= p, and where a boolean mask is true. Scores are
// scale * q.k, then softcap * tanh(score / softcap), then + slope * (j - p), then + an additive mask. A query that
// sees no key, or only scores of -inf, gives 0.
//
// Strides count elements; the last dimension of queries, keys, values, outputs and their gradients is contiguous.
struct Attention {
  int64_t batch, heads, kv_heads, queries, keys, dim, value_dim;  // all positive; kv_heads divides heads
  const float* query;                                             // [batch, heads, queries, dim]
  int64_t query_stride[3];
  const float* key;  // [batch, kv_heads, keys, dim]
  int64_t key_stride[3];
  const float* value;  // [batch, kv_heads, keys, value_dim]
  int64_t value_stride[3];
  AttentionMask mask_kind;
  const void* mask;        // bytes of 0 or 1, or floats: [batch, heads, queries, keys]
  int64_t mask_stride[4];  // 0 where it is broadcast
  const float* slopes;     // [heads], or [batch, heads] with slopes_stride = heads; null: none
  int64_t slopes_stride;   // 0 or heads
  float scale;
  float softcap;   // 0: none
  int64_t window;  // at least 1; INT64_MAX: none
  bool causal;
  float* output;  // [batch, heads, queries, value_dim]; overlaps no input
  int64_t output_stride[3];
  float* lse;      // [batch, heads, queries], contiguous: log of the sum of exp(score), -inf where none is seen; or null
  // Queries, keys, values, outputs and their gradients are bfloat16 behind these pointers; the arithmetic is float's, and
  // a result is rounded once. Without mask and slopes.
  bool bfloats;
  float* scratch;  // attention_scratch(...) floats, 64-byte aligned, for the time of the call
  int threads;     // at most. A query's result depends on neither it, nor the other queries, nor the batch
};

int64_t attention_scratch(const Attention& a);
void attention(const Attention& a);

// Gradients of the above; they overlap nothing. The result does not depend on `threads`.
struct AttentionBackward {
  Attention a;               // output and lse as the forward gave them; scratch: attention_backward_scratch(...) floats
  const float* grad_output;  // [batch, heads, queries, value_dim]
  int64_t grad_output_stride[3];
  float* grad_query;  // [batch, heads, queries, dim]
  int64_t grad_query_stride[3];
  float* grad_key;  // [batch, kv_heads, keys, dim]
  int64_t grad_key_stride[3];
  float* grad_value;  // [batch, kv_heads, keys, value_dim]
  int64_t grad_value_stride[3];
  int threads;
};

int64_t attention_backward_scratch(const AttentionBackward& a);
void attention_backward(const AttentionBackward& a);

}  // namespace fastlm
