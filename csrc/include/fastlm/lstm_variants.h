// LSTM with layer normalisation, variational recurrent dropout and zoneout, in any combination, forward and backward.
//
//   i, f, g, o from N(x W_ih^T) + N((m h) W_hh^T) + b; c~ = f c + i g; h~ = o tanh(N(c~));
//   c' = c~ + z_c (c - c~), h' = h~ + z_h (h - h~)
//
// N: layer normalisation (Ba et al., 2016, https://arxiv.org/abs/1607.06450) with gains, of c~ with a bias too; m: one
// mask per row for the whole sequence (Gal & Ghahramani, 2016, https://arxiv.org/abs/1512.05287); z: shares of the old
// state that are kept (Krueger et al., 2017, https://arxiv.org/abs/1606.01305).
//
// Sizes, memory and packed sequences as in fastlm/lstm.h; there is no projection. Results of a row depend neither on
// the other rows nor on the thread count.
#pragma once

#include <cstdint>

namespace fastlm {

// What differs from a plain LSTM; null where absent.
struct LstmVariant {
  const float* dropout;    // [B, H]: m
  const float* zoneout_h;  // z_h [N, H], or [H] where zoneout_stride is 0
  const float* zoneout_c;  // z_c alike
  int64_t zoneout_stride;  // H or 0
  const float* ln_ih;      // [H/L][4][L]: gains of x W_ih^T, packed as the bias; these three: all or none
  const float* ln_hh;      // of (m h) W_hh^T
  const float* ln_c;       // [H], of c~
  const float* ln_c_bias;  // [H] or null: zero
};

struct LstmVariantForward {
  int64_t steps;
  const int64_t* batch_sizes;  // [T]
  int64_t inputs, hidden;
  LstmVariant variant;
  const float* input;      // [N, I]
  const float* w_ih;       // [4H, I] packed, gates
  const float* w_hh;       // [4H, H] packed, gates
  const float* bias;       // [H/L][4][L], b_ih + b_hh
  const float* h0;         // [B, H]
  const float* c0;         // [B, H]
  const float* h0_dropped;  // [B, H]: m h0; h0 without dropout
  bool reverse;
  float* output;   // [N, H] out
  float* h_n;      // [B, H] out
  float* c_n;      // [B, H] out
  float* dropped;  // [N, H] out: m h' with dropout, else null
  // For the backward pass, or null. Out; the last three with layer normalisation alone.
  float* gates;   // [H/L][N][4][L], activated
  float* cells;   // [N, H]
  float* raw_ih;  // [N, 4H]: x W_ih^T
  float* raw_hh;  // [H/L][N][4][L]: (m h) W_hh^T
  float* stats;   // [6][N]: mean and 1 / standard deviation of x W_ih^T, (m h) W_hh^T, c~
  float* scratch;  // lstm_variant_forward_scratch(...) floats
  int threads;
};
void lstm_variant_forward(const LstmVariantForward& args);
int64_t lstm_variant_forward_scratch(int64_t rows, int64_t batch, int64_t hidden, bool norm, bool save);

struct LstmVariantBackward {
  int64_t steps;
  const int64_t* batch_sizes;
  int64_t hidden;
  LstmVariant variant;
  const float* w_hh;        // [4H, H] packed as it is (k = 4H, n = H)
  const float* h0_dropped;  // as in the forward pass, from here to stats
  const float* c0;
  bool reverse;
  const float* output;
  const float* dropped;
  const float* gates;
  const float* cells;
  const float* raw_hh;
  const float* stats;
  const float* grad_output;  // [N, H] or null: zero
  const float* grad_h_n;     // [B, H] or null
  const float* grad_c_n;     // [B, H] or null
  float* grad_gates;         // [N, 4H] out: gradient of the gates before activation
  float* grad_raw_hh;        // [N, 4H] out: that of (m h) W_hh^T, with layer normalisation; else null: it is the same
  float* grad_ln_hh;         // [4H] out, these three with layer normalisation; else null
  float* grad_ln_c;          // [H] out
  float* grad_ln_c_bias;     // [H] out
  float* previous;           // [N, H] out: m h before each row's step, for the gradient of W_hh; or null
  float* grad_h0;            // [B, H] out
  float* grad_c0;            // [B, H] out
  float* scratch;            // lstm_variant_backward_scratch(...) floats
  int threads;
};
void lstm_variant_backward(const LstmVariantBackward& args);
int64_t lstm_variant_backward_scratch(int64_t batch, int64_t hidden, bool norm);

}  // namespace fastlm
