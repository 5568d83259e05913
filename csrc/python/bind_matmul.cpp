#include "bindings.h"
#include "fastlm/matmul.h"

namespace fastlm {

void bind_matmul(py::module_& m) {
  m.def("matmul_tiles", &matmul_tiles);
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
}

}  // namespace fastlm
