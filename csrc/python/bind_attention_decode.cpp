// fastlm.ops.attention_decode on the CPU.
#include <algorithm>
#include <array>
#include <cstring>
#include <limits>
#include <string>

#include "bindings.h"
#include "exchange.h"
#include "fastlm/attention_decode.h"
#include "known_calls.h"

namespace fastlm::attention_decode_binding {
namespace {

using Sizes = std::array<int64_t, 4>;

void copy_strides(int64_t (&to)[3], const Sizes& from, const char* name) {
  if (from[3] != 1) throw py::value_error(std::string("attention_decode: ") + name + " has a last stride other than 1");
  for (int i = 0; i < 3; ++i) to[i] = from[i];
}

// All of a call but its addresses: what shapes, strides and options say, checked once.
AttentionDecode plan(const Sizes& query_shape, const Sizes& query_stride, int type, const Sizes& key_shape,
                     const Sizes& key_stride, const Sizes& value_stride, int64_t slopes_stride, float scale,
                     float softcap, int64_t window) {
  AttentionDecode a = {};
  a.batch = query_shape[0];
  a.heads = query_shape[1];
  a.tokens = query_shape[2];
  a.dim = query_shape[3];
  a.cache_rows = key_shape[0];
  a.kv_heads = key_shape[1];
  a.positions = key_shape[2];
  if (a.dim < 1 || a.dim > kAttentionDecodeMaxDim || key_shape[3] != kv_width(a.dim, kv_type(type)) || a.kv_heads < 1 ||
      a.heads % a.kv_heads != 0)
    throw py::value_error("attention_decode: the shapes of query and key_cache do not fit");
  a.type = kv_type(type);
  copy_strides(a.query_stride, query_stride, "query");
  copy_strides(a.key_stride, key_stride, "key_cache");
  copy_strides(a.value_stride, value_stride, "value_cache");
  a.slopes_stride = slopes_stride;
  a.scale = scale;
  a.softcap = softcap;
  a.window = window > 0 ? window : std::numeric_limits<int64_t>::max();
  return a;
}

void run(AttentionDecode a, address query, address key, address value, address lengths, address rows, address slopes,
         address output, int threads) {
  a.query = pointer<const float>(query);
  a.key = pointer<const void>(key);
  a.value = pointer<const void>(value);
  a.lengths = pointer<const int64_t>(lengths);
  a.rows = pointer<const int64_t>(rows);
  a.slopes = pointer<const float>(slopes);
  a.output = pointer<float>(output);
  a.threads = threads;
  if (const int64_t bad = attention_decode_check(a)) {
    const int64_t b = (bad > 0 ? bad : -bad) - 1;
    const std::string at = "[" + std::to_string(b) + "] is ";
    if (bad > 0)
      throw py::value_error("attention_decode: lengths" + at + std::to_string(a.lengths[b]) + ", expected from " +
                            std::to_string(a.tokens) + " (new tokens, counted in) to " + std::to_string(a.positions) +
                            " (positions in the cache)");
    throw py::value_error("attention_decode: rows" + at + std::to_string(a.rows != nullptr ? a.rows[b] : b) +
                          ", expected 0 to " + std::to_string(a.cache_rows - 1));
  }
  // A recorded call meets longer sequences when it is replayed.
  int64_t longest = recording() != nullptr ? a.positions : 0;
  for (int64_t b = 0; b < a.batch; ++b) longest = std::max(longest, a.lengths[b]);
  a.scratch = static_cast<float*>(scratch(attention_decode_scratch(a, longest) * sizeof(float)));
  launch(&attention_decode, a);
}

// What decides over a call beside the numbers in its tensors: options, and of each tensor dtype, shape and strides.
constexpr int kTensors = 5, kMostDims = 4;
struct Signature {
  double options[3];  // scale, window, softcap
  uint64_t given;     // which of them are not None, by bits
  uint64_t dtype[kTensors];
  int64_t sizes[kTensors][2 * kMostDims];
};

// The signature of query, key cache, value cache, lengths, rows, scale, window and softcap, and where the tensors'
// data are; false for what is not plain tensors on a CPU, or options that are no numbers. Leaves no error behind.
bool sign(PyObject* const* args, Signature* signature, address* data) {
  std::memset(signature, 0, sizeof(*signature));
  for (int t = 0; t < kTensors; ++t) {
    data[t] = 0;
    if (args[t] == Py_None) continue;
    TensorView view;
    if (!exchange().read(args[t], &view) || view.device_type != 1 || view.dims > kMostDims) return false;
    data[t] = reinterpret_cast<address>(view.data) + view.byte_offset;
    signature->dtype[t] = uint64_t{view.dtype_lanes} << 32 | uint64_t{view.dtype_code} << 16 |
                          uint64_t{view.dtype_bits} << 8 | static_cast<uint64_t>(view.dims + 1);
    std::memcpy(signature->sizes[t], view.shape, sizeof(int64_t) * view.dims);
    std::memcpy(signature->sizes[t] + kMostDims, view.strides, sizeof(int64_t) * view.dims);
  }
  for (int i = 0; i < 3; ++i) {
    PyObject* const option = args[kTensors + i];
    if (option == Py_None) continue;
    signature->options[i] = PyFloat_AsDouble(option);
    signature->given |= uint64_t{1} << i;
  }
  if (PyErr_Occurred() == nullptr) return true;
  PyErr_Clear();
  return false;
}

// A call that was checked in Python: one that only brings other numbers need not be.
struct Known {
  Signature signature;
  AttentionDecode call;
  py::object empty;         // makes the output
  py::object arguments[4];  // of `empty`, the last two by name
  py::object names;
};

void remember(const AttentionDecode& call, const py::tuple& args, py::object empty, py::object shape,
              py::object strides, py::object dtype, py::object device) {
  Signature signature;
  address data[kTensors];
  if (exchange().table == nullptr || args.size() != kTensors + 3) return;
  if (!sign(&PyTuple_GET_ITEM(args.ptr(), 0), &signature, data)) return;
  KnownCalls<Known>::instance().remember({signature, call, std::move(empty),
                                          {std::move(shape), std::move(strides), std::move(dtype), std::move(device)},
                                          py::make_tuple("dtype", "device")});
}

const Known* find(const Signature& signature) {
  return KnownCalls<Known>::instance().find(
      [&](const Known& known) { return std::memcmp(&known.signature, &signature, sizeof(signature)) == 0; });
}

// (query, key_cache, value_cache, lengths, rows, scale, window, softcap, threads): the output, or None for a call that
// is not known. Without pybind11, whose dispatch alone takes a microsecond.
PyObject* known(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != kTensors + 4) {
    PyErr_Format(PyExc_TypeError, "attention_decode_known: %zd arguments, expected %d", count, kTensors + 4);
    return nullptr;
  }
  Signature signature;
  address data[kTensors];
  const Known* const found = sign(args, &signature, data) ? find(signature) : nullptr;
  if (found == nullptr) Py_RETURN_NONE;
  try {
    // Kept here: making a tensor can run any Python, under a dispatch mode.
    const AttentionDecode call = found->call;
    const py::object empty = found->empty, names = found->names;
    const py::object shape = found->arguments[0], strides = found->arguments[1], dtype = found->arguments[2],
                     device = found->arguments[3];
    PyObject* const arguments[] = {shape.ptr(), strides.ptr(), dtype.ptr(), device.ptr()};
    const auto output = py::reinterpret_steal<py::object>(PyObject_Vectorcall(empty.ptr(), arguments, 2, names.ptr()));
    TensorView view;
    if (!output) return nullptr;
    if (!exchange().read(output.ptr(), &view)) Py_RETURN_NONE;
    const long threads = PyLong_AsLong(args[kTensors + 3]);
    if (threads == -1 && PyErr_Occurred() != nullptr) return nullptr;
    run(call, data[0], data[1], data[2], data[3], data[4], 0, reinterpret_cast<address>(view.data) + view.byte_offset,
        static_cast<int>(threads));
    return output.inc_ref().ptr();
  } catch (const py::builtin_exception& error) {
    error.set_error();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

PyMethodDef known_method = {"attention_decode_known", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(known)),
                            METH_FASTCALL, "The output of a call remembered by its tensors' layout, or None."};

}  // namespace

void define(py::module_& m) {
  py::class_<AttentionDecode>(m, "AttentionDecode", "A call of attention_decode without its addresses.")
      .def(py::init(&plan))
      .def("__call__", &run);
  m.def("attention_decode_remember", &remember);
  m.def(
      "attention_decode_forget", [] { return KnownCalls<Known>::instance().forget(); },
      "Forgets all remembered calls; returns how many there were.");
  m.attr("attention_decode_known") = py::reinterpret_steal<py::object>(PyCFunction_New(&known_method, nullptr));
}

}  // namespace fastlm::attention_decode_binding
