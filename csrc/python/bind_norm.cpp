#include <string>

#include "bindings.h"
#include "fastlm/norm.h"

namespace fastlm::norm_binding {
namespace {

void check_norm(int64_t rows, int64_t dim, int threads) {
  if (rows < 0 || dim < 0 || threads < 1)
    throw py::value_error("rows, dim, threads are " + std::to_string(rows) + ", " + std::to_string(dim) + ", " +
                          std::to_string(threads));
}

}  // namespace

void define(py::module_& m) {
  m.def(
      "norm",
      [](address input, address weight, address bias, address output, address statistics, int64_t rows, int64_t dim,
         float eps, bool centre, bool bfloats, int threads, address added, address sum, bool added_bfloats) {
        check_norm(rows, dim, threads);
        if (added != 0 && sum == 0) throw py::value_error("norm: `added` without a place for the sum");
        launch(&norm, {pointer<const float>(input), pointer<const float>(weight), pointer<const float>(bias),
                       pointer<void>(output), pointer<float>(statistics), rows, dim, eps, centre, bfloats, threads,
                       pointer<const void>(added), pointer<float>(sum), added_bfloats});
      },
      py::arg("input"), py::arg("weight"), py::arg("bias"), py::arg("output"), py::arg("statistics"), py::arg("rows"),
      py::arg("dim"), py::arg("eps"), py::arg("centre"), py::arg("bfloats"), py::arg("threads"), py::arg("added") = 0,
      py::arg("sum") = 0, py::arg("added_bfloats") = false);
  m.def(
      "norm_backward",
      [](address grad_output, address input, address weight, address statistics, address grad_input,
         address grad_weight, address grad_bias, int64_t rows, int64_t dim, bool centre, bool bfloats, int threads,
         address grad_sum) {
        check_norm(rows, dim, threads);
        NormBackward args{pointer<const void>(grad_output),
                          pointer<const float>(input),
                          pointer<const float>(weight),
                          pointer<const float>(statistics),
                          pointer<float>(grad_input),
                          pointer<float>(grad_weight),
                          pointer<float>(grad_bias),
                          nullptr,
                          rows,
                          dim,
                          centre,
                          bfloats,
                          threads,
                          pointer<const float>(grad_sum)};
        args.scratch = static_cast<float*>(scratch(norm_backward_scratch(args) * sizeof(float)));
        launch(&norm_backward, args);
      },
      py::arg("grad_output"), py::arg("input"), py::arg("weight"), py::arg("statistics"), py::arg("grad_input"),
      py::arg("grad_weight"), py::arg("grad_bias"), py::arg("rows"), py::arg("dim"), py::arg("centre"),
      py::arg("bfloats"), py::arg("threads"), py::arg("grad_sum") = 0);
}

}  // namespace fastlm::norm_binding
