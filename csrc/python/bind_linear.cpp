#include "fastlm/linear.h"

#include <string>
#include <tuple>
#include <vector>

#include "bindings.h"
#include "fastlm/isa.h"

namespace fastlm::linear_binding {
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

void define(py::module_& m) {
  using Weight = std::tuple<address, address, address, int64_t, int>;  // weight, bias, output, outputs, kind
  m.def(
      "linear",
      [](address input, const std::vector<Weight>& weights, int rounding, int64_t rows, int64_t columns, int threads) {
        if (weights.empty() || weights.size() > kMostWeights)
          throw py::value_error(std::to_string(weights.size()) + " weights, expected 1 to 4");
        if (rounding < 0 || rounding > static_cast<int>(Rounding::kBits15))
          throw py::value_error("rounding is " + std::to_string(rounding));
        LinearArgs args{};
        for (const auto& [weight, bias, output, outputs, kind] : weights) {
          checked_sizes(rows, outputs, threads);
          args.weights[args.count++] = {pointer<const void>(weight), pointer<const float>(bias), pointer<float>(output),
                                        outputs, checked_kind(kind, columns)};
        }
        args.input = pointer<const float>(input);
        args.rows = rows;
        args.columns = columns;
        args.rounding = static_cast<Rounding>(rounding);
        args.threads = threads;
        if (args.rounding != Rounding::kNone)
          args.scratch = static_cast<InputBlock*>(scratch(linear_scratch(rows, columns) * sizeof(InputBlock)));
        launch(&linear, args);
      },
      py::arg("input"), py::arg("weights"), py::arg("rounding"), py::arg("rows"), py::arg("columns"),
      py::arg("threads"));
  m.def(
      "interleaved_bytes",
      [](int64_t outputs, int64_t columns, int kind) {
        return interleaved_bytes(checked_kind(kind, columns), outputs, columns, simd_lanes());
      },
      py::arg("outputs"), py::arg("columns"), py::arg("kind"));
  m.def(
      "interleave",
      [](address weight, address packed, int64_t outputs, int64_t columns, int kind, int threads) {
        checked_sizes(0, outputs, threads);
        const Interleave args{pointer<const void>(weight), pointer<uint8_t>(packed),
                              outputs, columns, checked_kind(kind, columns), threads};
        if (!is_quantized(args.kind)) throw py::value_error("interleave: kind is " + std::to_string(kind));
        py::gil_scoped_release release;
        interleave(args);  // once, and never a step of a program
      },
      py::arg("weight"), py::arg("packed"), py::arg("outputs"), py::arg("columns"), py::arg("kind"),
      py::arg("threads"));
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

}  // namespace fastlm::linear_binding
