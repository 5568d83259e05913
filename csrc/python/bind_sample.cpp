#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>

#include "exchange.h"
#include "known_calls.h"
#include "sample_args.h"

namespace fastlm::sample_binding {
namespace {

// The calling thread's scratch; grows, and starts as zeros.
struct Scratch {
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<void, Free> memory;
  int64_t vocab = 0;
  int threads = 0;

  void* aligned() const { return reinterpret_cast<void*>((reinterpret_cast<address>(memory.get()) + 63) & ~address{63}); }

  void reserve(int64_t wanted_vocab, int wanted_threads) {
    if (wanted_vocab <= vocab && wanted_threads <= threads) return;
    const int64_t most_vocab = std::max(vocab, wanted_vocab);
    const int most_threads = std::max(threads, wanted_threads);
    memory.reset();
    vocab = threads = 0;
    memory.reset(std::calloc(sample_scratch_bytes(most_vocab) * most_threads + 64, 1));
    if (!memory) throw std::bad_alloc();
    vocab = most_vocab;
    threads = most_threads;
  }
};

int64_t run(SampleArgs args, int threads) {
  if (threads < 1) throw py::value_error("sample: threads out of range");
  if (Program* const program = recording()) {
    args.scratch = program->scratch(sample_scratch_bytes(args.vocab) * threads, false);
    args.scratch_vocab = args.vocab;
  } else {
    thread_local Scratch kept;
    kept.reserve(args.vocab, threads);
    args.scratch = kept.aligned();
    args.scratch_vocab = kept.vocab;
  }
  args.threads = threads;
  return launch(&sample, args);
}

int64_t bind(address logits, int64_t row_stride, int64_t batch, int64_t vocab, std::array<double, 6> reals,
             std::array<address, 6> real_rows, std::array<int64_t, 6> integers, std::array<address, 6> integer_rows,
             address bias, int64_t bias_stride, address history, int64_t history_stride, int64_t history_length,
             address tokens, int threads) {
  return run(sample_args(logits, row_stride, batch, vocab, reals, real_rows, integers, integer_rows, bias, bias_stride,
                         history, history_stride, history_length, tokens),
             threads);
}

// A call that was checked in Python: one that brings other logits of the same layout and another position need not be.
constexpr Py_ssize_t kOptions = 9;
struct Known {
  int64_t batch, vocab, row_stride;
  SampleArgs call;
  py::object options[kOptions];  // as they were given: float, int or None
  py::object empty_like, tokens;
  py::object alive;  // what `call` has addresses of
};
bool same(PyObject* a, PyObject* b) {
  if (a == b) return true;
  if (Py_TYPE(a) != Py_TYPE(b)) return false;
  return (PyFloat_CheckExact(a) || PyLong_CheckExact(a)) && PyObject_RichCompareBool(a, b, Py_EQ) == 1;
}

const Known* find(const TensorView& logits, PyObject* const* options) {
  return KnownCalls<Known>::instance().find([&](const Known& known) {
    if (known.batch != logits.shape[0] || known.vocab != logits.shape[1] || known.row_stride != logits.strides[0])
      return false;
    int equal = 0;
    while (equal < kOptions && same(options[equal], known.options[equal].ptr())) ++equal;
    return equal == kOptions;
  });
}

// `tokens` is a tensor like those to be returned, `options` as they come to sample_known.
void remember(int64_t row_stride, int64_t batch, int64_t vocab, std::array<double, 6> reals,
              std::array<address, 6> real_rows, std::array<int64_t, 6> integers, std::array<address, 6> integer_rows,
              const py::tuple& options, py::object empty_like, py::object tokens, py::object alive) {
  if (options.size() != kOptions) throw py::value_error("sample_remember: expected 9 options");
  Known known{batch, vocab, row_stride, {}, {}, std::move(empty_like), std::move(tokens), std::move(alive)};
  known.call = sample_args(0, row_stride, batch, vocab, reals, real_rows, integers, integer_rows, 0, 0, 0, 0, 0, 0);
  for (Py_ssize_t i = 0; i < kOptions; ++i) known.options[i] = options[size_t(i)];
  KnownCalls<Known>::instance().remember(std::move(known));
}

// (logits, temperature, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty, top_k, seed, sequence,
// position, threads): the tokens; None for a call that is not known, or of which a row is refused. Without pybind11,
// whose dispatch and conversions take a microsecond.
PyObject* known(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != kOptions + 3) {
    PyErr_Format(PyExc_TypeError, "sample_known: %zd arguments, expected %zd", count, kOptions + 3);
    return nullptr;
  }
  TensorView logits;
  PyObject* const position = args[kOptions + 1];
  if (!PyLong_CheckExact(position) || !exchange().read(args[0], &logits) || logits.device_type != 1 ||
      logits.dims != 2 || logits.dtype_code != 2 || logits.dtype_bits != 32 || logits.dtype_lanes != 1 ||
      logits.strides[1] != 1)
    Py_RETURN_NONE;
  const Known* const found = find(logits, args + 1);
  if (found == nullptr) Py_RETURN_NONE;
  int overflow = 0;
  const long long at = PyLong_AsLongLongAndOverflow(position, &overflow);
  if (overflow != 0 || at < 0 || at >> 32 != 0) Py_RETURN_NONE;
  try {
    // Kept here: making a tensor can run any Python, under a dispatch mode, and others may forget meanwhile.
    SampleArgs call = found->call;
    const py::object alive = found->alive, like = found->tokens, empty_like = found->empty_like;
    const auto tokens = py::reinterpret_steal<py::object>(PyObject_CallOneArg(empty_like.ptr(), like.ptr()));
    TensorView view;
    if (!tokens) return nullptr;
    if (!exchange().read(tokens.ptr(), &view)) Py_RETURN_NONE;
    const long threads = PyLong_AsLong(args[kOptions + 2]);
    if (threads == -1 && PyErr_Occurred() != nullptr) return nullptr;
    call.logits = floats(logits);
    call.tokens = reinterpret_cast<int64_t*>(static_cast<char*>(view.data) + view.byte_offset);
    call.position.value = at;
    if (run(call, static_cast<int>(threads)) >= 0) Py_RETURN_NONE;
    return tokens.inc_ref().ptr();
  } catch (const py::builtin_exception& error) {
    error.set_error();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

PyMethodDef known_method = {"sample_known", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(known)),
                            METH_FASTCALL, "The tokens of a call remembered by its logits' layout and options, or None."};

}  // namespace

void define(py::module_& m) {
  m.def("sample", &bind, "Writes one token per row; returns -1, or the first row that cannot be drawn from.");
  m.def("sample_remember", &remember);
  m.def(
      "sample_forget", [] { return KnownCalls<Known>::instance().forget(); },
      "Forgets all remembered calls; returns how many there were.");
  m.attr("sample_known") = py::reinterpret_steal<py::object>(PyCFunction_New(&known_method, nullptr));
}

}  // namespace fastlm::sample_binding
