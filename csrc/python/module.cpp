// The Python module fastlm._native. Bindings convert, validate, release the GIL and call: no maths here, and no
// torch. Tensors arrive as addresses, checked once in Python (fastlm/kernels); each op in a bind_<op>.cpp of its own.
#include "bindings.h"
#include "exchange.h"

#include "fastlm/isa.h"

PYBIND11_MODULE(_native, m) {
  m.doc() = "fastlm's CPU kernels. Use fastlm.ops; this module takes raw addresses and checks little.";
  m.def("isa_available", &fastlm::isa_available);
  m.def("isa_compiled", &fastlm::isa_compiled);
  m.def("isa_active", &fastlm::isa_active);
  m.def("isa_force", &fastlm::isa_force, py::arg("level"));
  m.def("simd_lanes", &fastlm::simd_lanes);
  m.def("set_exchange", &fastlm::set_exchange, py::arg("capsule"), py::arg("tensor"), py::arg("parameter"));
  fastlm::activation_binding::define(m);
  fastlm::adamw_binding::define(m);
  fastlm::attention_binding::define(m);
  fastlm::attention_decode_binding::define(m);
  fastlm::elementwise_binding::define(m);
  fastlm::matmul_binding::define(m);
  fastlm::norm_binding::define(m);
  fastlm::greedy_binding::define(m);
  fastlm::linear_binding::define(m);
  fastlm::lstm_binding::define(m);
  fastlm::bind_program(m);
  fastlm::rotary_binding::define(m);
  fastlm::sample_binding::define(m);
  fastlm::softmax_loss_binding::define(m);
}
