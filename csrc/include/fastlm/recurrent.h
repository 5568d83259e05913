// GRU and plain RNN: a layer over packed sequences, forward and backward. A single step is a sequence of one.
//
//   GRU:         r, z = sigmoid(W_ih x + b_ih + W_hh h + b_hh), n = tanh(W_in x + b_in + r (W_hn h + b_hn)),
//                h' = n + z (h - n); gate order r, z, n, as in torch. Cho et al., 2014, https://arxiv.org/abs/1406.1078
//   tanh, relu:  h' = f(W_ih x + b_ih + W_hh h + b_hh)
//
// Sizes, memory and packed sequences as in fastlm/lstm.h. Results of a row depend neither on the other rows nor on the
// steps done at once nor on the thread count.
#pragma once

#include <cstdint>

namespace fastlm {

enum class RecurrentCell { gru, tanh, relu };

struct RecurrentForward {
  RecurrentCell cell;
  int64_t steps;               // T >= 1
  const int64_t* batch_sizes;  // [T], none increasing, all >= 1
  int64_t inputs, hidden;
  const float* input;  // [N, I], time-major
  bool bfloat;         // whether the two packed weights are bfloat16; else float
  const void* w_ih;    // [3H, I] packed, 3 gates; tanh, relu: [H, I] packed transposed (k = I, n = H)
  const void* w_hh;    // [3H, H] or [H, H], packed alike
  const float* bias;   // r's and z's b_ih + b_hh, b_in, b_hn: [4H] packed with k = 1, 4 gates; tanh, relu: b_ih + b_hh,
                       // [H] packed with k = 1
  const float* h0;     // [B, H]
  bool reverse;        // from the last step to the first
  float* output;       // [N, H] out
  float* h_n;          // [B, H] out: each row's state after its last step
  float* gates;        // out, for a GRU's backward pass: r, z, n and W_hn h + b_hn, [H/L][N][4][L]; or null
  float* scratch;      // recurrent_forward_scratch(args) floats, aligned to 64 bytes
  int threads;
  // w_ih and w_hh as digits (fastlm/pack.h), in other bits; not for relu, which has no bound
  bool digits = false;
  const void* w_ih_parts = nullptr;  // as fastlm/lstm.h's
};
void recurrent_forward(const RecurrentForward& args);
int64_t recurrent_forward_scratch(const RecurrentForward& args);  // of addresses, looks at batch_sizes' and gates'

struct RecurrentBackward {
  RecurrentCell cell;
  int64_t steps;
  const int64_t* batch_sizes;
  int64_t hidden;
  const void* w_hh;   // [3H, H] or [H, H] packed as it is (k = rows, n = H), float; as digits, with a group of k a gate
  const float* h0;    // as in the forward pass, from here to gates
  bool reverse;
  const float* output;
  const float* gates;        // of a GRU; else unused
  const float* grad_output;  // [N, H] or null: zero
  const float* grad_h_n;     // [B, H] or null
  float* grad_x;             // [N, 3H] out: gradient of W_ih x + b_ih; unused but for a GRU, where it is not grad_h's
  float* grad_h;             // [N, 3H] or [N, H] out: gradient of W_hh h + b_hh
  float* previous;           // [N, H] out: h before each row's step, for the gradient of W_hh; or null
  float* grad_h0;            // [B, H] out
  float* scratch;            // recurrent_backward_scratch(args) floats, aligned to 64 bytes
  int threads;
  bool digits = false;  // w_hh comes as digits; whatever the cell
};
void recurrent_backward(const RecurrentBackward& args);
int64_t recurrent_backward_scratch(const RecurrentBackward& args);  // of addresses, looks at that of batch_sizes

}  // namespace fastlm
