// One chunk of keys and values for up to four queries, in float arithmetic: scores, their exponentials, and the values'
// weighted sum. What the unit for tiles does of it is in attention_decode_tiles.h.
#pragma once

#include "attention_decode_tiles.h"
#include "reduce.h"
#include "simd_math.h"

namespace fastlm {
namespace FASTLM_ISA {

static constexpr int kWide = 256;  // keys that a chunk can have
static constexpr int kMaxDim = kAttentionDecodeMaxDim;
static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// The keys [low, high) that one query sees.
struct Visible {
  int64_t low, high;
};

// kLanes features of a key or value as floats, and the first n of them.
FASTLM_INLINE vf widen(const float* p) { return load(p); }
FASTLM_INLINE vf widen(const uint16_t* p) { return load_bfloats(p); }
FASTLM_INLINE vf widen(const int8_t* p) { return load_bytes(p); }
template <class T>
FASTLM_INLINE vf widen_partial(const T* p, int n) {
  T lanes[kLanes] = {};
  for (int i = 0; i < n; ++i) lanes[i] = p[i];
  return widen(lanes);
}

// Whether the d-th of a row's numbers is the first that 64 bytes hold.
template <class T>
FASTLM_INLINE bool begins_line(int d) {
  return d * static_cast<int>(sizeof(T)) % 64 == 0;
}

// sums[q][l]: vectors whose lanes add up to the dot product of query q with key l. As many keys at a time as leave the
// sums in registers; how many queries or keys go together does not show in the numbers.
template <int Q, class T>
FASTLM_INLINE void dots(const float* const* queries, const T* const* keys, int64_t stride, int dim,
                        vf (*sums)[kLanes]) {
  constexpr int kKeys = Q == 1 ? kLanes : Q < 4 ? kLanes / 2 : kLanes / 4;
  for (int first = 0; first < kLanes; first += kKeys) {
    vf s[Q][kKeys];
    for (int i = 0; i < Q; ++i)
      for (int l = 0; l < kKeys; ++l) s[i][l] = vf{};
    for (int d = 0; d + kLanes <= dim; d += kLanes) {
      vf q[Q];
      for (int i = 0; i < Q; ++i) q[i] = load(queries[i] + d);
      for (int l = 0; l < kKeys; ++l) {
        if (begins_line<T>(d)) __builtin_prefetch(keys[first + l] + d + kKeysAhead * stride);
        const vf k = widen(keys[first + l] + d);
        for (int i = 0; i < Q; ++i) s[i][l] += q[i] * k;
      }
    }
    for (int i = 0; i < Q; ++i)
      for (int l = 0; l < kKeys; ++l) sums[i][first + l] = s[i][l];
  }
  const int rest = dim % kLanes;
  if (rest == 0) return;
  for (int l = 0; l < kLanes; ++l) {
    const vf k = widen_partial(keys[l] + dim - rest, rest);
    for (int i = 0; i < Q; ++i) sums[i][l] += load(queries[i] + dim - rest) * k;  // padded with zeros
  }
}

// What `deal` has made, as it was.
template <int... I>
FASTLM_INLINE void join(vf& x, vf& y, std::integer_sequence<int, I...>) {
  const vf low = __builtin_shufflevector(x, y, (I / 2 + I % 2 * kLanes)...);
  const vf high = __builtin_shufflevector(x, y, (I / 2 + I % 2 * kLanes + kLanes / 2)...);
  x = low, y = high;
}

// sums[q][d] += weights[q][j] * values[j][d] for the rows [from, to), N vectors from d on. Of bfloat16, two vectors are
// the even and the odd numbers, which a shift and a mask make floats.
template <int Q, int N, class T>
FASTLM_INLINE void add_weighted(float* const* sums, const float* const* weights, Rows<T> values, int64_t from,
                                int64_t to, int d) {
  constexpr bool pairs = sizeof(T) == 2 && N % 2 == 0;
  constexpr auto lanes = std::make_integer_sequence<int, kLanes>();
  vf s[Q][N];
  for (int q = 0; q < Q; ++q) {
    for (int i = 0; i < N; ++i) s[q][i] = load(sums[q] + d + i * kLanes);
    for (int i = 0; pairs && i < N; i += 2) deal(s[q][i], s[q][i + 1], lanes);
  }
  for (int64_t j = from; j < to; ++j) {
    const T* row = values.row(j) + d;
    vf v[N];
    if (pairs)
      for (int i = 0; i < N; i += 2) {
        const vu words = load_as<vu>(row + i * kLanes);
        v[i] = (vf)(words << 16);
        v[i + 1] = (vf)(words & 0xffff0000);
      }
    else
      for (int i = 0; i < N; ++i) v[i] = widen(row + i * kLanes);
    for (int i = 0; i < N; ++i)
      if (begins_line<T>(i * kLanes)) __builtin_prefetch(row + i * kLanes + kValuesAhead * values.stride);
    for (int q = 0; q < Q; ++q) {
      const vf w = broadcast(weights[q][j]);
      for (int i = 0; i < N; ++i) s[q][i] += w * v[i];
    }
  }
  for (int q = 0; q < Q; ++q) {
    for (int i = 0; pairs && i < N; i += 2) join(s[q][i], s[q][i + 1], lanes);
    for (int i = 0; i < N; ++i) store(sums[q] + d + i * kLanes, s[q][i]);
  }
}
template <int Q, class T>
static void add_values(float* const* sums, const float* const* weights, Rows<T> values, int64_t from, int64_t to,
                       int dim) {
  int d = 0;
  for (; d + 4 * kLanes <= dim; d += 4 * kLanes) add_weighted<Q, 4>(sums, weights, values, from, to, d);
  for (; d + kLanes <= dim; d += kLanes) add_weighted<Q, 1>(sums, weights, values, from, to, d);
  if (d == dim) return;
  for (int q = 0; q < Q; ++q) {
    vf s = load(sums[q] + d);
    for (int64_t j = from; j < to; ++j) s += broadcast(weights[q][j]) * widen_partial(values.row(j) + d, dim - d);
    store(sums[q] + d, s);
  }
}

struct Query {
  const float* vector;  // scaled, padded with zeros
  int64_t position;
  Visible keys;  // within the chunk
  float slope;
};

#if defined(__AVX512F__)
FASTLM_INLINE vf larger(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
// To the bit exp(x), for x <= 0 or NaN.
FASTLM_INLINE vf weight_of(vf x) {
  const ExpParts e = exp_parts(larger(broadcast(-104.0f), x));
  return (vf)_mm512_scalef_ps((__m512)(e.expm1_r + 1.0f), (__m512)to_float(e.n));
}
#else
FASTLM_INLINE vf larger(vf a, vf b) { return max(a, b); }
FASTLM_INLINE vf weight_of(vf x) { return exp(x); }
#endif

// Turns the products of Q queries and their keys in the chunk, scores[q][j - base], into weights exp(score - largest),
// which for integers have the values' scales in them; 0 beside the keys that a query sees, to multiples of kLanes.
// Leaves the largest and the sum of exponentials in the partials. Step by step for all queries, which depend on nothing
// of each other.
template <int Q, class T>
static void softmax(const AttentionDecode& a, const Query* queries, int64_t base, const float* key_scales,
                    const float* value_scales, float (*scores)[kWide], float* const* partials) {
  int64_t begin[Q], end[Q];
  vf largest[Q], sums[Q];
  for (int q = 0; q < Q; ++q) {
    const int64_t low = queries[q].keys.low - base, high = queries[q].keys.high - base;
    begin[q] = low / kLanes * kLanes;
    end[q] = low < high ? high : begin[q];
    largest[q] = broadcast(-__builtin_inff());
    sums[q] = vf{};
    if (low >= high) continue;
    if (sizeof(T) == 1 || a.softcap > 0 || a.slopes != nullptr) {
      vf iota;
      for (int l = 0; l < kLanes; ++l) iota[l] = static_cast<float>(l);
      for (int64_t j = begin[q]; j < high; j += kLanes) {
        vf s = load(scores[q] + j);
        if (sizeof(T) == 1) s = s * load(key_scales + j);
        if (a.softcap > 0) s = tanh(s / a.softcap) * a.softcap;
        if (a.slopes != nullptr) s += (iota + static_cast<float>(base + j - queries[q].position)) * queries[q].slope;
        store(scores[q] + j, s);
      }
    }
    for (int64_t j = begin[q]; j < low; ++j) scores[q][j] = -__builtin_inff();
    for (int64_t j = high; j % kLanes != 0; ++j) scores[q][j] = -__builtin_inff();
    for (int64_t j = begin[q]; j < high; j += kLanes) largest[q] = larger(largest[q], load(scores[q] + j));
  }
  for (int q = 0; q < Q; ++q) {
    const float top = partials[q][a.dim] = reduce_max(largest[q]);
    // Where every score is -inf, subtracting it would give NaN.
    const float shift = top == -__builtin_inff() ? 0.0f : top;
    for (int64_t j = begin[q]; j < end[q]; j += kLanes) {
      vf weight = weight_of(load(scores[q] + j) - shift);
      sums[q] += weight;
      // A weight of 0 stays so, whatever the scale of a key that its query may not see.
      if (sizeof(T) == 1) weight = select(weight == 0.0f, weight, weight * load(value_scales + j));
      store(scores[q] + j, weight);
    }
  }
  for (int q = 0; q < Q; ++q) partials[q][a.dim + 1] = reduce_add(sums[q]);
}

// The scores of Q queries against the chunk's keys [low, high), integers without the keys' scales.
template <int Q, class T>
static void score(const Query* queries, Rows<T> keys, int64_t low, int64_t high, int dim, float (*scores)[kWide]) {
  const float* vectors[Q];
  for (int q = 0; q < Q; ++q) vectors[q] = queries[q].vector;
  for (int64_t block = low / kLanes * kLanes; block < high; block += kLanes) {
    const T* key[kLanes];
    for (int l = 0; l < kLanes; ++l) key[l] = keys.row(larger(low, smaller(block + l, high - 1)));
    vf sums[Q][kLanes];
    dots<Q>(vectors, key, keys.stride, dim, sums);
    for (int q = 0; q < Q; ++q) store(&scores[q][block], reduce_each(sums[q]));
  }
}

}  // namespace FASTLM_ISA
}  // namespace fastlm
