// Work sharing for the kernels: OpenMP regions (torch's own pool) and a barrier that is kind to a busy machine.
#pragma once

#include <atomic>
#include <cstdint>

#include <omp.h>
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

  // Before the first wait, by each thread, where the region has turned out to have another number of them.
  void set_threads(int threads) { threads_.store(threads, std::memory_order_relaxed); }

  void wait() {
    const int threads = threads_.load(std::memory_order_relaxed);
    if (threads == 1) return;
    const uint32_t generation = generation_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == threads - 1) {
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
  std::atomic<int> threads_;
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> generation_{0};
};

// Runs body(thread, threads, barrier) on each thread of one parallel region: on this thread alone where `threads` is
// 1, and on fewer than asked for where OpenMP has no more to give.
template <typename Body>
static inline void parallel(int threads, const Body& body) {
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
