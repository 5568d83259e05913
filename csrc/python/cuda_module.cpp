// The Python module fastlm._cuda: CUDA kernels on raw device addresses and a stream address. Knows no torch; links the
// CUDA runtime statically, so it loads (and reports no device) where there is no driver. Built with FASTLM_ON_CPU it is
// the same module over csrc/tests/shim, for tests on machines without a GPU: its device is the CPU.
#include <map>

#include "fastlm/recurrent_cuda.h"
#include "fastlm/sample_cuda.h"
#include "sample_args.h"

#if defined(FASTLM_ON_CPU)
#include "cuda_on_cpu.h"
#define FASTLM_MODULE _cuda_on_cpu
#else
#define FASTLM_MODULE _cuda
#endif

namespace fastlm {
namespace {

// Tensors by the names of the fields that they become; what is missing is null.
class Tensors {
 public:
  explicit Tensors(const std::map<std::string, address>& given) : left(given) {}
  void* operator()(const char* name) {
    const auto found = left.find(name);
    if (found == left.end()) return nullptr;
    void* const p = pointer<void>(found->second);
    left.erase(found);
    return p;
  }
  void done(const char* kernel) const {
    if (!left.empty()) throw std::invalid_argument(std::string(kernel) + ": takes no tensor " + left.begin()->first);
  }

 private:
  std::map<std::string, address> left;
};

Storage storage_of(int code) {
  if (code < 0 || code > 2) throw std::invalid_argument("storage is not 0, 1 or 2");
  return static_cast<Storage>(code);
}

void expect_sizes(const char* kernel, std::initializer_list<int64_t> sizes) {
  for (const int64_t size : sizes)
    if (size < 0 || size > INT32_MAX) throw std::invalid_argument(std::string(kernel) + ": a size is out of range");
}

template <typename Args>
void start(const char* name, const char* (*kernel)(const Args&, void*), const Args& args, address stream) {
  const char* error;
  {
    py::gil_scoped_release release;
    error = kernel(args, pointer<void>(stream));
  }
  if (error != nullptr) throw std::runtime_error(std::string(name) + ": " + error);
}

using Named = std::map<std::string, address>;

LstmCellCuda lstm_cell_of(int storage, int64_t batch, int64_t hidden, Tensors& t) {
  return {storage_of(storage), batch,        hidden,         t("gates_x"),   t("gates_h"),   t("b_ih"),
          t("b_hh"),           t("ln_ih"),   t("ln_hh"),     t("ln_c"),      t("ln_c_bias"), t("h_prev"),
          t("c_prev"),         t("zoneout_h"), t("zoneout_c"), t("h"),       t("c")};
}

void lstm_cell(int storage, int64_t batch, int64_t hidden, const Named& named, address stream) {
  expect_sizes("lstm_cell", {batch, hidden});
  Tensors t(named);
  const LstmCellCuda args = lstm_cell_of(storage, batch, hidden, t);
  t.done("lstm_cell");
  start("lstm_cell", lstm_cell_cuda, args, stream);
}

void lstm_cell_backward(int storage, int64_t batch, int64_t hidden, const Named& named, address stream) {
  expect_sizes("lstm_cell_backward", {batch, hidden});
  Tensors t(named);
  LstmCellGradientsCuda args{};
  args.cell = lstm_cell_of(storage, batch, hidden, t);
  args.grad_h = t("grad_h");
  args.grad_c = t("grad_c");
  args.grad_sum = t("grad_sum");
  args.grad_gates_x = t("grad_gates_x");
  args.grad_gates_h = t("grad_gates_h");
  args.grad_ln_c = t("grad_ln_c");
  args.grad_ln_c_bias = t("grad_ln_c_bias");
  args.grad_h_prev = t("grad_h_prev");
  args.grad_c_prev = t("grad_c_prev");
  t.done("lstm_cell_backward");
  start("lstm_cell_backward", lstm_cell_backward_cuda, args, stream);
}

GruCellCuda gru_cell_of(int storage, int64_t batch, int64_t hidden, Tensors& t) {
  return {storage_of(storage), batch,      hidden,     t("gates_x"), t("gates_h"),   t("b_ih"),
          t("b_hh"),           t("ln_ih"), t("ln_hh"), t("h_prev"),  t("zoneout_h"), t("h")};
}

void gru_cell(int storage, int64_t batch, int64_t hidden, const Named& named, address stream) {
  expect_sizes("gru_cell", {batch, hidden});
  Tensors t(named);
  const GruCellCuda args = gru_cell_of(storage, batch, hidden, t);
  t.done("gru_cell");
  start("gru_cell", gru_cell_cuda, args, stream);
}

void gru_cell_backward(int storage, int64_t batch, int64_t hidden, const Named& named, address stream) {
  expect_sizes("gru_cell_backward", {batch, hidden});
  Tensors t(named);
  GruCellGradientsCuda args{};
  args.cell = gru_cell_of(storage, batch, hidden, t);
  args.grad_h = t("grad_h");
  args.grad_sum_x = t("grad_sum_x");
  args.grad_sum_h = t("grad_sum_h");
  args.grad_gates_x = t("grad_gates_x");
  args.grad_gates_h = t("grad_gates_h");
  args.grad_h_prev = t("grad_h_prev");
  t.done("gru_cell_backward");
  start("gru_cell_backward", gru_cell_backward_cuda, args, stream);
}

void lstm_step(int storage, int64_t batch, int64_t inputs, int64_t hidden, const Named& named, address stream) {
  expect_sizes("lstm_step", {batch, inputs, hidden});
  Tensors t(named);
  const LstmStepCuda args = {storage_of(storage), batch,     inputs,    hidden,    t("x"), t("h_prev"), t("c_prev"),
                             t("w_ih"),           t("w_hh"), t("b_ih"), t("b_hh"), t("h"), t("c")};
  t.done("lstm_step");
  start("lstm_step", lstm_step_cuda, args, stream);
}

LstmSequenceCuda lstm_sequence_of(int storage, int64_t batch, int64_t hidden, int64_t steps, bool reverse, Tensors& t) {
  LstmSequenceCuda args{};
  args.storage = storage_of(storage);
  args.batch = batch;
  args.hidden = hidden;
  args.steps = steps;
  args.reverse = reverse;
  args.running = static_cast<const int64_t*>(t("running"));
  args.starts = static_cast<const int64_t*>(t("starts"));
  args.gates_x = t("gates_x");
  args.b_ih = t("b_ih");
  args.b_hh = t("b_hh");
  args.w_hh = t("w_hh");
  args.h0 = t("h0");
  args.c0 = t("c0");
  args.dropout = t("dropout");
  args.zoneout_h = t("zoneout_h");
  args.zoneout_c = t("zoneout_c");
  args.output = t("output");
  args.cells = t("cells");
  args.gates_h = t("gates_h");
  args.h_n = t("h_n");
  args.c_n = t("c_n");
  args.scratch = t("scratch");
  return args;
}

void lstm_sequence(int storage, int64_t batch, int64_t hidden, int64_t steps, bool reverse, const Named& named,
                   address stream) {
  expect_sizes("lstm_sequence", {batch, hidden, steps});
  Tensors t(named);
  const LstmSequenceCuda args = lstm_sequence_of(storage, batch, hidden, steps, reverse, t);
  t.done("lstm_sequence");
  start("lstm_sequence", lstm_sequence_cuda, args, stream);
}

void lstm_sequence_backward(int storage, int64_t batch, int64_t hidden, int64_t steps, bool reverse, const Named& named,
                            address stream) {
  expect_sizes("lstm_sequence_backward", {batch, hidden, steps});
  Tensors t(named);
  LstmSequenceGradientsCuda args{};
  args.sequence = lstm_sequence_of(storage, batch, hidden, steps, reverse, t);
  args.w_hh_t = t("w_hh_t");
  args.grad_output = t("grad_output");
  args.grad_h_n = t("grad_h_n");
  args.grad_c_n = t("grad_c_n");
  args.grad_sum = t("grad_sum");
  args.grad_h0 = t("grad_h0");
  args.grad_c0 = t("grad_c0");
  t.done("lstm_sequence_backward");
  start("lstm_sequence_backward", lstm_sequence_backward_cuda, args, stream);
}

void sample_tokens(address logits, int64_t row_stride, int64_t batch, int64_t vocab, std::array<double, 6> reals,
                   std::array<address, 6> real_rows, std::array<int64_t, 6> integers,
                   std::array<address, 6> integer_rows, address bias, int64_t bias_stride, address history,
                   int64_t history_stride, int64_t history_length, address tokens, int storage, address scratch,
                   address stream) {
  SampleArgs args = sample_args(logits, row_stride, batch, vocab, reals, real_rows, integers, integer_rows, bias,
                                bias_stride, history, history_stride, history_length, tokens);
  args.scratch = pointer<void>(scratch);
  const Storage kind = storage_of(storage);
  const char* error;
  {
    py::gil_scoped_release release;
    error = sample_cuda(args, kind, pointer<void>(stream));
  }
  if (error != nullptr) throw std::runtime_error(std::string("sample: ") + error);
}

}  // namespace
}  // namespace fastlm

