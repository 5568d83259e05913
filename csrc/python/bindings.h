// What every binding file needs: an address type, how to call a kernel, and the list of bind functions.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "fastlm/kv_append.h"
#include "fastlm/program.h"

namespace py = pybind11;

namespace fastlm {

using address = std::uintptr_t;  // tensor.data_ptr(); 0 stands for "not given"

template <typename T>
inline T* pointer(address a) {
  return reinterpret_cast<T*>(a);
}

// Calls a kernel without the GIL. While a program records, the call also becomes a step of it: everything that `args`
// points to then has to live as long as the program.
template <typename Args>
void launch(void (*kernel)(const Args&), const Args& args) {
  if (Program* const program = recording()) {
    if (args.threads > program->threads()) throw py::value_error("more threads than the program being recorded has");
    program->add([=] { return kernel(args), int64_t{-1}; });
  }
  py::gil_scoped_release release;
  kernel(args);
}
template <typename Args>
int64_t launch(int64_t (*kernel)(const Args&), const Args& args) {
  if (Program* const program = recording()) {
    if (args.threads > program->threads()) throw py::value_error("more threads than the program being recorded has");
    program->add([=] { return kernel(args); });
  }
  py::gil_scoped_release release;
  return kernel(args);
}

// Raised in Python as NotRecordable.
struct NotRecordable : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// For kernels whose arguments do not outlive the call.
inline void refuse_recording(const char* kernel) {
  if (recording() != nullptr) throw NotRecordable(std::string("the kernel ") + kernel + " can't be replayed");
}

// Memory for a kernel's scratch until the thread's next call of this function; while a program records, for as long as
// the program lives. Aligned to 64 bytes.
void* scratch(std::size_t bytes);

// How a cache holds keys and values, of its number in Python; and the elements of one key of `dim` features.
inline KvType kv_type(int number) {
  if (number < 0 || number > 2) throw py::value_error("a cache of unknown type");
  return static_cast<KvType>(number);
}
inline int64_t kv_width(int64_t dim, KvType type) { return type == KvType::kInt8 ? dim + 4 : dim; }

namespace activation_binding { void define(py::module_& m); }
namespace adamw_binding { void define(py::module_& m); }
namespace attention_binding { void define(py::module_& m); }
namespace attention_decode_binding { void define(py::module_& m); }
namespace elementwise_binding { void define(py::module_& m); }
namespace matmul_binding { void define(py::module_& m); }
namespace norm_binding { void define(py::module_& m); }
namespace greedy_binding { void define(py::module_& m); }
namespace linear_binding { void define(py::module_& m); }
namespace lstm_binding { void define(py::module_& m); }
void bind_program(py::module_& m);
namespace rotary_binding { void define(py::module_& m); }
namespace sample_binding { void define(py::module_& m); }
namespace softmax_loss_binding { void define(py::module_& m); }

}  // namespace fastlm
