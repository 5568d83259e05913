#include "fastlm/linear.h"

#include <string>

#include "bindings.h"

namespace fastlm {
namespace {

WeightKind checked_kind(int kind, int64_t columns) {
  if (kind < 0 || kind >= kWeightKinds) throw py::value_error("kind is " + std::to_string(kind));
  const WeightKind value = static_cast<WeightKind>(kind);
  if (columns < 0 || (is_quantized(value) && columns % kBlock != 0))
    throw py::value_error("columns is " + std::to_string(columns) + ", expected a multiple of 32");
  return value;
}

void checked_sizes(int64_t rows, int64_t outputs, int threads) {
  if (rows < 0 || outputs < 0 || threads < 1)
    throw py::value_error("rows, outputs, threads are " + std::to_string(rows) + ", " + std::to_string(outputs) +
                          ", " + std::to_string(threads));
}

}  // namespace

void bind_linear(py::module_& m) {
  m.def(
      "linear",
      [](address input, address weight, address bias, address output, bool integer, int64_t rows, int64_t outputs,
         int64_t columns, int kind, int threads) {
        checked_sizes(rows, outputs, threads);
        const WeightKind checked = checked_kind(kind, columns);
        if (integer && !is_quantized(checked)) throw py::value_error("integer products need a weight of integers");
        const int64_t blocks = integer ? rows * columns / kBlock : 0;
        LinearArgs args{pointer<const float>(input),
                        pointer<const void>(weight),
                        pointer<const float>(bias),
                        pointer<float>(output),
                        integer ? static_cast<InputBlock*>(scratch(blocks * sizeof(InputBlock))) : nullptr,
                        rows,
                        outputs,
                        columns,
                        checked,
                        threads};
        launch(&linear, args);
      },
      py::arg("input"), py::arg("weight"), py::arg("bias"), py::arg("output"), py::arg("integer"), py::arg("rows"),
      py::arg("outputs"), py::arg("columns"), py::arg("kind"), py::arg("threads"));
  m.def(
      "dequantize_rows",
      [](address weight, address ids, address output, int64_t first, int64_t rows, int64_t outputs, int64_t columns,
         int kind, int threads) {
        checked_sizes(rows, outputs, threads);
        if (ids == 0 && (first < 0 || first + rows > outputs))
          throw py::value_error("rows " + std::to_string(first) + " to " + std::to_string(first + rows) + " of " +
                                std::to_string(outputs));
        DequantizeArgs args{pointer<const void>(weight),
                            pointer<const int64_t>(ids),
                            pointer<float>(output),
                            first,
                            rows,
                            outputs,
                            columns,
                            checked_kind(kind, columns),
                            threads};
        return launch(&dequantize_rows, args);
      },
      py::arg("weight"), py::arg("ids"), py::arg("output"), py::arg("first"), py::arg("rows"), py::arg("outputs"),
      py::arg("columns"), py::arg("kind"), py::arg("threads"));
}

}  // namespace fastlm
