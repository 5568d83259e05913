// Cross entropy of rows of logits, and its gradient in their place.
#pragma once

#include <cstdint>

namespace fastlm {

// With x = logits + bias, p = softmax(x), y = (1 - smoothing) onehot(target) + smoothing / columns:
//   losses = -sum(y log p), gradient = factor (p - y).
// A row's result depends on that row alone: neither its place, nor `rows`, nor `threads` changes a bit of it.
struct SoftmaxLoss {
  void* logits;           // [rows, columns], contiguous; floats or bfloat16. With factors the gradient replaces them
  const float* bias;      // [columns] or null
  const int64_t* target;  // [rows], each in [0, columns) or ignore_index: loss and gradient are then 0
  const float* factors;   // [rows]; or null: losses alone
  float* losses;          // [rows]
  float* scratch;         // softmax_loss_scratch(args) floats
  int64_t rows, columns, ignore_index;
  float smoothing;
  bool bfloats;  // logits, and the gradient, are bfloat16, rounded to nearest even
  int threads;
};
void softmax_loss(const SoftmaxLoss& args);
int64_t softmax_loss_scratch(const SoftmaxLoss& args);

}  // namespace fastlm
