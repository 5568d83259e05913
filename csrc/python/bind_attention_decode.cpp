// fastlm.ops.attention_decode on the CPU.
#include <algorithm>
#include <array>
#include <limits>
#include <string>

#include "bindings.h"
#include "fastlm/attention_decode.h"

namespace fastlm {
namespace {

using Sizes = std::array<int64_t, 4>;

void copy_strides(int64_t (&to)[3], const Sizes& from, const char* name) {
  if (from[3] != 1) throw py::value_error(std::string("attention_decode: ") + name + " has a last stride other than 1");
  for (int i = 0; i < 3; ++i) to[i] = from[i];
}

// All of a call but its addresses: what shapes, strides and options say, checked once.
AttentionDecode plan(const Sizes& query_shape, const Sizes& query_stride, int type, const Sizes& key_shape,
                     const Sizes& key_stride, const Sizes& value_stride, int64_t slopes_stride, float scale,
                     float softcap, int64_t window) {
  AttentionDecode a = {};
  a.batch = query_shape[0];
  a.heads = query_shape[1];
  a.tokens = query_shape[2];
  a.dim = query_shape[3];
  a.cache_rows = key_shape[0];
  a.kv_heads = key_shape[1];
  a.positions = key_shape[2];
  if (a.dim < 1 || a.dim > kAttentionDecodeMaxDim || key_shape[3] != kv_width(a.dim, kv_type(type)) || a.kv_heads < 1 ||
      a.heads % a.kv_heads != 0)
    throw py::value_error("attention_decode: the shapes of query and key_cache do not fit");
  a.type = kv_type(type);
  copy_strides(a.query_stride, query_stride, "query");
  copy_strides(a.key_stride, key_stride, "key_cache");
  copy_strides(a.value_stride, value_stride, "value_cache");
  a.slopes_stride = slopes_stride;
  a.scale = scale;
  a.softcap = softcap;
  a.window = window > 0 ? window : std::numeric_limits<int64_t>::max();
  return a;
}

void run(AttentionDecode a, address query, address key, address value, address lengths, address rows, address slopes,
         address output, int threads) {
  a.query = pointer<const float>(query);
  a.key = pointer<const void>(key);
  a.value = pointer<const void>(value);
  a.lengths = pointer<const int64_t>(lengths);
  a.rows = pointer<const int64_t>(rows);
  a.slopes = pointer<const float>(slopes);
  a.output = pointer<float>(output);
  a.threads = threads;
  if (const int64_t bad = attention_decode_check(a)) {
    const int64_t b = (bad > 0 ? bad : -bad) - 1;
    const std::string at = "[" + std::to_string(b) + "] is ";
    if (bad > 0)
      throw py::value_error("attention_decode: lengths" + at + std::to_string(a.lengths[b]) + ", expected from " +
                            std::to_string(a.tokens) + " (new tokens, counted in) to " + std::to_string(a.positions) +
                            " (positions in the cache)");
    throw py::value_error("attention_decode: rows" + at + std::to_string(a.rows != nullptr ? a.rows[b] : b) +
                          ", expected 0 to " + std::to_string(a.cache_rows - 1));
  }
  // A recorded call meets longer sequences when it is replayed.
  int64_t longest = recording() != nullptr ? a.positions : 0;
  for (int64_t b = 0; b < a.batch; ++b) longest = std::max(longest, a.lengths[b]);
  a.scratch = static_cast<float*>(scratch(attention_decode_scratch(a, longest) * sizeof(float)));
  launch(&attention_decode, a);
}

}  // namespace

void bind_attention_decode(py::module_& m) {
  py::class_<AttentionDecode>(m, "AttentionDecode", "A call of attention_decode without its addresses.")
      .def(py::init(&plan))
      .def("__call__", &run);
}

}  // namespace fastlm
