// Long short-term memory: a layer over packed sequences, forward and backward, and a single step.
//
//   i, f, o = sigmoid(x W_ih^T + h W_hh^T + b), g = tanh(...), c' = f c + i g, h' = o tanh(c') [W_hr^T]
//
// Gate order i, f, g, o, as in torch. Sak et al., 2014 (https://arxiv.org/abs/1402.1128) for the projection W_hr.
//
// Sizes: T steps, N rows in all, B = batch_sizes[0], I inputs, H hidden units, P outputs (P == H without W_hr),
// L lanes (simd_lanes()), and ceil(n / m) written n/m. Weights come packed (fastlm/pack.h). All memory is the
// caller's, float, row-major and contiguous; nothing is kept after the call. Results of a row depend neither on the
// other rows nor on the thread count.
#pragma once

#include <cstdint>

namespace fastlm {

struct LstmForward {
  int64_t steps;               // T >= 1
  const int64_t* batch_sizes;  // [T], none increasing, all >= 1: rows of each step, as in torch's PackedSequence
  int64_t inputs, hidden, outputs;
  const float* input;  // [N, I], time-major
  bool bfloat;         // whether the three packed weights are bfloat16; else float
  const void* w_ih;    // [4H, I] packed, gates
  const void* w_hh;    // [4H, P] packed, gates
  const float* bias;   // [H/L][4][L], b_ih + b_hh: packed, gates, with k = 1
  const void* w_hr;    // [P, H] packed transposed (k = H, n = P), or null: no projection
  const float* h0;     // [B, P]
  const float* c0;     // [B, H]
  bool reverse;        // from the last step to the first; rows join as the batch sizes grow
  float* output;       // [N, P] out
  float* h_n;          // [B, P] out: each row's state after its last step
  float* c_n;          // [B, H] out
  // For the backward pass, or null: activated gates [H/L][N][4][L], cell states [N, H], and with a projection
  // o tanh(c) [N, H]. Out; all or none.
  float* gates;
  float* cells;
  float* unprojected;
  float* scratch;  // lstm_forward_scratch(args) floats, aligned to 64 bytes
  int threads;
  // w_ih and w_hh come as digits (pack_digits; digit_tiles() alone), without a projection. Other bits than with floats.
  bool digits = false;
  const void* w_ih_parts = nullptr;  // w_ih as parts; null where inputs_in_digits()
};
void lstm_forward(const LstmForward& args);
int64_t lstm_forward_scratch(const LstmForward& args);  // of addresses, looks at those of batch_sizes, gates, w_hr, w_ih_parts

struct LstmBackward {
  int64_t steps;
  const int64_t* batch_sizes;
  int64_t hidden, outputs;
  const void* w_hh;   // [4H, P] packed as it is (k = 4H, n = P); as digits, with 4 groups of k
  const float* w_hr;  // [P, H] packed as it is (k = P, n = H), or null
  const float* h0;    // as in the forward pass, from here to unprojected
  const float* c0;
  bool reverse;
  const float* output;
  const float* gates;
  const float* cells;
  const float* grad_output;  // [N, P] or null: zero
  const float* grad_h_n;     // [B, P] or null
  const float* grad_c_n;     // [B, H] or null
  float* grad_gates;         // [N, 4H] out: gradient of the gates before activation
  float* grad_projected;     // [N, P] out: gradient of h, with a projection; else null
  float* previous;           // [N, P] out: h before each row's step, for the gradient of W_hh; or null
  float* grad_h0;            // [B, P] out
  float* grad_c0;            // [B, H] out
  float* scratch;            // lstm_backward_scratch(args) floats, aligned to 64 bytes
  int threads;
  bool digits = false;  // w_hh comes as digits, without a projection
};
void lstm_backward(const LstmBackward& args);
int64_t lstm_backward_scratch(const LstmBackward& args);  // of addresses, looks at those of batch_sizes and w_hr

// One step of a batch, without projection. Gives the same bits as lstm_forward, floats or digits.
struct LstmCell {
  int64_t batch, inputs, hidden;
  const float* input;  // [B, I]
  const float* h;      // [B, H]
  const float* c;      // [B, H]
  bool bfloat;         // of w_ih and w_hh, which are packed as for lstm_forward, and the bias
  const void* w_ih;
  const void* w_hh;
  const float* bias;
  float* h_out;  // [B, H] out; may not be h
  float* c_out;  // [B, H] out; may be c
  float* output;  // [B, H] out: h_out once more, in memory of its own, or null
  int threads;
  bool digits = false;  // as lstm_forward's
  const void* w_ih_parts = nullptr;
  float* scratch = nullptr;  // lstm_cell_scratch(args) floats, aligned to 64 bytes
};
void lstm_cell(const LstmCell& args);
int64_t lstm_cell_scratch(const LstmCell& args);  // of addresses, looks at that of w_ih_parts

}  // namespace fastlm
