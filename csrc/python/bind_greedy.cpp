#include "fastlm/greedy.h"

#include <string>

#include "bindings.h"

namespace fastlm::greedy_binding {

void define(py::module_& m) {
  m.def(
      "greedy",
      [](address input, address weight, address bias, int kind, address coarse, address slack, address basis,
         address inverses, float off, float floor, float most, int64_t rows, int64_t columns, int64_t outputs,
         address tokens, address counts, address bounds, int threads) {
        const WeightKind of = static_cast<WeightKind>(kind);
        if (kind < 0 || kind >= kWeightKinds || of == WeightKind::kQ4_0 || of == WeightKind::kQ4_1)
          throw py::value_error("greedy: kind is " + std::to_string(kind));
        if (rows < 0 || outputs < 1 || columns < 0 || columns % kBlock != 0 || threads < 1)
          throw py::value_error("greedy: rows, outputs, columns or threads out of range");
        Greedy args{};
        args.input = pointer<const float>(input);
        args.weight = {pointer<const void>(weight), pointer<const float>(bias), nullptr, outputs, of};
        args.screen = {pointer<const void>(coarse),    pointer<const uint16_t>(slack), pointer<const float>(basis),
                       pointer<const float>(inverses), off, floor, most};
        args.rows = rows;
        args.columns = columns;
        args.tokens = pointer<int64_t>(tokens);
        args.counts = pointer<int64_t>(counts);
        args.bounds = pointer<float>(bounds);
        args.threads = threads;
        args.scratch = scratch(greedy_scratch(args));
        return launch(&greedy, args);
      },
      py::arg("input"), py::arg("weight"), py::arg("bias"), py::arg("kind"), py::arg("coarse"), py::arg("slack"),
      py::arg("basis"), py::arg("inverses"), py::arg("off"), py::arg("floor"), py::arg("most"), py::arg("rows"),
      py::arg("columns"), py::arg("outputs"), py::arg("tokens"), py::arg("counts"), py::arg("bounds"),
      py::arg("threads"));
  m.def(
      "coarsen",
      [](address rows, address blocks, int64_t count, int64_t columns, int64_t stride, int threads) {
        if (count < 0 || columns < 0 || columns % kBlock != 0 || threads < 1)
          throw py::value_error("coarsen: count, columns or threads out of range");
        const Coarsen args{pointer<float>(rows), pointer<uint8_t>(blocks), count, columns, stride, threads};
        py::gil_scoped_release release;
        coarsen(args);  // once, and never a step of a program
      },
      py::arg("rows"), py::arg("blocks"), py::arg("count"), py::arg("columns"), py::arg("stride"),
      py::arg("threads"));
}

}  // namespace fastlm::greedy_binding
