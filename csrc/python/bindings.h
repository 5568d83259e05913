// What every binding file needs: an address type, and the list of bind functions.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>

namespace py = pybind11;

namespace fastlm {

using address = std::uintptr_t;  // tensor.data_ptr(); 0 stands for "not given"

template <typename T>
inline T* pointer(address a) {
  return reinterpret_cast<T*>(a);
}

void bind_activation(py::module_& m);
void bind_attention_decode(py::module_& m);
void bind_linear(py::module_& m);
void bind_lstm(py::module_& m);
void bind_rms_norm(py::module_& m);
void bind_rotary(py::module_& m);
void bind_sample(py::module_& m);

}  // namespace fastlm
