// A step of an LSTM whose weights have been packed: all that a call has to look at before, and making its results, in
// native code. A step streams the weights through the caches and so throws out all else: in Python each frame, tensor and
// attribute that is touched is a miss, and together they took a third of the call.
#pragma once

#include <array>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "bindings.h"
#include "exchange.h"
#include "fastlm/isa.h"
#include "fastlm/lstm.h"
#include "fastlm/pack.h"

namespace fastlm::lstm_binding {

// A few values spread over each of some float arrays, to tell whether they are still what was packed, and for this
// instruction-set level. `unchanged` may be called only while the arrays are known to be where they were.
class Samples {
 public:
  explicit Samples(const std::vector<std::pair<address, int64_t>>& spans) {
    constexpr int64_t kSamples = 4;  // each is most likely a cache miss, at every use of a packed weight
    for (const auto& [start, count] : spans)
      for (int64_t i = 0; i < kSamples && count > 0; ++i)
        places_.push_back(pointer<const uint32_t>(start) + (count - 1) * i / (kSamples - 1));
    hash_ = hash();
  }
  bool unchanged() const { return hash() == hash_; }

 private:
  uint64_t hash() const {
    for (const uint32_t* place : places_) __builtin_prefetch(place);  // all misses at once
    const auto level = static_cast<uint64_t>(simd_lanes()) << 1 | (digit_tiles() ? 1 : 0);
    uint64_t hash = 1469598103934665603u ^ level;  // FNV-1a
    for (const uint32_t* place : places_) hash = (hash ^ *place) * 1099511628211u;
    return hash;
  }
  std::vector<const uint32_t*> places_;
  uint64_t hash_;
};

// Does nothing, and says so, where a row's numbers are too unlike each other for digits and w_ih_parts are missing.
inline bool run_cell(LstmCell args) {
  if (args.digits) {
    const InputsInDigits rows = {args.input, args.batch, args.inputs, args.w_ih, 4 * args.hidden, 4, false, args.threads};
    // Of what a replay will read nothing is known.
    if (args.w_ih_parts == nullptr) {
      if (recording() != nullptr) return false;
      constexpr int64_t kMuch = 1 << 16;  // numbers
      std::unique_ptr<py::gil_scoped_release> unlocked;
      if (args.batch * args.inputs > kMuch) unlocked = std::make_unique<py::gil_scoped_release>();
      if (inputs_in_digits(rows) == 0) return false;
    }
    args.scratch = static_cast<float*>(scratch(lstm_cell_scratch(args) * sizeof(float)));
  }
  launch(&lstm_cell, args);
  return true;
}

// Weights as they were when they were packed. float32, contiguous, on the CPU.
class Unchanged {
 public:
  // Those given: W_ih [4H, I], W_hh, and biases or None. Throws where one is not as above.
  explicit Unchanged(const std::array<py::object, 4>& weights) {
    std::vector<std::pair<address, int64_t>> spans;
    for (size_t i = 0; i < weights.size(); ++i) {
      marks_[i].given = !weights[i].is_none();
      if (!marks_[i].given) continue;
      if (!look(weights[i].ptr(), &marks_[i])) throw py::value_error("lstm_step: a weight that native code cannot read");
      spans.emplace_back(marks_[i].data, marks_[i].rows * (marks_[i].columns != 0 ? marks_[i].columns : 1));
    }
    samples_ = std::make_unique<Samples>(spans);
  }

  bool holds(PyObject* const* weights) const {
    for (int i = 0; i < 4; ++i) {
      Mark now;
      now.given = weights[i] != Py_None;
      if (now.given != marks_[i].given || (now.given && (!look(weights[i], &now) || !(now == marks_[i])))) return false;
    }
    return samples_->unchanged();  // their addresses are those of the weights only where these are where they were
  }

 private:
  struct Mark {
    bool given = false;
    long version = 0;
    address data = 0;
    int64_t rows = 0, columns = 0;  // no columns: a vector
    bool operator==(const Mark& other) const {
      return version == other.version && data == other.data && rows == other.rows && columns == other.columns;
    }
  };

  static bool look(PyObject* weight, Mark* mark) {
    static PyObject* const name = PyUnicode_InternFromString("_version");
    TensorView view;
    if (!exchange().read(weight, &view) || !plain_floats(view) || view.dims < 1 || view.dims > 2) return false;
    const auto version = py::reinterpret_steal<py::object>(PyObject_GetAttr(weight, name));
    if (!version) {
      PyErr_Clear();
      return false;
    }
    mark->version = PyLong_AsLong(version.ptr());
    mark->data = reinterpret_cast<address>(view.data) + view.byte_offset;
    mark->rows = view.shape[0];
    mark->columns = view.dims == 2 ? view.shape[1] : 0;
    return true;
  }

