#include <array>

#include "bindings.h"
#include "fastlm/rotary.h"

namespace fastlm::rotary_binding {
namespace {

using Sizes = std::array<int64_t, 4>;

void run(address input, const Sizes& shape, const Sizes& stride, address cos, address sin, int64_t half,
         int64_t table_stride, address starts, address output, bool interleaved, int threads) {
  for (int64_t size : shape)
    if (size < 0) throw py::value_error("rotary: input has a negative size");
  if (half < 0 || 2 * half > shape[3]) throw py::value_error("rotary: the tables are wider than the input");
  if (shape[3] > 1 && stride[3] != 1) throw py::value_error("rotary: input has a last stride other than 1");
  if (threads < 1) throw py::value_error("rotary: no threads");
  Rotary a = {};
  a.input = pointer<const float>(input);
  for (int i = 0; i < 3; ++i) a.input_stride[i] = stride[i];
  a.cos = pointer<const float>(cos);
  a.sin = pointer<const float>(sin);
  a.table_stride = table_stride;
  a.starts = pointer<const int64_t>(starts);
  a.output = pointer<float>(output);
  a.batch = shape[0];
  a.heads = shape[1];
  a.tokens = shape[2];
  a.dim = shape[3];
  a.half = half;
  a.interleaved = interleaved;
  a.threads = threads;
  launch(&rotary, a);
}

}  // namespace

void define(py::module_& m) { m.def("rotary", &run); }

}  // namespace fastlm::rotary_binding
