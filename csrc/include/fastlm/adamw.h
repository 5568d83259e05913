// A step of AdamW (Loshchilov & Hutter, 2019, https://arxiv.org/abs/1711.05101) for all parameters of a model, with the
// clipping of their gradients.
#pragma once

#include <cstdint>

namespace fastlm {

// A parameter and what belongs to it; nothing overlaps.
struct AdamWTensor {
  float* parameter;  // [count]; null: another optimiser's, whose gradient counts in the norm and is clipped in place
  float* gradient;   // [count]; of a parameter that is updated here it is only read
  float* first;      // [count], the running mean of gradients
  float* second;     // [count], of their squares
  float* steps;      // [1], the steps done; one more afterwards
  int64_t count;
  double rate, decay, beta1, beta2, epsilon;
};

struct AdamW {
  const AdamWTensor* tensors;  // [size]
  int64_t size;
  double max_norm;  // of all gradients together; infinite: no clipping
  float* norm;      // [1] out: what it was
  double* scratch;  // adamw_scratch(args) doubles
  int threads;
};

// With c = min(1, max_norm / (norm + 1e-6)), as torch clips, and in step t of a parameter
//   g = c gradient, m += (1 - beta1) (g - m), v = beta2 v + (1 - beta2) g^2,
//   p = (1 - rate decay) p - rate / (1 - beta1^t) m / (sqrt(v / (1 - beta2^t)) + epsilon).
// Neither `threads` nor a tensor's place in memory changes a bit of the result.
void adamw(const AdamW& args);
int64_t adamw_scratch(const AdamW& args);

}  // namespace fastlm
