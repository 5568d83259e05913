// Work sharing for the kernels: OpenMP regions (torch's own pool), or the team that replays a program.
#pragma once

#include <cstdint>

#include <omp.h>

#include "team.h"

namespace fastlm {
namespace FASTLM_ISA {

// The half-open range of [0, n) that `thread` of `threads` owns, in multiples of `grain`.
struct Range {
  int64_t begin, end;
};
static inline Range share(int64_t n, int thread, int threads, int64_t grain = 1) {
  const int64_t units = (n + grain - 1) / grain;
  const int64_t low = units * thread / threads * grain;
  const int64_t high = units * (thread + 1) / threads * grain;
  return {low < n ? low : n, high < n ? high : n};
}

// The value of f(). In a replay the first thread alone computes it, for all: what f reads, that thread may have written
// just now or may overwrite soon after, so the others could find something else and go another way. Kernels need this
// for what they decide by looking into memory outside of `parallel`.
template <typename F>
static inline int64_t agree(const F& f) {
  Team* const team = current_team();
  if (team == nullptr || team->threads == 1) return f();
  // In turns: before a place is written again, every thread has come to the barrier in between.
  int64_t& decision = team->decisions[team->agreements++ % 2];
  if (team->thread == 0) decision = f();
  team->barrier->wait();
  team->behind = false;
  return decision;
}

// Runs body(thread, threads, barrier) on each thread of one parallel region: on this thread alone where `threads` is
// 1, and on fewer than asked for where OpenMP has no more to give.
//
// In a replay there is a region already, and all of its threads call this: the body runs on all of them or, where
// `threads` is 1, on the first, for whom the others wait only when they next need to. So a kernel writes to memory
// inside the body alone.
template <typename Body>
static inline void parallel(int threads, const Body& body) {
  if (Team* const team = current_team()) {
    if (threads > 1 && team->threads > 1) {
      if (team->behind) team->barrier->wait();
      team->behind = false;
      body(team->thread, team->threads, *team->barrier);
      team->barrier->wait();
    } else {
      Barrier alone(1);
      if (team->thread == 0) body(0, 1, alone);
      team->behind = true;
    }
    return;
  }
  Barrier barrier(threads > 1 ? threads : 1);
  if (threads <= 1) return body(0, 1, barrier);
#pragma omp parallel num_threads(threads)
  {
    const int team = omp_get_num_threads();
    barrier.set_threads(team);
    body(omp_get_thread_num(), team, barrier);
  }
}

}  // namespace FASTLM_ISA
}  // namespace fastlm
