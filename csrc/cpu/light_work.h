// How many threads pay for kernels that do little with each element.
#pragma once

#include "threads.h"

namespace fastlm {
namespace FASTLM_ISA {

// Fewer elements for each cost more than they save: a thread that has to be woken, or one of a team, awake already,
// which comes to the next barrier in any case.
constexpr int64_t kWorthAThread = 1 << 14, kWorthATeammate = 1 << 11;

static inline int light_threads(int64_t elements, int threads) {
  const int64_t useful = elements / (current_team() != nullptr ? kWorthATeammate : kWorthAThread);
  return useful < threads ? static_cast<int>(useful) : threads;
}

}  // namespace FASTLM_ISA
}  // namespace fastlm
