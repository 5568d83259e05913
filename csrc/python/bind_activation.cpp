#include <string>

#include "bindings.h"
#include "fastlm/activation.h"

namespace fastlm::activation_binding {
namespace {

ActivationFunction checked_function(int64_t count, int function, int threads) {
  if (count < 0 || threads < 1 || function < 0 || function > 1)
    throw py::value_error("count, function, threads are " + std::to_string(count) + ", " + std::to_string(function) +
                          ", " + std::to_string(threads));
  return static_cast<ActivationFunction>(function);
}

}  // namespace

void define(py::module_& m) {
  m.def(
      "activation",
      [](address input, address factor, address output, int64_t count, int function, bool bfloats, int threads) {
        launch(&activation, {pointer<const void>(input), pointer<const void>(factor), pointer<void>(output), count,
                             checked_function(count, function, threads), bfloats, threads});
      },
      py::arg("input"), py::arg("factor"), py::arg("output"), py::arg("count"), py::arg("function"),
      py::arg("bfloats"), py::arg("threads"));
  m.def(
      "activation_backward",
      [](address grad_output, address input, address factor, address grad_input, address grad_factor, int64_t count,
         int function, bool bfloats, int threads) {
        launch(&activation_backward,
               {pointer<const void>(grad_output), pointer<const void>(input), pointer<const void>(factor),
                pointer<void>(grad_input), pointer<void>(grad_factor), count,
                checked_function(count, function, threads), bfloats, threads});
      },
      py::arg("grad_output"), py::arg("input"), py::arg("factor"), py::arg("grad_input"), py::arg("grad_factor"),
      py::arg("count"), py::arg("function"), py::arg("bfloats"), py::arg("threads"));
}

}  // namespace fastlm::activation_binding
