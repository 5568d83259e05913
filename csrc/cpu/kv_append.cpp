#include "fastlm/kv_append.h"

#include <cstring>

#include "simd.h"
#include "threads.h"

namespace fastlm {
namespace FASTLM_ISA {

namespace {

void write(const KvAppend& a, const float* from, void* cache, int64_t at) {
  if (!a.bfloats) {
    std::memcpy(static_cast<float*>(cache) + at, from, a.dim * sizeof(float));
    return;
  }
  uint16_t* to = static_cast<uint16_t*>(cache) + at;
  for (int64_t d = 0; d < a.dim; ++d) {
    const uint32_t bits = bits_of(from[d]);
    const bool nan = (bits & 0x7fffffff) > 0x7f800000;  // rounding could make it an infinity
    to[d] = static_cast<uint16_t>((nan ? bits | 0x400000 : bits + 0x7fff + (bits >> 16 & 1)) >> 16);
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