  Mark marks_[4];
  std::unique_ptr<Samples> samples_;
};

// What Python keeps with a layer's packed weights.
struct Step {
  Unchanged weights;
  LstmCell call;         // but for the addresses of states and the number of rows
  py::object empty_like;

  static constexpr const char* kName = "fastlm.lstm_step";
  static Step* of(PyObject* capsule) { return static_cast<Step*>(PyCapsule_GetPointer(capsule, kName)); }
};

// (w_ih, w_hh, b_ih, b_hh, input [.., I], h [.., H], c [.., H], copy, threads): the next (h, c, a copy of h if wanted), or
// None where anything needs to be looked at in Python. Without pybind11, whose dispatch takes a microsecond.
inline PyObject* take_step(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  if (count != 9) {
    PyErr_Format(PyExc_TypeError, "lstm_step: %zd arguments, expected 9", count);
    return nullptr;
  }
  const Step& step = *Step::of(self);
  TensorView input, states[2];
  if (!exchange().read(args[4], &input) || !plain_floats(input) || input.dims < 1) Py_RETURN_NONE;
  LstmCell call = step.call;
  call.batch = 1;
  for (int i = 0; i + 1 < input.dims; ++i) call.batch *= input.shape[i];
  if (input.shape[input.dims - 1] != call.inputs || call.batch < 1) Py_RETURN_NONE;
  for (int s = 0; s < 2; ++s) {
    TensorView& state = states[s];
    if (!exchange().read(args[5 + s], &state) || !plain_floats(state) || state.dims != input.dims ||
        state.shape[state.dims - 1] != call.hidden ||
        std::memcmp(state.shape, input.shape, sizeof(int64_t) * (input.dims - 1)) != 0)
      Py_RETURN_NONE;
  }
  if (!step.weights.holds(args)) Py_RETURN_NONE;
  try {
    py::object results[3];
    float* places[3] = {};
    const int wanted = args[7] == Py_True ? 3 : 2;
    for (int i = 0; i < wanted; ++i) {
      results[i] = py::reinterpret_steal<py::object>(PyObject_CallOneArg(step.empty_like.ptr(), args[i == 1 ? 6 : 5]));
      TensorView view;
      if (!results[i]) return nullptr;
      if (!exchange().read(results[i].ptr(), &view)) Py_RETURN_NONE;
      places[i] = floats(view);
    }
    const long threads = PyLong_AsLong(args[8]);
    if (threads == -1 && PyErr_Occurred() != nullptr) return nullptr;
    call.threads = static_cast<int>(threads);
    call.input = floats(input);
    call.h = floats(states[0]);
    call.c = floats(states[1]);
    call.h_out = places[0];
    call.c_out = places[1];
    call.output = places[2];
    if (!run_cell(call)) Py_RETURN_NONE;
    if (!results[2]) results[2] = py::none();
    return PyTuple_Pack(3, results[0].ptr(), results[1].ptr(), results[2].ptr());
  } catch (const py::builtin_exception& error) {
    error.set_error();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

// Remembers what the weights are, before they are packed. Throws where native code cannot read them.
inline py::capsule begin_step(const std::array<py::object, 4>& weights, py::object empty_like) {
  return py::capsule(new Step{Unchanged(weights), {}, std::move(empty_like)}, Step::kName,
                     [](void* step) { delete static_cast<Step*>(step); });
}

// The callable `take_step` of weights packed since; they, and w_ih_parts if given, have to live as long.
inline py::object lstm_step(py::capsule begun, int64_t inputs, int64_t hidden, address w_ih, address w_hh, address bias,
                            bool digits, address w_ih_parts) {
  static PyMethodDef method = {"lstm_step",
                               reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(take_step)), METH_FASTCALL,
                               "The next states, or None for a call that Python has to look at."};
  LstmCell& call = Step::of(begun.ptr())->call;
  call.inputs = inputs;
  call.hidden = hidden;
  call.w_ih = pointer<const void>(w_ih);
  call.w_hh = pointer<const void>(w_hh);
  call.bias = pointer<const float>(bias);
  call.digits = digits;
  call.w_ih_parts = pointer<const void>(w_ih_parts);
  return py::reinterpret_steal<py::object>(PyCFunction_New(&method, begun.ptr()));
}

}  // namespace fastlm::lstm_binding
