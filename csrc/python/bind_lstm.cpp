#include "bindings.h"
#include "lstm_step.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "fastlm/isa.h"
#include "fastlm/lstm.h"
#include "fastlm/pack.h"
#include "fastlm/recurrent.h"
#include "fastlm/recurrent_variants.h"

namespace fastlm::lstm_binding {
namespace {

void check(bool holds, const char* message) {
  if (!holds) throw std::invalid_argument(message);
}

void check_batch_sizes(const std::vector<int64_t>& sizes, int64_t rows, int64_t batch) {
  check(!sizes.empty(), "batch_sizes is empty, expected a size for each of at least one step");
  check(sizes[0] == batch, "batch_sizes begins with another number than the rows of h0");
  int64_t total = 0;
  for (size_t t = 0; t < sizes.size(); total += sizes[t++])
    check(sizes[t] >= 1 && (t == 0 || sizes[t] <= sizes[t - 1]),
          "batch_sizes has a size that is less than 1 or greater than the one before");
  check(total == rows, "batch_sizes does not sum to the rows of input");
}

void pack(address source, int64_t k, int64_t n, int64_t stride_k, int64_t stride_n, int64_t gates, address packed,
          int threads, bool bfloat) {
  check(gates == 0 || gates == 3 || gates == 4, "pack_panels: gates must be 0, 3 or 4");
  check(k >= 1 && n >= 1 && (gates == 0 || n % gates == 0), "pack_panels: k and n must be positive, and n that many gates");
  py::gil_scoped_release unlocked;
  pack_panels({pointer<const void>(source), k, n, stride_k, stride_n, gates, pointer<void>(packed), threads, bfloat});
}

void pack_as_digits(address source, int64_t k, int64_t n, int64_t stride_k, int64_t stride_n, int64_t gates,
                    int64_t k_groups, address packed, int threads) {
  check(gates == 0 || gates == 3 || gates == 4, "pack_digits: gates must be 0, 3 or 4");
  check(k >= 1 && n >= 1 && (gates == 0 || n % gates == 0), "pack_digits: k and n must be positive, and n that many gates");
  check(k_groups >= 0 && (k_groups == 0 || k % k_groups == 0), "pack_digits: k must be that many groups");
  check(digit_tiles(), "pack_digits: this processor, or this level, has no tiles of int8");
  py::gil_scoped_release unlocked;
  pack_digits({pointer<const float>(source), k, n, stride_k, stride_n, gates, k_groups, pointer<void>(packed), threads});
}

bool rows_in_digits(address input, int64_t rows, int64_t k, address w_ih, int64_t n, int64_t gates, bool normalised,
                    int threads) {
  check(rows >= 1 && k >= 1 && n >= 1 && (gates == 0 || n % gates == 0), "inputs_in_digits: sizes must be positive");
  check(digit_tiles(), "inputs_in_digits: this processor, or this level, has no tiles of int8");
  refuse_recording("inputs_in_digits");  // in a replay the rows would be others
  py::gil_scoped_release unlocked;
  return inputs_in_digits({pointer<const float>(input), rows, k, pointer<const void>(w_ih), n, gates, normalised,
                           threads}) != 0;
}

int64_t evenness_of(address matrix, int64_t rows, int64_t columns, int threads) {
  check(rows >= 1 && columns >= 1, "evenness: sizes must be positive");
  py::gil_scoped_release unlocked;
  return evenness({pointer<const float>(matrix), rows, columns, threads});
}

void multiply_in_digits(address a, int64_t a_stride, bool a_across, address b, int64_t b_stride, address c, int64_t m,
                        int64_t n, int64_t k, int threads) {
  refuse_recording("digit_matmul");
  check(m >= 1 && n >= 1 && k >= 1, "digit_matmul: sizes must be positive");
  check(a_stride >= (a_across ? m : k) && b_stride >= n, "digit_matmul: a stride is less than a row");
  check(digit_tiles(), "digit_matmul: this processor, or this level, has no tiles of int8");
  DigitMatmul x = {pointer<const float>(a), a_stride, a_across, pointer<const float>(b), b_stride, pointer<float>(c),
                   m, n, k, nullptr, threads};
  x.scratch = scratch(digit_matmul_scratch(x));
  py::gil_scoped_release unlocked;
  digit_matmul(x);
}

void forward(const std::vector<int64_t>& batch_sizes, int64_t rows, int64_t batch, int64_t inputs, int64_t hidden,
             int64_t outputs, bool reverse, bool bfloat, address input, address w_ih, address w_hh, address bias,
             address w_hr, address h0, address c0, address output, address h_n, address c_n, address gates,
             address cells, address unprojected, int threads, bool digits, address w_ih_parts) {
  refuse_recording("lstm_forward");
  check_batch_sizes(batch_sizes, rows, batch);
  check(inputs >= 1 && hidden >= 1 && outputs >= 1, "lstm: sizes must be positive");
  check(w_hr != 0 || outputs == hidden, "lstm: outputs differ from hidden units, but there is no projection");
  check(!digits || (w_hr == 0 && !bfloat && digit_tiles()), "lstm_forward: these weights cannot come as digits");
  LstmForward args = {static_cast<int64_t>(batch_sizes.size()), batch_sizes.data(), inputs, hidden, outputs,
                      pointer<const float>(input), bfloat, pointer<const void>(w_ih), pointer<const void>(w_hh),
                      pointer<const float>(bias), pointer<const void>(w_hr), pointer<const float>(h0),
                      pointer<const float>(c0), reverse, pointer<float>(output), pointer<float>(h_n),
                      pointer<float>(c_n), pointer<float>(gates), pointer<float>(cells), pointer<float>(unprojected),
                      nullptr, threads, digits, pointer<const void>(w_ih_parts)};
  args.scratch = static_cast<float*>(scratch(lstm_forward_scratch(args) * sizeof(float)));
  py::gil_scoped_release unlocked;
  lstm_forward(args);
}

void backward(const std::vector<int64_t>& batch_sizes, int64_t rows, int64_t batch, int64_t hidden, int64_t outputs,
              bool reverse, address w_hh, address w_hr, address h0, address c0, address output, address gates,
              address cells, address grad_output, address grad_h_n, address grad_c_n, address grad_gates,
              address grad_projected, address previous, address grad_h0, address grad_c0, int threads, bool digits) {
  refuse_recording("lstm_backward");
  check_batch_sizes(batch_sizes, rows, batch);
  check(hidden >= 1 && outputs >= 1, "lstm: sizes must be positive");
  check(!digits || (w_hr == 0 && digit_tiles()), "lstm_backward: the weight cannot come as digits");
  LstmBackward args = {static_cast<int64_t>(batch_sizes.size()), batch_sizes.data(), hidden, outputs,
                       pointer<const void>(w_hh), pointer<const float>(w_hr), pointer<const float>(h0),
                       pointer<const float>(c0), reverse, pointer<const float>(output), pointer<const float>(gates),
                       pointer<const float>(cells), pointer<const float>(grad_output), pointer<const float>(grad_h_n),
                       pointer<const float>(grad_c_n), pointer<float>(grad_gates), pointer<float>(grad_projected),
                       pointer<float>(previous), pointer<float>(grad_h0), pointer<float>(grad_c0), nullptr, threads,
                       digits};
  args.scratch = static_cast<float*>(scratch(lstm_backward_scratch(args) * sizeof(float)));
  py::gil_scoped_release unlocked;
  lstm_backward(args);
}

bool cell(int64_t batch, int64_t inputs, int64_t hidden, bool bfloat, address input, address h, address c,
          address w_ih, address w_hh, address bias, address h_out, address c_out, address output, int threads,
          bool digits, address w_ih_parts) {
  check(batch >= 1 && inputs >= 1 && hidden >= 1, "lstm_cell: sizes must be positive");
  check(!digits || (!bfloat && digit_tiles()), "lstm_cell: these weights cannot come as digits");
  return run_cell({batch, inputs, hidden, pointer<const float>(input), pointer<const float>(h), pointer<const float>(c),
                   bfloat, pointer<const void>(w_ih), pointer<const void>(w_hh), pointer<const float>(bias),
                   pointer<float>(h_out), pointer<float>(c_out), pointer<float>(output), threads, digits,
                   pointer<const void>(w_ih_parts)});
}

// The tensors of a variant, by the names of the native structures' members; those not given are null.
class Addresses {
 public:
  explicit Addresses(std::map<std::string, address> given) : given_(std::move(given)) {}
  operator const float*() { return take(); }
  operator float*() { return take(); }
  operator const void*() { return take(); }
  Addresses& operator[](const char* name) {
    name_ = name;
    return *this;
  }
  void check_all_known() const {
    if (!given_.empty()) throw std::invalid_argument("variant: there is no tensor named " + given_.begin()->first);
  }

