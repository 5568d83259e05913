// The small kernels of a decode step: additions, copies of rows, positions, appending to a cache.
#include <array>
#include <string>

#include "bindings.h"
#include "fastlm/elementwise.h"
#include "fastlm/kv_append.h"

namespace fastlm::elementwise_binding {
namespace {

using Sizes = std::array<int64_t, 4>;

void check(bool holds, const char* message) {
  if (!holds) throw py::value_error(message);
}

// `count` elements of an array of `size`, by an index or in order.
void check_index(const char* kernel, address index, int64_t count, int64_t size) {
  const int64_t* at = pointer<const int64_t>(index);
  bool fits = count >= 0 && (at != nullptr || count <= size);
  for (int64_t i = 0; fits && at != nullptr && i < count; ++i) fits = at[i] >= 0 && at[i] < size;
  if (!fits) throw py::index_error(std::string(kernel) + ": an index is not in [0, " + std::to_string(size) + ")");
}

void copy_strides(int64_t (&to)[3], const Sizes& from, int64_t dim) {
  check(dim <= 1 || from[3] == 1, "kv_append: a last stride is not 1");
  for (int i = 0; i < 3; ++i) to[i] = from[i];
}

void append(const Sizes& shape, address key, const Sizes& key_stride, address value, const Sizes& value_stride,
            const Sizes& cache_shape, int type, address keys, const Sizes& keys_stride, address values,
            const Sizes& values_stride, address starts, address rows, int threads) {
  KvAppend a = {};
  a.batch = shape[0];
  a.heads = shape[1];
  a.tokens = shape[2];
  a.dim = shape[3];
  check(a.heads == cache_shape[1] && cache_shape[3] == kv_width(a.dim, kv_type(type)),
        "kv_append: the new keys do not fit the cache");
  a.key = pointer<const float>(key);
  copy_strides(a.key_stride, key_stride, a.dim);
  a.value = pointer<const float>(value);
  copy_strides(a.value_stride, value_stride, a.dim);
  a.type = kv_type(type);
  a.keys = pointer<void>(keys);
  copy_strides(a.keys_stride, keys_stride, a.dim);
  a.values = pointer<void>(values);
  copy_strides(a.values_stride, values_stride, a.dim);
  a.starts = pointer<const int64_t>(starts);
  a.rows = pointer<const int64_t>(rows);
  a.threads = threads;
  for (int64_t b = 0; b < a.batch; ++b) {
    check(a.starts[b] >= 0 && a.starts[b] + a.tokens <= cache_shape[2], "kv_append: beyond the cache's positions");
    const int64_t row = a.rows != nullptr ? a.rows[b] : b;
    check(row >= 0 && row < cache_shape[0], "kv_append: a row the cache does not have");
  }
  launch(&kv_append, a);
}

}  // namespace

void define(py::module_& m) {
  m.def("kv_append", &append);
  m.def("add", [](address a, address b, address output, int64_t count, int threads) {
    check(count >= 0 && threads >= 1, "add: count or threads out of range");
    launch(&add, {pointer<const float>(a), pointer<const float>(b), pointer<float>(output), count, threads});
  });
  m.def("convert", [](address input, address output, int64_t count, bool to_bfloats, int threads) {
    check(count >= 0 && threads >= 1, "convert: count or threads out of range");
    launch(&convert, {pointer<const void>(input), pointer<void>(output), count, to_bfloats, threads});
  });
  m.def("copy_rows", [](address source, int64_t source_rows, address source_index, address target,
                        int64_t target_rows, address target_index, int64_t rows, int64_t row_bytes) {
    check(row_bytes >= 0, "copy_rows: a negative size");
    check_index("copy_rows", source_index, rows, source_rows);
    check_index("copy_rows", target_index, rows, target_rows);
    launch(&copy_rows, {pointer<const void>(source), pointer<const int64_t>(source_index), pointer<void>(target),
                        pointer<const int64_t>(target_index), rows, row_bytes, 1});
  });
  m.def("offset", [](address source, int64_t source_count, address source_index, int64_t amount, address target,
                     int64_t target_count, address target_index, int64_t count) {
    check_index("offset", source_index, count, source_count);
    check_index("offset", target_index, count, target_count);
    launch(&offset, {pointer<const int64_t>(source), pointer<const int64_t>(source_index), amount,
                     pointer<int64_t>(target), pointer<const int64_t>(target_index), count, 1});
  });
}

}  // namespace fastlm::elementwise_binding
