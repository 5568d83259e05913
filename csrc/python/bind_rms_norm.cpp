#include <string>

#include "bindings.h"
#include "fastlm/rms_norm.h"

namespace fastlm {

void bind_rms_norm(py::module_& m) {
  m.def(
      "rms_norm",
      [](address input, address weight, address output, int64_t rows, int64_t dim, float eps, int threads) {
        if (rows < 0 || dim < 0 || threads < 1)
          throw py::value_error("rows, dim, threads are " + std::to_string(rows) + ", " + std::to_string(dim) + ", " +
                                std::to_string(threads));
        const RmsNorm args{
            pointer<const float>(input), pointer<const float>(weight), pointer<float>(output), rows, dim, eps, threads};
        launch(&rms_norm, args);
      },
      py::arg("input"), py::arg("weight"), py::arg("output"), py::arg("rows"), py::arg("dim"), py::arg("eps"),
      py::arg("threads"));
}

}  // namespace fastlm
