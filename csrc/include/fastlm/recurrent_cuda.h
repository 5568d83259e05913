// CUDA: recurrent cells, an LSTM over a sequence, and one LSTM step. fastlm/reference/{lstm,gru}.py is the
// specification. Tensors are contiguous device memory of one `storage`; arithmetic is in float. Functions launch on
// `stream` (a cudaStream_t; null is the default stream) of the current device and return at once: null, or what went
// wrong. "Or null" means that the pointer may be null. Outputs alias nothing unless said.
#pragma once

#include <cstddef>
#include <cstdint>

#include "fastlm/storage.h"

namespace fastlm {

// The pointwise half of an LSTM step, gate order i, f, g, o; N is layer normalisation (eps 1e-5) where a gain is given:
//   i, f, g, o from N(gates_x) + b_ih + N(gates_h) + b_hh;  c~ = f c_prev + i g;  h~ = o tanh(N(c~))
//   c = c~ + zoneout_c (c_prev - c~);  h = h~ + zoneout_h (h_prev - h~)
struct LstmCellCuda {
  Storage storage;
  int64_t batch, hidden;
  const void* gates_x;            // [batch, 4 * hidden] W_ih x
  const void* gates_h;            // [batch, 4 * hidden] W_hh (m h_prev), or null: gates_x is the sum of both
  const void *b_ih, *b_hh;        // [4 * hidden] each or null
  const void *ln_ih, *ln_hh;      // [4 * hidden] gains, or null
  const void *ln_c, *ln_c_bias;   // [hidden] or null
  const void *h_prev, *c_prev;    // [batch, hidden]; h_prev is read for zoneout_h alone
  const void *zoneout_h, *zoneout_c;  // [batch, hidden] shares of the old, or null
  void *h, *c;                    // [batch, hidden] out; may be h_prev and c_prev
};
const char* lstm_cell_cuda(const LstmCellCuda& args, void* stream);

// Its gradients; nothing but the inputs was kept. Sums over the batch (biases, gains) are the caller's.
struct LstmCellGradientsCuda {
  LstmCellCuda cell;             // h and c are not used
  const void *grad_h, *grad_c;   // [batch, hidden] of h and c; grad_c or null
  void* grad_sum;                // [batch, 4 * hidden] out: of the sum that the gates' nonlinearities take
  void *grad_gates_x, *grad_gates_h;  // [batch, 4 * hidden] out; or null: the same as grad_sum, where without gain
  void *grad_ln_c, *grad_ln_c_bias;   // [batch, hidden] out, each row's part of those of the gain and bias; or null
  void *grad_h_prev, *grad_c_prev;    // [batch, hidden] out; may be grad_h and grad_c. grad_h_prev: what passes by
                                      // zoneout_h, or null
};
const char* lstm_cell_backward_cuda(const LstmCellGradientsCuda& args, void* stream);

// The pointwise half of a GRU step, gate order r, z, n; N as above:
//   x = N(gates_x) + b_ih, g = N(gates_h) + b_hh;  r, z = sigmoid(x + g);  n = tanh(x_n + r g_n)
//   h~ = (1 - z) n + z h_prev;  h = h~ + zoneout_h (h_prev - h~)
struct GruCellCuda {
  Storage storage;
  int64_t batch, hidden;
  const void *gates_x, *gates_h;  // [batch, 3 * hidden] W_ih x, W_hh (m h_prev)
  const void *b_ih, *b_hh;        // [3 * hidden] or null
  const void *ln_ih, *ln_hh;      // [3 * hidden] gains, or null
  const void* h_prev;             // [batch, hidden]
  const void* zoneout_h;          // [batch, hidden] shares of the old, or null
  void* h;                        // [batch, hidden] out; may be h_prev
};
const char* gru_cell_cuda(const GruCellCuda& args, void* stream);

// Its gradients, as the LSTM cell's.
struct GruCellGradientsCuda {
  GruCellCuda cell;                   // h is not used
  const void* grad_h;                 // [batch, hidden]
  void *grad_sum_x, *grad_sum_h;      // [batch, 3 * hidden] out: of x and g, in what r multiplies unlike
  void *grad_gates_x, *grad_gates_h;  // [batch, 3 * hidden] out; or null: the same as the sums', where without gain
  void* grad_h_prev;                  // [batch, hidden] out, without what comes through gates_h; may be grad_h
};
const char* gru_cell_backward_cuda(const GruCellGradientsCuda& args, void* stream);

// One whole LSTM step for few rows, products included: each weight is read once for up to 4 rows.
struct LstmStepCuda {
  Storage storage;
  int64_t batch, inputs, hidden;
  const void *x, *h_prev, *c_prev;  // [batch, inputs], [batch, hidden], [batch, hidden]
  const void *w_ih, *w_hh;          // [4 * hidden, inputs], [4 * hidden, hidden]
  const void *b_ih, *b_hh;          // [4 * hidden] or null
  void *h, *c;                      // [batch, hidden] out; h is not h_prev, c may be c_prev
};
const char* lstm_step_cuda(const LstmStepCuda& args, void* stream);

// An LSTM over a packed sequence in one launch: every block keeps its units' recurrent weights in shared memory (those
// that do not fit are read from the cache) and the blocks meet once a step.
struct LstmSequenceCuda {
  Storage storage;
  int64_t batch, hidden, steps;
  bool reverse;
  const int64_t* running;           // [steps] rows at each step, none more than before; running[0] == batch. Or null: all
  const int64_t* starts;            // [steps] first row of each step; or null with running
  const void* gates_x;              // [rows, 4 * hidden] W_ih x
  const void *b_ih, *b_hh;          // [4 * hidden] or null
  const void* w_hh;                 // [4 * hidden, hidden]
  const void *h0, *c0;              // [batch, hidden]
  const void* dropout;              // [batch, hidden] multiplies h before w_hh; or null
  const void *zoneout_h, *zoneout_c;  // [rows, hidden] or null
  void* output;                     // [rows, hidden] h of every step
  void* cells;                      // [rows, hidden] c of every step, or null
  void* gates_h;                    // [rows, 4 * hidden] W_hh (m h_prev) of every step, or null
  void *h_n, *c_n;                  // [batch, hidden]
  void* scratch;                    // lstm_sequence_cuda_scratch() bytes, aligned to 16; the first 64 are zero before first use
};
const char* lstm_sequence_cuda(const LstmSequenceCuda& args, void* stream);
std::size_t lstm_sequence_cuda_scratch(int64_t batch, int64_t hidden);

// Its gradients in one launch, with the columns of W_hh kept as its rows are above. Those of W_hh are the product of
// grad_sum and the (masked) h before each step, those of gates_x are grad_sum: the caller's, as sums over rows are.
struct LstmSequenceGradientsCuda {
  LstmSequenceCuda sequence;  // with cells and gates_h as it left them; w_hh, h0, output, h_n and c_n are not used
  const void* w_hh_t;         // [hidden, 4 * hidden] W_hh transposed, aligned to 16 bytes
  const void* grad_output;    // [rows, hidden] or null
  const void *grad_h_n, *grad_c_n;  // [batch, hidden] each or null
  void* grad_sum;                   // [rows, 4 * hidden] out: of the gates before activation; aligned to 16 bytes
  void *grad_h0, *grad_c0;          // [batch, hidden] out
};
const char* lstm_sequence_backward_cuda(const LstmSequenceGradientsCuda& args, void* stream);

// Why no kernel can run on the current device, as where none was compiled for its architecture; null where they can.
const char* cuda_device_error();
// Devices the CUDA runtime can use; 0 where there is no driver.
int cuda_device_count();

}  // namespace fastlm