PYBIND11_MODULE(FASTLM_MODULE, m) {
  using namespace fastlm;
  m.doc() = "fastlm's CUDA kernels. Use fastlm.ops; this module takes raw device addresses and checks little.";
  m.def("device_count", &cuda_device_count);
  m.def("device_error", &cuda_device_error);
  m.def("lstm_cell", &lstm_cell);
  m.def("lstm_cell_backward", &lstm_cell_backward);
  m.def("gru_cell", &gru_cell);
  m.def("gru_cell_backward", &gru_cell_backward);
  m.def("lstm_step", &lstm_step);
  m.def("lstm_sequence", &lstm_sequence);
  m.def("lstm_sequence_backward", &lstm_sequence_backward);
  m.def("lstm_sequence_scratch", &lstm_sequence_cuda_scratch);
  m.def("sample", &sample_tokens);
  m.def("sample_scratch", &sample_cuda_scratch);
#if defined(FASTLM_ON_CPU)
  m.attr("on_cpu") = true;
  m.def("set_options", [](uint64_t seed, bool log, int multiprocessors, std::size_t shared) {
    shim::options() = {seed, log, multiprocessors, shared, {}};
  });
  m.def("watch", [](const char* name, address p, std::size_t bytes) { shim::watch(name, pointer<void>(p), bytes); });
  m.def("forget_all", &shim::forget_all);
#else
  m.attr("on_cpu") = false;
#endif
}
