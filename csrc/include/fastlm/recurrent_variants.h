// LSTM and GRU with layer normalisation, variational recurrent dropout and zoneout, in any combination, forward and
// backward. With x = N(W_ih x) + b_ih, h = N(W_hh (m h)) + b_hh, for each gate:
//
//   LSTM  i, f, g, o from x + h; c~ = f c + i g; h~ = o tanh(N(c~)); c' = c~ + z_c (c - c~)
//   GRU   r, z from x + h; n = tanh(x_n + r h_n); h~ = n + z (h - n)
//   both  h' = h~ + z_h (h - h~)
//
// N: layer normalisation over all gates together (Ba et al., 2016, https://arxiv.org/abs/1607.06450) with gains, of c~
// with a bias too; m: one mask per row for the whole sequence (Gal & Ghahramani, 2016,
// https://arxiv.org/abs/1512.05287); z_h, z_c: shares of the old state that are kept (Krueger et al., 2017,
// https://arxiv.org/abs/1606.01305).
//
// Sizes, memory and packed sequences as in fastlm/lstm.h; G gates, 4 of an LSTM, 3 of a GRU; there is no projection.
// Results of a row depend neither on the other rows nor on the thread count.
#pragma once

#include <cstdint>

namespace fastlm {

// What differs from a plain layer; null where absent.
struct RecurrentVariant {
  const float* dropout;    // [B, H]: m
  const float* zoneout_h;  // z_h [N, H], or [H] where zoneout_stride is 0
  const float* zoneout_c;  // z_c alike; LSTM
  int64_t zoneout_stride;  // H or 0
  const float* ln_ih;      // [H/L][G][L]: gains of W_ih x, packed as a bias; these three: all or none
  const float* ln_hh;      // of W_hh (m h)
  const float* ln_c;       // [H], of c~; LSTM
  const float* ln_c_bias;  // [H] or null: zero
};

struct VariantForward {
  int64_t gates;  // 4: LSTM, 3: GRU
  int64_t steps;
  const int64_t* batch_sizes;  // [T]
  int64_t inputs, hidden;
  RecurrentVariant variant;
  const float* input;       // [N, I]
  const void* w_ih;         // [G H, I] packed, gates; as digits where `digits` (fastlm/pack.h)
  const void* w_hh;         // [G H, H] packed, gates; as digits where `digits`
  const float* bias;        // [H/L][4][L]: LSTM b_ih + b_hh; GRU those of r and z, b_in, b_hn
  const float* h0;          // [B, H]
  const float* c0;          // [B, H], LSTM
  const float* h0_dropped;  // [B, H]: m h0; h0 without dropout
  bool reverse;
  float* output;   // [N, H] out
  float* h_n;      // [B, H] out
  float* c_n;      // [B, H] out, LSTM
  float* dropped;  // [N, H] out: m h' with dropout, else null
  // For the backward pass, or null. Out; the last three with layer normalisation alone.
  float* activated;  // [H/L][N][4][L]: LSTM the gates; GRU r, z, n, h_n
  float* cells;      // [N, H], LSTM
  float* raw_ih;     // [H/L][N][G][L]: W_ih x
  float* raw_hh;     // alike: W_hh (m h)
  float* stats;      // [2 G - 2][N]: mean and 1 / standard deviation of W_ih x, W_hh (m h), LSTM c~
  float* scratch;    // variant_forward_scratch(...) floats, aligned to 64 bytes
  int threads;
  bool digits = false;  // as fastlm/lstm.h's
  const void* w_ih_parts = nullptr;
};
void variant_forward(const VariantForward& args);
int64_t variant_forward_scratch(const VariantForward& args);

struct VariantBackward {
  int64_t gates;
  int64_t steps;
  const int64_t* batch_sizes;
  int64_t hidden;
  RecurrentVariant variant;
  const void* w_hh;         // [G H, H] packed as it is (k = G H, n = H), or as digits in G groups
  const float* h0;          // as in the forward pass, from here to stats
  const float* h0_dropped;
  const float* c0;
  bool reverse;
  const float* output;
  const float* dropped;
  const float* activated;
  const float* cells;
  const float* raw_ih;
  const float* raw_hh;
  const float* stats;
  const float* grad_output;  // [N, H] or null: zero
  const float* grad_h_n;     // [B, H] or null
  const float* grad_c_n;     // [B, H] or null
  float* grad_gates;         // [N, G H] out: gradient of W_ih x, which without normalisation is x's
  float* grad_raw_hh;        // [N, G H] out: that of W_hh (m h); null of an LSTM without normalisation: it is the same
  // With layer normalisation, else null. Out.
  float* grad_bias;       // [4 H], in the order of `bias`
  float* grad_ln_ih;      // [G H]
  float* grad_ln_hh;      // [G H]
  float* grad_ln_c;       // [H], LSTM
  float* grad_ln_c_bias;  // [H], LSTM
  float* previous;        // [N, H] out: m h before each row's step, for the gradient of W_hh; or null
  float* grad_h0;         // [B, H] out
  float* grad_c0;         // [B, H] out, LSTM
  float* scratch;         // variant_backward_scratch(...) floats, aligned to 64 bytes
  int threads;
  bool digits = false;
};
void variant_backward(const VariantBackward& args);
int64_t variant_backward_scratch(const VariantBackward& args);

}  // namespace fastlm
