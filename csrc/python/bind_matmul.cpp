#include "bindings.h"
#include "fastlm/matmul.h"

namespace fastlm::matmul_binding {

void define(py::module_& m) {
  m.def("matmul_tiles", &matmul_tiles);
  m.def("matmul_allow_tiles", &matmul_allow_tiles, py::arg("allowed"));
  m.def(
      "matmul",
      [](address a, int64_t a_stride, bool a_transposed, bool a_bfloats, address b, int64_t b_stride, bool b_transposed,
         bool b_bfloats, address bias, address c, bool c_bfloats, int64_t rows, int64_t columns, int64_t depth,
         int threads) {
        refuse_recording("matmul");
        if (rows < 0 || columns < 0 || depth < 0 || threads < 1 || a_stride < (a_transposed ? rows : depth) ||
            b_stride < (b_transposed ? depth : columns))
          throw py::value_error("matmul: a size or stride out of range");
        if (rows > 0 && columns > 0 && (c == 0 || (depth > 0 && (a == 0 || b == 0))))
          throw py::value_error("matmul: a matrix has no address");
        Matmul x = {{pointer<const void>(a), a_stride, a_transposed, a_bfloats},
                    {pointer<const void>(b), b_stride, b_transposed, b_bfloats},
                    pointer<const float>(bias),
                    pointer<void>(c),
                    c_bfloats,
                    rows,
                    columns,
                    depth,
                    nullptr,
                    threads};
        x.scratch = scratch(matmul_scratch(x));
        launch(&matmul, x);
      },
      py::arg("a"), py::arg("a_stride"), py::arg("a_transposed"), py::arg("a_bfloats"), py::arg("b"),
      py::arg("b_stride"), py::arg("b_transposed"), py::arg("b_bfloats"), py::arg("bias"), py::arg("c"),
      py::arg("c_bfloats"), py::arg("rows"), py::arg("columns"), py::arg("depth"), py::arg("threads"));
  m.def(
      "float_matmul",
      [](address a, int64_t a_stride, bool turn_a, address b, int64_t b_stride, bool turn_b, int b_numbers,
         address bias, address c, int64_t c_stride, bool add, int64_t rows, int64_t columns, int64_t depth,
         int threads) {
        refuse_recording("float_matmul");
        if (rows < 0 || columns < 0 || depth < 0 || threads < 1 || a_stride < (turn_a ? rows : depth) ||
            b_stride < (turn_b ? depth : columns) || c_stride < columns)
          throw py::value_error("float_matmul: a size or stride out of range");
        if (b_numbers < 0 || b_numbers > 2) throw py::value_error("float_matmul: b of an unknown type");
        if (rows > 0 && columns > 0 && (c == 0 || (depth > 0 && (a == 0 || b == 0))))
          throw py::value_error("float_matmul: a matrix has no address");
        FloatMatmul x = {pointer<const float>(a),
                         a_stride,
                         turn_a,
                         pointer<const void>(b),
                         b_stride,
                         turn_b,
                         static_cast<Numbers>(b_numbers),
                         pointer<const float>(bias),
                         pointer<float>(c),
                         c_stride,
                         add,
                         rows,
                         columns,
                         depth,
                         nullptr,
                         threads};
        x.scratch = scratch(float_matmul_scratch(x));
        launch(&float_matmul, x);
      },
      py::arg("a"), py::arg("a_stride"), py::arg("turn_a"), py::arg("b"), py::arg("b_stride"), py::arg("turn_b"),
      py::arg("b_numbers"), py::arg("bias"), py::arg("c"), py::arg("c_stride"), py::arg("add"), py::arg("rows"),
      py::arg("columns"), py::arg("depth"), py::arg("threads"));
}

}  // namespace fastlm::matmul_binding
