// Work sharing for the kernels: OpenMP regions (torch's own pool) and a barrier that is kind to a busy machine.
#pragma once

#include <atomic>
#include <cstdint>

#include <sched.h>

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

static inline void cpu_relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// A barrier for the threads of one parallel region. Spins for a few microseconds, the time in which an idle
// machine's other threads arrive, and then yields: a pure spin burns the very core the late thread waits for when
// the machine is loaded (measured: 100 times slower).
class Barrier {
 public:
  explicit Barrier(int threads) : threads_(threads) {}
  Barrier(const Barrier&) = delete;
  Barrier& operator=(const Barrier&) = delete;

  void wait() {
    if (threads_ == 1) return;
    const uint32_t generation = generation_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == threads_ - 1) {
      arrived_.store(0, std::memory_order_relaxed);
      generation_.store(generation + 1, std::memory_order_release);
      return;
    }
    for (int spin = 0; generation_.load(std::memory_order_acquire) == generation; ++spin) {
      if (spin < kSpins)
        cpu_relax();
      else
        sched_yield();
    }
  }

 private:
  static constexpr int kSpins = 2000;
  const int threads_;
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> generation_{0};
};

}  // namespace FASTLM_ISA
}  // namespace fastlm
