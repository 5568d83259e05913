// Attention of bfloat16 tensors: a key/value head at a time becomes floats in one thread's memory, small enough for its
// caches, and goes through the very blocks that float tensors do.
#pragma once

#include "attention_block.h"
#include "bfloat.h"

namespace fastlm {
namespace FASTLM_ISA {

// The heads that a key/value head serves, where tensors are bfloat16: copied to contiguous floats while they are worked
// on, and results back.
struct HeadMemory {
  const Attention* a;
  int64_t b, kv_head;

  int64_t group() const { return a->heads / a->kv_heads; }
  int64_t lse() const { return (b * a->heads + kv_head * group()) * a->queries; }
  // What is read and what is written goes through the same loops.
  static uint16_t* numbers(const void* tensor) { return static_cast<uint16_t*>(const_cast<void*>(tensor)); }
  // Calls f(row of the tensor, row of a copy [tokens][heads of the group][dim]) for each token and head.
  template <typename F>
  void each_query(const void* tensor, const int64_t* stride, float* copy, int64_t dim, const F& f) const {
    uint16_t* const first = numbers(tensor) + b * stride[0] + kv_head * group() * stride[1];
    for (int64_t t = 0; t < a->queries; ++t)
      for (int64_t h = 0; h < group(); ++h) f(first + t * stride[2] + h * stride[1], copy + (t * group() + h) * dim);
  }
  // The same for keys or values, whose copy is [keys][width].
  template <typename F>
  void each_key(const void* tensor, const int64_t* stride, float* copy, int64_t width, const F& f) const {
    uint16_t* const first = numbers(tensor) + b * stride[0] + kv_head * stride[1];
    for (int64_t j = 0; j < a->keys; ++j) f(first + j * stride[2], copy + j * width);
  }
  // The same attention of the copies alone: one sequence with one key/value head.
  Attention alone(const float* query, const float* key, const float* value, float* output, float* lse) const {
    Attention copy = *a;
    copy.batch = copy.kv_heads = 1;
    copy.heads = group();
    copy.query = query;
    copy.key = key;
    copy.value = value;
    copy.output = output;
    copy.lse = lse;
    for (int64_t* stride : {copy.query_stride, copy.output_stride}) {
      const int64_t dim = stride == copy.query_stride ? a->dim : a->value_dim;
      stride[0] = 0;
      stride[1] = dim;
      stride[2] = dim * group();
    }
    copy.key_stride[0] = copy.key_stride[1] = copy.value_stride[0] = copy.value_stride[1] = 0;
    copy.key_stride[2] = a->dim;
    copy.value_stride[2] = a->value_dim;
    return copy;
  }
};
// Calls f(head) for all heads of a tensor of bfloat16, each on one thread: with many sequences all heads of one, whose rows
// lie side by side. `next` is 0, shared by the threads.
template <typename F>
FASTLM_INLINE void each_head(const Attention& a, int threads, int64_t* next, const F& f) {
  const int64_t together = a.batch >= 4 * threads ? a.kv_heads : 1, heads = a.batch * a.kv_heads;
  for (int64_t first; (first = __atomic_fetch_add(next, together, __ATOMIC_RELAXED)) < heads;)
    for (int64_t i = first; i < first + together; ++i) f(HeadMemory{&a, i / a.kv_heads, i % a.kv_heads});
}

// One row of `dim` numbers from or to bfloat16. Fetches the row of the next head, which lies behind this one where a
// projection has them all.
struct Widen {
  int64_t dim;
  void operator()(const uint16_t* from, float* to) const {
    for (int64_t d = 0; d < dim; d += 32) __builtin_prefetch(from + dim + d);
    for (int64_t d = 0; d < dim; d += kLanes) At<false>::store(to, d, dim, At<true>::load(from, d, dim));
  }
};
struct Round {
  int64_t dim;
  void operator()(uint16_t* to, const float* from) const {
    for (int64_t d = 0; d < dim; d += kLanes) At<true>::store(to, d, dim, At<false>::load(from, d, dim));
  }
};

}  // namespace FASTLM_ISA
}  // namespace fastlm
