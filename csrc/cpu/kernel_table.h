// The table of kernels: one instance per instruction-set level, filled in table.cpp.
//
// To add a kernel: declare its arguments in include/fastlm/<op>.h, implement it in cpu/<op>.cpp inside
// `namespace fastlm::FASTLM_ISA`, and add one line to FASTLM_KERNEL_LIST below. The public function
// fastlm::<name>(args) then calls the active level's version.
#pragma once

#include "fastlm/activation.h"
#include "fastlm/adamw.h"
#include "fastlm/attention.h"
#include "fastlm/attention_decode.h"
#include "fastlm/elementwise.h"
#include "fastlm/greedy.h"
#include "fastlm/kv_append.h"
#include "fastlm/linear.h"
#include "fastlm/lstm.h"
#include "fastlm/math.h"
#include "fastlm/matmul.h"
#include "fastlm/norm.h"
#include "fastlm/pack.h"
#include "fastlm/recurrent.h"
#include "fastlm/recurrent_variants.h"
#include "fastlm/rotary.h"
#include "fastlm/sample.h"
#include "fastlm/softmax_loss.h"

// X(return type, name, parameter list, argument list)
#define FASTLM_KERNEL_LIST(X)                                                       \
  X(int64_t, sample, (const SampleArgs& args), (args))                              \
  X(int, simd_lanes, (), ())                                                        \
  X(void, activation, (const Activation& a), (a))                                   \
  X(void, activation_backward, (const ActivationBackward& a), (a))                  \
  X(void, adamw, (const AdamW& a), (a))                                             \
  X(int64_t, adamw_scratch, (const AdamW& a), (a))                                  \
  X(void, add, (const Add& a), (a))                                                 \
  X(void, convert, (const Convert& a), (a))                                         \
  X(void, copy_rows, (const CopyRows& a), (a))                                      \
  X(void, kv_append, (const KvAppend& a), (a))                                      \
  X(void, offset, (const Offset& a), (a))                                           \
  X(void, linear, (const LinearArgs& a), (a))                                       \
  X(void, coarsen, (const Coarsen& a), (a))                                         \
  X(int64_t, greedy, (const Greedy& a), (a))                                        \
  X(int64_t, greedy_scratch, (const Greedy& a), (a))                                \
  X(void, interleave, (const Interleave& a), (a))                                   \
  X(int64_t, dequantize_rows, (const DequantizeArgs& a), (a))                       \
  X(void, attention, (const Attention& a), (a))                                     \
  X(int64_t, attention_scratch, (const Attention& a), (a))                          \
  X(void, attention_backward, (const AttentionBackward& a), (a))                    \
  X(int64_t, attention_backward_scratch, (const AttentionBackward& a), (a))         \
  X(void, attention_decode, (const AttentionDecode& a), (a))                        \
  X(int64_t, attention_decode_check, (const AttentionDecode& a), (a))               \
  X(int64_t, attention_decode_scratch, (const AttentionDecode& a, int64_t longest), (a, longest)) \
  X(void, math_apply, (MathFunction f, const float* x, float* y, int64_t n), (f, x, y, n)) \
  X(void, matmul, (const Matmul& a), (a))                                           \
  X(int64_t, matmul_scratch, (const Matmul& a), (a))                                \
  X(void, float_matmul, (const FloatMatmul& a), (a))                                \
  X(int64_t, float_matmul_scratch, (const FloatMatmul& a), (a))                     \
  X(void, norm, (const Norm& a), (a))                                               \
  X(void, norm_backward, (const NormBackward& a), (a))                              \
  X(int64_t, norm_backward_scratch, (const NormBackward& a), (a))                   \
  X(void, pack_panels, (const PackPanels& a), (a))                                  \
  X(void, digit_matmul, (const DigitMatmul& a), (a))                                \
  X(int64_t, digit_matmul_scratch, (const DigitMatmul& a), (a))                     \
  X(void, pack_digits, (const PackDigits& a), (a))                                  \
  X(int64_t, inputs_in_digits, (const InputsInDigits& a), (a))                      \
  X(int64_t, evenness, (const Evenness& a), (a))                                    \
  X(int64_t, packed_digits_size, (int64_t k, int64_t n, int64_t gates, int64_t groups), (k, n, gates, groups)) \
  X(void, softmax_loss, (const SoftmaxLoss& a), (a))                                \
  X(int64_t, softmax_loss_scratch, (const SoftmaxLoss& a), (a))                     \
  X(void, rotary, (const Rotary& a), (a))                                           \
  X(int64_t, packed_size, (int64_t k, int64_t n, int64_t gates, bool bfloat), (k, n, gates, bfloat)) \
  X(void, lstm_forward, (const LstmForward& a), (a))                                \
  X(int64_t, lstm_forward_scratch, (const LstmForward& a), (a))                     \
  X(void, lstm_backward, (const LstmBackward& a), (a))                              \
  X(int64_t, lstm_backward_scratch, (const LstmBackward& a), (a))                   \
  X(void, variant_forward, (const VariantForward& a), (a))                          \
  X(int64_t, variant_forward_scratch, (const VariantForward& a), (a))               \
  X(void, variant_backward, (const VariantBackward& a), (a))                        \
  X(int64_t, variant_backward_scratch, (const VariantBackward& a), (a))             \
  X(void, lstm_cell, (const LstmCell& a), (a))                                      \
  X(int64_t, lstm_cell_scratch, (const LstmCell& a), (a))                           \
  X(void, recurrent_forward, (const RecurrentForward& a), (a))                      \
  X(int64_t, recurrent_forward_scratch, (const RecurrentForward& a), (a))           \
  X(void, recurrent_backward, (const RecurrentBackward& a), (a))                    \
  X(int64_t, recurrent_backward_scratch, (const RecurrentBackward& a), (a))

namespace fastlm {

struct KernelTable {
  const char* isa;
#define X(ret, name, params, args) ret(*name) params;
  FASTLM_KERNEL_LIST(X)
#undef X
};

const KernelTable& kernels();

}  // namespace fastlm
