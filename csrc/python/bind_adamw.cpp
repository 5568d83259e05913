#include <array>
#include <limits>
#include <vector>

#include "bindings.h"
#include "fastlm/adamw.h"

namespace fastlm::adamw_binding {
namespace {

using Addresses = std::array<address, 5>;  // parameter, gradient, first, second, steps

// Parameters as (addresses, counts), and for each group of them how many, then its rate, decay, betas and epsilon.
float step(const std::vector<Addresses>& addresses, const std::vector<int64_t>& counts,
           const std::vector<std::pair<int64_t, std::array<double, 5>>>& groups, double max_norm, int threads) {
  refuse_recording("adamw");
  std::vector<AdamWTensor> tensors;
  for (const auto& [size, options] : groups)
    for (int64_t i = 0; i < size; ++i) {
      const std::size_t at = tensors.size();
      if (at >= addresses.size() || at >= counts.size()) throw py::value_error("adamw: groups of more parameters");
      const auto& [parameter, gradient, first, second, steps] = addresses[at];
      const bool lacks = gradient == 0 || (parameter != 0 && (first == 0 || second == 0 || steps == 0));
      if (counts[at] < 0 || (counts[at] > 0 && lacks))
        throw py::value_error("adamw: a parameter without gradient or state");
      tensors.push_back({pointer<float>(parameter), pointer<float>(gradient), pointer<float>(first),
                         pointer<float>(second), pointer<float>(steps), counts[at], options[0], options[1], options[2],
                         options[3], options[4]});
    }
  if (tensors.size() != addresses.size() || tensors.size() != counts.size() || threads < 1 || !(max_norm > 0))
    throw py::value_error("adamw: groups of fewer parameters, or threads or max_norm out of range");
  float norm = 0;
  AdamW a = {tensors.data(), static_cast<int64_t>(tensors.size()), max_norm, &norm, nullptr, threads};
  a.scratch = static_cast<double*>(scratch(adamw_scratch(a) * sizeof(double)));
  launch(&adamw, a);
  return norm;
}

}  // namespace

void define(py::module_& m) {
  m.def("adamw", &step, py::arg("addresses"), py::arg("counts"), py::arg("groups"), py::arg("max_norm"),
        py::arg("threads"));
}

}  // namespace fastlm::adamw_binding
