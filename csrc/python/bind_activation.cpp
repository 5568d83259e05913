#include <string>

#include "bindings.h"
#include "fastlm/activation.h"

namespace fastlm {

void bind_activation(py::module_& m) {
  m.def(
      "activation",
      [](address input, address factor, address output, int64_t count, int function, int threads) {
        if (count < 0 || threads < 1 || function < 0 || function > 1)
          throw py::value_error("count, function, threads are " + std::to_string(count) + ", " +
                                std::to_string(function) + ", " + std::to_string(threads));
        Activation args{pointer<const float>(input),
                        pointer<const float>(factor),
                        pointer<float>(output),
                        count,
                        static_cast<ActivationFunction>(function),
                        threads};
        launch(&activation, args);
      },
      py::arg("input"), py::arg("factor"), py::arg("output"), py::arg("count"), py::arg("function"),
      py::arg("threads"));
}

}  // namespace fastlm
