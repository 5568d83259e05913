// Parts of `linear` for kernels that compute some outputs of their own accord (linear.cpp).
#pragma once

#include "fastlm/linear.h"

namespace fastlm {
namespace FASTLM_ISA {

// This thread's share of rounding a.input to a.scratch. The threads then have to meet.
void round_inputs(const LinearArgs& a, int thread, int threads);

// Outputs begin .. end - 1 of all rows, of inputs that have been rounded if they are to be; begin is a multiple of
// kLanes. To the bit what `linear` writes there.
void linear_outputs(const LinearArgs& a, const LinearWeight& w, int64_t begin, int64_t end);

}  // namespace FASTLM_ISA
}  // namespace fastlm