 private:
  float* take() {
    const auto found = given_.find(name_);
    if (found == given_.end()) return nullptr;
    float* const value = pointer<float>(found->second);
    given_.erase(found);
    return value;
  }
  std::map<std::string, address> given_;
  const char* name_ = "";
};

RecurrentVariant variant_of(Addresses& t, int64_t zoneout_stride) {
  return {t["dropout"], t["zoneout_h"], t["zoneout_c"], zoneout_stride,
          t["ln_ih"],   t["ln_hh"],     t["ln_c"],      t["ln_c_bias"]};
}

void run_variant_forward(int64_t gates, const std::vector<int64_t>& batch_sizes, int64_t rows, int64_t batch,
                         int64_t inputs, int64_t hidden, bool reverse, int64_t zoneout_stride,
                         std::map<std::string, address> tensors, int threads, bool digits) {
  refuse_recording("variant_forward");
  check_batch_sizes(batch_sizes, rows, batch);
  check(gates == 3 || gates == 4, "variant_forward: gates must be 3 or 4");
  check(inputs >= 1 && hidden >= 1, "variant_forward: sizes must be positive");
  check(!digits || digit_tiles(), "variant_forward: this processor, or this level, has no tiles of int8");
  Addresses t(std::move(tensors));
  VariantForward args = {gates, static_cast<int64_t>(batch_sizes.size()), batch_sizes.data(), inputs, hidden,
                         variant_of(t, zoneout_stride), t["input"], t["w_ih"], t["w_hh"], t["bias"], t["h0"], t["c0"],
                         t["h0_dropped"], reverse, t["output"], t["h_n"], t["c_n"], t["dropped"], t["activated"],
                         t["cells"], t["raw_ih"], t["raw_hh"], t["stats"], nullptr, threads, digits, t["w_ih_parts"]};
  t.check_all_known();
  args.scratch = static_cast<float*>(scratch(variant_forward_scratch(args) * sizeof(float)));
  py::gil_scoped_release unlocked;
  variant_forward(args);
}

void run_variant_backward(int64_t gates, const std::vector<int64_t>& batch_sizes, int64_t rows, int64_t batch,
                          int64_t hidden, bool reverse, int64_t zoneout_stride, std::map<std::string, address> tensors,
                          int threads, bool digits) {
  refuse_recording("variant_backward");
  check_batch_sizes(batch_sizes, rows, batch);
  check(gates == 3 || gates == 4, "variant_backward: gates must be 3 or 4");
  check(hidden >= 1, "variant_backward: sizes must be positive");
  check(!digits || digit_tiles(), "variant_backward: this processor, or this level, has no tiles of int8");
  Addresses t(std::move(tensors));
  VariantBackward args = {
      gates, static_cast<int64_t>(batch_sizes.size()), batch_sizes.data(), hidden, variant_of(t, zoneout_stride),
      t["w_hh"], t["h0"], t["h0_dropped"], t["c0"], reverse, t["output"], t["dropped"], t["activated"], t["cells"],
      t["raw_ih"], t["raw_hh"], t["stats"], t["grad_output"], t["grad_h_n"], t["grad_c_n"], t["grad_gates"],
      t["grad_raw_hh"], t["grad_bias"], t["grad_ln_ih"], t["grad_ln_hh"], t["grad_ln_c"], t["grad_ln_c_bias"],
      t["previous"], t["grad_h0"], t["grad_c0"], nullptr, threads, digits};
  t.check_all_known();
  args.scratch = static_cast<float*>(scratch(variant_backward_scratch(args) * sizeof(float)));
  py::gil_scoped_release unlocked;
  variant_backward(args);
}

void recurrent(RecurrentCell kind, const std::vector<int64_t>& batch_sizes, int64_t rows, int64_t batch,
               int64_t inputs, int64_t hidden, bool reverse, bool bfloat, address input, address w_ih, address w_hh,
               address bias, address h0, address output, address h_n, address gates, int threads, bool digits,
               address w_ih_parts) {
  check_batch_sizes(batch_sizes, rows, batch);
  check(inputs >= 1 && hidden >= 1, "recurrent_forward: sizes must be positive");
  check(kind == RecurrentCell::gru || gates == 0, "recurrent_forward: only a GRU has gates to keep");
  check(!digits || (kind != RecurrentCell::relu && !bfloat && digit_tiles()),
        "recurrent_forward: these weights cannot come as digits");
  RecurrentForward args = {kind, static_cast<int64_t>(batch_sizes.size()), batch_sizes.data(), inputs, hidden,
                           pointer<const float>(input), bfloat, pointer<const void>(w_ih), pointer<const void>(w_hh),
                           pointer<const float>(bias), pointer<const float>(h0), reverse, pointer<float>(output),
                           pointer<float>(h_n), pointer<float>(gates), nullptr, threads, digits,
                           pointer<const void>(w_ih_parts)};
  args.scratch = static_cast<float*>(scratch(recurrent_forward_scratch(args) * sizeof(float)));
  if (Program* const program = recording()) {
    const auto sizes = std::make_shared<const std::vector<int64_t>>(batch_sizes);
    RecurrentForward kept = args;
    kept.batch_sizes = sizes->data();
    program->add([kept, sizes] { return recurrent_forward(kept), int64_t{-1}; });
  }
  py::gil_scoped_release unlocked;
  recurrent_forward(args);
}

void recurrent_gradients(RecurrentCell kind, const std::vector<int64_t>& batch_sizes, int64_t rows, int64_t batch,
                         int64_t hidden, bool reverse, address w_hh, address h0, address output, address gates,
                         address grad_output, address grad_h_n, address grad_x, address grad_h, address previous,
                         address grad_h0, int threads, bool digits) {
  refuse_recording("recurrent_backward");
  check_batch_sizes(batch_sizes, rows, batch);
  check(hidden >= 1, "recurrent_backward: sizes must be positive");
  check(kind != RecurrentCell::gru || (gates != 0 && grad_x != 0), "recurrent_backward: a GRU needs gates and grad_x");
  check(!digits || digit_tiles(), "recurrent_backward: the weight cannot come as digits");
  RecurrentBackward args = {kind, static_cast<int64_t>(batch_sizes.size()), batch_sizes.data(), hidden,
                      pointer<const void>(w_hh), pointer<const float>(h0), reverse, pointer<const float>(output),
                      pointer<const float>(gates), pointer<const float>(grad_output), pointer<const float>(grad_h_n),
                      pointer<float>(grad_x), pointer<float>(grad_h), pointer<float>(previous),
                      pointer<float>(grad_h0), nullptr, threads, digits};
  args.scratch = static_cast<float*>(scratch(recurrent_backward_scratch(args) * sizeof(float)));
  py::gil_scoped_release unlocked;
  recurrent_backward(args);
}

// Asks for huge pages (2 MB) for what of a range has not been touched yet. A hint: where there are none, nothing.
void use_huge_pages([[maybe_unused]] address start, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr address kPage = 65536;  // of any system
  const address low = (start + kPage - 1) / kPage * kPage, high = (start + bytes) / kPage * kPage;
  if (low < high) madvise(reinterpret_cast<void*>(low), high - low, MADV_HUGEPAGE);
#endif
}

}  // namespace

void define(py::module_& m) {
  m.def("pack_panels", &pack);
  py::class_<Samples>(m, "Samples")
      .def(py::init<const std::vector<std::pair<address, int64_t>>&>())
      .def("unchanged", &Samples::unchanged);
  m.def("packed_size", &packed_size);
  m.def("digit_tiles", &digit_tiles);
  m.def("digit_matmul", &multiply_in_digits);
  m.def("inputs_in_digits", &rows_in_digits);
  m.def("pack_digits", &pack_as_digits);
  m.def("evenness", &evenness_of);
  m.def("packed_digits_size", &packed_digits_size);
  m.def("lstm_forward", &forward);
  m.def("lstm_backward", &backward);
  m.def("lstm_cell", &cell);
  m.def("lstm_step", &lstm_step);
  m.def("lstm_step_begin", &begin_step);
  m.def("variant_forward", &run_variant_forward);
  m.def("variant_backward", &run_variant_backward);
  py::enum_<RecurrentCell>(m, "RecurrentCell")
      .value("gru", RecurrentCell::gru)
      .value("tanh", RecurrentCell::tanh)
      .value("relu", RecurrentCell::relu);
  m.def("recurrent_forward", &recurrent);
  m.def("recurrent_backward", &recurrent_gradients);
  m.def("use_huge_pages", &use_huge_pages);
}

}  // namespace fastlm::lstm_binding
