// The threads that run a kernel together, and a barrier that is kind to a busy machine.
#pragma once

#include <atomic>
#include <cstdint>

#include <sched.h>

namespace fastlm {

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

  // Forced inline: it is compiled at several instruction-set levels, and only one copy would stay.
  __attribute__((always_inline)) void wait() {
    const int threads = threads_.load(std::memory_order_relaxed);
    if (threads == 1) return;
    const uint32_t generation = generation_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == threads - 1) {
      arrived_.store(0, std::memory_order_relaxed);
      generation_.store(generation + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; generation_.load(std::memory_order_acquire) == generation;) {
      if (spins < kSpins)
        ++spins, relax();
      else
        sched_yield();
    }
  }

 private:
  static constexpr int kSpins = 2000;
  __attribute__((always_inline)) static void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }
  std::atomic<int> threads_;
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> generation_{0};
};

// A thread's place in the team that replays a program (fastlm/program.h). All of a team's threads go through all
// kernels, in step.
struct Team {
  int thread, threads;
  Barrier* barrier;
  int64_t* decisions;  // [2], shared by the team; see agree() in threads.h
  int64_t agreements;  // so far
  bool behind;         // the first thread has done work alone since the team last met
};

// The calling thread's team, or null outside a replay. Assignable.
Team*& current_team();

}  // namespace fastlm
