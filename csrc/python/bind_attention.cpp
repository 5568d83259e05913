// fastlm.ops.attention on the CPU.
#include <array>
#include <limits>
#include <string>

#include "bindings.h"
#include "fastlm/attention.h"

namespace fastlm::attention_binding {
namespace {

using Sizes = std::array<int64_t, 4>;

// A tensor [batch, heads, tokens, features] whose last dimension is contiguous.
struct Tensor {
  address data;
  Sizes shape, stride;

  explicit Tensor(const py::tuple& t)
      : data(t[0].cast<address>()), shape(t[1].cast<Sizes>()), stride(t[2].cast<Sizes>()) {}

  template <typename T>
  void give(const char* name, const Sizes& expected, T** to, int64_t (&strides)[3]) const {
    if (shape != expected) throw py::value_error(std::string("attention: the shape of ") + name + " does not fit");
    if (stride[3] != 1 && shape[3] != 1)
      throw py::value_error(std::string("attention: the last dimension of ") + name + " is not contiguous");
    *to = pointer<T>(data);
    for (int i = 0; i < 3; ++i) strides[i] = stride[i];
  }
};

Attention arguments(const py::tuple& q, const py::tuple& k, const py::tuple& v, const py::object& mask, bool additive,
                    address slopes, int64_t slopes_stride, float scale, float softcap, int64_t window, bool causal,
                    const py::tuple& out, address lse, bool bfloats, int threads) {
  const Tensor query(q), key(k), value(v), output(out);
  Attention a = {};
  a.batch = query.shape[0];
  a.heads = query.shape[1];
  a.queries = query.shape[2];
  a.dim = query.shape[3];
  a.kv_heads = key.shape[1];
  a.keys = key.shape[2];
  a.value_dim = value.shape[3];
  for (int64_t size : {a.batch, a.heads, a.queries, a.dim, a.kv_heads, a.keys, a.value_dim})
    if (size < 1) throw py::value_error("attention: an empty tensor");
  if (a.heads % a.kv_heads != 0 || threads < 1) throw py::value_error("attention: heads or threads out of range");
  query.give("query", query.shape, &a.query, a.query_stride);
  key.give("key", {a.batch, a.kv_heads, a.keys, a.dim}, &a.key, a.key_stride);
  value.give("value", {a.batch, a.kv_heads, a.keys, a.value_dim}, &a.value, a.value_stride);
  output.give("output", {a.batch, a.heads, a.queries, a.value_dim}, &a.output, a.output_stride);
  if (!mask.is_none()) {
    const py::tuple given = mask.cast<py::tuple>();
    a.mask_kind = additive ? AttentionMask::kAdditive : AttentionMask::kBool;
    a.mask = pointer<const void>(given[0].cast<address>());
    const Sizes stride = given[1].cast<Sizes>();
    for (int i = 0; i < 4; ++i) a.mask_stride[i] = stride[i];
  }
  a.slopes = pointer<const float>(slopes);
  a.slopes_stride = slopes_stride;
  a.scale = scale;
  a.softcap = softcap;
  a.window = window > 0 ? window : std::numeric_limits<int64_t>::max();
  a.causal = causal;
  a.lse = pointer<float>(lse);
  a.bfloats = bfloats;
  if (bfloats && (a.slopes != nullptr || a.mask_kind != AttentionMask::kNone))
    throw py::value_error("attention: bfloat16 with a mask or slopes");
  a.threads = threads;
  return a;
}

template <typename... Given>
void forward(Given... given) {
  refuse_recording("attention");
  Attention a = arguments(given...);
  a.scratch = static_cast<float*>(scratch(attention_scratch(a) * sizeof(float)));
  launch(&attention, a);
}

void backward(const py::tuple& forward_arguments, const py::tuple& grad_output, const py::tuple& grad_query,
              const py::tuple& grad_key, const py::tuple& grad_value) {
  refuse_recording("attention_backward");
  const auto& f = forward_arguments;
  AttentionBackward g = {};
  g.a = arguments(f[0], f[1], f[2], f[3], f[4].cast<bool>(), f[5].cast<address>(), f[6].cast<int64_t>(),
                  f[7].cast<float>(), f[8].cast<float>(), f[9].cast<int64_t>(), f[10].cast<bool>(), f[11],
                  f[12].cast<address>(), f[13].cast<bool>(), f[14].cast<int>());
  const Attention& a = g.a;
  if (a.lse == nullptr) throw py::value_error("attention_backward: no log-sum-exp");
  const Sizes query = {a.batch, a.heads, a.queries, a.dim};
  const Sizes key = {a.batch, a.kv_heads, a.keys, a.dim}, value = {a.batch, a.kv_heads, a.keys, a.value_dim};
  Tensor(grad_output)
      .give("grad_output", {a.batch, a.heads, a.queries, a.value_dim}, &g.grad_output, g.grad_output_stride);
  Tensor(grad_query).give("grad_query", query, &g.grad_query, g.grad_query_stride);
  Tensor(grad_key).give("grad_key", key, &g.grad_key, g.grad_key_stride);
  Tensor(grad_value).give("grad_value", value, &g.grad_value, g.grad_value_stride);
  g.threads = a.threads;
  g.a.scratch = static_cast<float*>(scratch(attention_backward_scratch(g) * sizeof(float)));
  launch(&attention_backward, g);
}

}  // namespace

// Tensors are (address, shape, strides), the mask (address, strides of its broadcast shape).
void define(py::module_& m) {
  m.def("attention", &forward<const py::tuple&, const py::tuple&, const py::tuple&, const py::object&, bool, address,
                              int64_t, float, float, int64_t, bool, const py::tuple&, address, bool, int>);
  m.def("attention_backward", &backward);
}

}  // namespace fastlm::attention_binding
