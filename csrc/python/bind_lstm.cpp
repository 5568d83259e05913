#include "bindings.h"

#include <stdexcept>
#include <utility>
#include <vector>

#include "fastlm/lstm.h"
#include "fastlm/pack.h"

namespace fastlm {
namespace {

void check(bool holds, const char* message) {
  if (!holds) throw std::invalid_argument(message);
}

void check_batch_sizes(const std::vector<int64_t>& sizes, int64_t rows, int64_t batch) {
  check(!sizes.empty(), "lstm: batch_sizes is empty, expected a size for each of at least one step");
  check(sizes[0] == batch, "lstm: batch_sizes begins with another number than the rows of h0");
  int64_t total = 0;
  for (size_t t = 0; t < sizes.size(); total += sizes[t++])
    check(sizes[t] >= 1 && (t == 0 || sizes[t] <= sizes[t - 1]),
          "lstm: batch_sizes has a size that is less than 1 or greater than the one before");
  check(total == rows, "lstm: batch_sizes does not sum to the rows of input");
}

void pack(address source, int64_t k, int64_t n, int64_t stride_k, int64_t stride_n, bool gates, address packed,
          int threads) {
  check(k >= 1 && n >= 1 && (!gates || n % 4 == 0), "pack_panels: k and n must be positive, and n four gates");
  py::gil_scoped_release unlocked;
  pack_panels({pointer<const float>(source), k, n, stride_k, stride_n, gates, pointer<float>(packed), threads});
}

// A hash of a few values spread over each of these float arrays: whether they are still what was packed.
uint64_t sample_hash(const std::vector<std::pair<address, int64_t>>& spans) {
  constexpr int64_t kSamples = 16;
  uint64_t hash = 1469598103934665603u;  // FNV-1a
  for (const auto& [start, count] : spans) {
    const uint32_t* bits = pointer<const uint32_t>(start);
    for (int64_t i = 0; i < kSamples; ++i) hash = (hash ^ bits[(count - 1) * i / (kSamples - 1)]) * 1099511628211u;
  }
  return hash;
}

void forward(const std::vector<int64_t>& batch_sizes, int64_t rows, int64_t batch, int64_t inputs, int64_t hidden,
             int64_t outputs, bool reverse, address input, address w_ih, address w_hh, address bias, address w_hr,
             address h0, address c0, address output, address h_n, address c_n, address gates, address cells,
             address unprojected, address scratch, int threads) {
  check_batch_sizes(batch_sizes, rows, batch);
  check(inputs >= 1 && hidden >= 1 && outputs >= 1, "lstm: sizes must be positive");
  check(w_hr != 0 || outputs == hidden, "lstm: outputs differ from hidden units, but there is no projection");
  py::gil_scoped_release unlocked;
  lstm_forward({static_cast<int64_t>(batch_sizes.size()), batch_sizes.data(), inputs, hidden, outputs,
                pointer<const float>(input), pointer<const float>(w_ih), pointer<const float>(w_hh),
                pointer<const float>(bias), pointer<const float>(w_hr), pointer<const float>(h0),
                pointer<const float>(c0), reverse, pointer<float>(output), pointer<float>(h_n), pointer<float>(c_n),
                pointer<float>(gates), pointer<float>(cells), pointer<float>(unprojected), pointer<float>(scratch),
                threads});
}

void backward(const std::vector<int64_t>& batch_sizes, int64_t rows, int64_t batch, int64_t hidden, int64_t outputs,
              bool reverse, address w_hh, address w_hr, address h0, address c0, address output, address gates,
              address cells, address grad_output, address grad_h_n, address grad_c_n, address grad_gates,
              address grad_projected, address previous, address grad_h0, address grad_c0, address scratch,
              int threads) {
  check_batch_sizes(batch_sizes, rows, batch);
  check(hidden >= 1 && outputs >= 1, "lstm: sizes must be positive");
  py::gil_scoped_release unlocked;
  lstm_backward({static_cast<int64_t>(batch_sizes.size()), batch_sizes.data(), hidden, outputs,
                 pointer<const float>(w_hh), pointer<const float>(w_hr), pointer<const float>(h0),
                 pointer<const float>(c0), reverse, pointer<const float>(output), pointer<const float>(gates),
                 pointer<const float>(cells), pointer<const float>(grad_output), pointer<const float>(grad_h_n),
                 pointer<const float>(grad_c_n), pointer<float>(grad_gates), pointer<float>(grad_projected),
                 pointer<float>(previous), pointer<float>(grad_h0), pointer<float>(grad_c0), pointer<float>(scratch),
                 threads});
}

void cell(int64_t batch, int64_t inputs, int64_t hidden, address input, address h, address c, address w_ih,
          address w_hh, address bias, address h_out, address c_out, int threads) {
  check(batch >= 1 && inputs >= 1 && hidden >= 1, "lstm_cell: sizes must be positive");
  py::gil_scoped_release unlocked;
  lstm_cell({batch, inputs, hidden, pointer<const float>(input), pointer<const float>(h), pointer<const float>(c),
             pointer<const float>(w_ih), pointer<const float>(w_hh), pointer<const float>(bias),
             pointer<float>(h_out), pointer<float>(c_out), threads});
}

}  // namespace

void bind_lstm(py::module_& m) {
  m.def("pack_panels", &pack);
  m.def("sample_hash", &sample_hash);
  m.def("packed_size", &packed_size);
  m.def("lstm_forward", &forward);
  m.def("lstm_forward_scratch", &lstm_forward_scratch);
  m.def("lstm_backward", &backward);
  m.def("lstm_backward_scratch", &lstm_backward_scratch);
  m.def("lstm_cell", &cell);
}

}  // namespace fastlm
