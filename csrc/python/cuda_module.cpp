// The Python module fastlm._cuda: CUDA kernels on raw device addresses and a stream address. Knows no torch; links the
// CUDA runtime statically, so it loads (and reports no device) where there is no driver.
#include "bindings.h"

#include <stdexcept>

#include "fastlm/lstm_cell_cuda.h"

namespace fastlm {
namespace {

void lstm_cell(address gates, address bias, address c_prev, address h, address c, int64_t batch, int64_t hidden,
               address stream) {
  if (batch < 0 || hidden < 0) throw std::invalid_argument("lstm_cell: negative size");
  const LstmCellCuda args = {pointer<const float>(gates), pointer<const float>(bias), pointer<const float>(c_prev),
                             pointer<float>(h),           pointer<float>(c),          batch,
                             hidden};
  const char* error = lstm_cell_cuda(args, pointer<void>(stream));
  if (error != nullptr) throw std::runtime_error(std::string("lstm_cell: ") + error);
}

}  // namespace
}  // namespace fastlm

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "fastlm's CUDA kernels. Use fastlm.ops; this module takes raw device addresses and checks little.";
  m.def("device_count", &fastlm::cuda_device_count);
  m.def("lstm_cell", &fastlm::lstm_cell, py::arg("gates"), py::arg("bias"), py::arg("c_prev"), py::arg("h"),
        py::arg("c"), py::arg("batch"), py::arg("hidden"), py::arg("stream"), py::call_guard<py::gil_scoped_release>());
}
