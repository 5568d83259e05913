// The Python module fastlm._native. Bindings convert, validate, release the GIL and call: no maths here, and no
// torch. Tensors arrive as addresses, checked once in Python (fastlm/kernels); each bind_<op> is in its own file.
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
  fastlm::bind_activation(m);
  fastlm::bind_adamw(m);
  fastlm::bind_attention(m);
  fastlm::bind_attention_decode(m);
  fastlm::bind_elementwise(m);
  fastlm::bind_matmul(m);
  fastlm::bind_norm(m);
  fastlm::bind_greedy(m);
  fastlm::bind_linear(m);
  fastlm::bind_lstm(m);
  fastlm::bind_program(m);
  fastlm::bind_rotary(m);
  fastlm::bind_sample(m);
  fastlm::bind_softmax_loss(m);
}
