#include "fastlm/kv_append.h"

#include <cstring>

#include "simd.h"
#include "threads.h"

namespace fastlm {
namespace FASTLM_ISA {

namespace {

void write_bfloats(const float* from, int64_t dim, uint16_t* to) {
  for (int64_t d = 0; d < dim; ++d) {
    const uint32_t bits = bits_of(from[d]);
    const bool nan = (bits & 0x7fffffff) > 0x7f800000;  // rounding could make it an infinity
    to[d] = static_cast<uint16_t>((nan ? bits | 0x400000 : bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
}

void write_integers(const float* from, int64_t dim, int8_t* to) {
  float largest = 0.0f, zero = 0.0f;
  for (int64_t d = 0; d < dim; ++d) {
    const float magnitude = float_of(bits_of(from[d]) & 0x7fffffff);
    largest = magnitude > largest ? magnitude : largest;
    zero += from[d] * 0.0f;  // NaN if one is not finite
  }
  const bool tiny = largest < kKvSmallest, finite = zero == 0.0f;
  const float scale = !finite ? zero : tiny ? 0.0f : largest / 127.0f;
  const float inverse = !finite || tiny ? 0.0f : 127.0f / largest;
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, to nearest even
  for (int64_t d = 0; d < dim; ++d) to[d] = finite ? static_cast<int8_t>(from[d] * inverse + magic - magic) : 0;
  std::memcpy(to + dim, &scale, sizeof(scale));
}

void write(const KvAppend& a, const float* from, void* cache, int64_t at) {
  switch (a.type) {
    case KvType::kFloat: std::memcpy(static_cast<float*>(cache) + at, from, a.dim * sizeof(float)); break;
    case KvType::kBfloat16: write_bfloats(from, a.dim, static_cast<uint16_t*>(cache) + at); break;
    case KvType::kInt8: write_integers(from, a.dim, static_cast<int8_t*>(cache) + at); break;
  }
}

}  // namespace

void kv_append(const KvAppend& a) {
  parallel(1, [&](int, int, Barrier&) {
    for (int64_t b = 0; b < a.batch; ++b) {
      const int64_t row = a.rows ? a.rows[b] : b;
      for (int64_t h = 0; h < a.heads; ++h)
        for (int64_t t = 0; t < a.tokens; ++t) {
          const int64_t position = a.starts[b] + t;
          write(a, a.key + b * a.key_stride[0] + h * a.key_stride[1] + t * a.key_stride[2], a.keys,
                row * a.keys_stride[0] + h * a.keys_stride[1] + position * a.keys_stride[2]);
          write(a, a.value + b * a.value_stride[0] + h * a.value_stride[1] + t * a.value_stride[2], a.values,
                row * a.values_stride[0] + h * a.values_stride[1] + position * a.values_stride[2]);
        }
    }
  });
}

}  // namespace FASTLM_ISA
}  // namespace fastlm
