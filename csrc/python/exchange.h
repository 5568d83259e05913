// Tensors as torch shows them to callers that know no torch header: DLPack's exchange interface (dlpack.h 1.3,
// https://github.com/dmlc/dlpack), of which the structures below are the part needed here. Address, shape and strides
// of five tensors take 0.25 µs, where asking their attributes from Python takes 2.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace fastlm {

// DLPack's DLTensor.
struct TensorView {
  void* data;
  int32_t device_type, device_id;
  int32_t dims;
  uint8_t dtype_code, dtype_bits;
  uint16_t dtype_lanes;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

// DLPack's DLPackExchangeAPI.
struct ExchangeTable {
  uint32_t major, minor;
  void* older;
  void* allocate;
  void* from_python;
  void* to_python;
  int (*view)(void* object, TensorView* view);  // what it points to is the tensor's; null: not offered
  void* current_stream;
};

struct Exchange {
  const ExchangeTable* table = nullptr;  // null until Python has handed it over
  PyTypeObject* types[2] = {};           // torch.Tensor and Parameter; of a subclass anything may be different

  // Whether `object` is a plain tensor that can be seen; no error is left behind.
  bool read(PyObject* object, TensorView* view) const {
    if (Py_TYPE(object) != types[0] && Py_TYPE(object) != types[1]) return false;
    if (table->view(object, view) == 0) return true;
    PyErr_Clear();
    return false;
  }
};

// Whether it is float32 on the CPU, without gaps and in order.
inline bool plain_floats(const TensorView& view) {
  if (view.device_type != 1 || view.dtype_code != 2 || view.dtype_bits != 32 || view.dtype_lanes != 1) return false;
  int64_t stride = 1;
  for (int i = view.dims; i-- > 0; stride *= view.shape[i])
    if (view.shape[i] != 1 && view.strides[i] != stride) return false;
  return true;
}
inline float* floats(const TensorView& view) {
  return reinterpret_cast<float*>(static_cast<char*>(view.data) + view.byte_offset);
}

inline Exchange& exchange() {
  static Exchange instance;
  return instance;
}

// Takes torch.Tensor.__dlpack_c_exchange_api__ and the types of plain tensors; false where it is of a kind unknown here.
inline bool set_exchange(pybind11::object capsule, pybind11::type tensor, pybind11::type parameter) {
  constexpr const char* kName = "dlpack_exchange_api";
  if (!PyCapsule_IsValid(capsule.ptr(), kName)) return false;
  const auto* table = static_cast<const ExchangeTable*>(PyCapsule_GetPointer(capsule.ptr(), kName));
  if (table->major != 1 || table->view == nullptr) return false;
  exchange() = {table,
                {reinterpret_cast<PyTypeObject*>(tensor.inc_ref().ptr()),
                 reinterpret_cast<PyTypeObject*>(parameter.inc_ref().ptr())}};
  return true;
}

}  // namespace fastlm
