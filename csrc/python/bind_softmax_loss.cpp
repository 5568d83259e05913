#include <string>

#include "bindings.h"
#include "fastlm/softmax_loss.h"

namespace fastlm::softmax_loss_binding {

void define(py::module_& m) {
  m.def(
      "softmax_loss",
      [](address logits, address bias, address target, address factors, address losses, int64_t rows, int64_t columns,
         int64_t ignore_index, float smoothing, bool bfloats, int threads) {
        refuse_recording("softmax_loss");
        if (rows < 0 || columns < 1 || threads < 1) throw py::value_error("softmax_loss: a size out of range");
        const int64_t* at = pointer<const int64_t>(target);
        for (int64_t i = 0; i < rows; ++i)
          if (at[i] != ignore_index && (at[i] < 0 || at[i] >= columns))
            throw py::index_error("softmax_loss: target " + std::to_string(at[i]) + " is not in [0, " +
                                  std::to_string(columns) + ")");
        SoftmaxLoss a = {pointer<void>(logits), pointer<const float>(bias), at, pointer<const float>(factors),
                         pointer<float>(losses), nullptr, rows, columns, ignore_index, smoothing, bfloats, threads};
        a.scratch = static_cast<float*>(scratch(softmax_loss_scratch(a) * sizeof(float)));
        launch(&softmax_loss, a);
      },
      py::arg("logits"), py::arg("bias"), py::arg("target"), py::arg("factors"), py::arg("losses"), py::arg("rows"),
      py::arg("columns"), py::arg("ignore_index"), py::arg("smoothing"), py::arg("bfloats"), py::arg("threads"));
}

}  // namespace fastlm::softmax_loss_binding
