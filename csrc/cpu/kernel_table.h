// The table of kernels: one instance per instruction-set level, filled in table.cpp.
//
// To add a kernel: declare its arguments in include/fastlm/<op>.h, implement it in cpu/<op>.cpp inside
// `namespace fastlm::FASTLM_ISA`, and add one line to FASTLM_KERNEL_LIST below. The public function
// fastlm::<name>(args) then calls the active level's version.
#pragma once

#include "fastlm/math.h"

// X(return type, name, parameter list, argument list)
#define FASTLM_KERNEL_LIST(X)                                                       \
  X(int, simd_lanes, (), ())                                                        \
  X(void, math_apply, (MathFunction f, const float* x, float* y, int64_t n), (f, x, y, n))

namespace fastlm {

struct KernelTable {
  const char* isa;
#define X(ret, name, params, args) ret(*name) params;
  FASTLM_KERNEL_LIST(X)
#undef X
};

const KernelTable& kernels();

}  // namespace fastlm
