// Which instruction-set level the kernels run at.
//
// Every kernel is compiled once per level; the best level the processor has is chosen when the library loads, or
// the one named by the environment variable FASTLM_ISA.
#pragma once

#include <vector>

namespace fastlm {

// Levels compiled into this library that this processor can run, worst first. Never empty: "baseline" is there.
std::vector<const char*> isa_available();

// Levels compiled into this library, worst first, whether or not this processor can run them.
std::vector<const char*> isa_compiled();

// The level in use.
const char* isa_active();

// Switches to `level`. Returns false, changing nothing, where the level is unknown or the processor lacks it.
// Not thread-safe: meant for start-up and tests.
bool isa_force(const char* level);

// Floats in a vector at the level in use.
int simd_lanes();

}  // namespace fastlm
