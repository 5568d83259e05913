#include "fastlm/kv_append.h"

#include <cstring>

#include "threads.h"

namespace fastlm {
namespace FASTLM_ISA {

void kv_append(const KvAppend& a) {
  const std::size_t bytes = a.dim * sizeof(float);
  parallel(1, [&](int, int, Barrier&) {
    for (int64_t b = 0; b < a.batch; ++b) {
      const int64_t row = a.rows ? a.rows[b] : b;
      for (int64_t h = 0; h < a.heads; ++h)
        for (int64_t t = 0; t < a.tokens; ++t) {
          const int64_t position = a.starts[b] + t;
          std::memcpy(a.keys + row * a.keys_stride[0] + h * a.keys_stride[1] + position * a.keys_stride[2],
                      a.key + b * a.key_stride[0] + h * a.key_stride[1] + t * a.key_stride[2], bytes);
          std::memcpy(a.values + row * a.values_stride[0] + h * a.values_stride[1] + position * a.values_stride[2],
                      a.value + b * a.value_stride[0] + h * a.value_stride[1] + t * a.value_stride[2], bytes);
        }
    }
  });
}

}  // namespace FASTLM_ISA
}  // namespace fastlm
