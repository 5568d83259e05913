// Runs CUDA device code on the CPU, as a test tool: a fiber for each thread of a block, barriers, warp operations, shared
// memory, atomics, and grids whose blocks are all alive at once. Device code is compiled by the host compiler with this
// header in place of the CUDA runtime's; one OS thread runs everything, so a run can be repeated exactly.
//
// What a launch detects and reports, naming the thread:
// - a barrier that not all threads of the block reach, or that they reach at different lines;
// - a warp operation whose mask leaves out the caller, names lanes that have exited, or reads from a lane outside it;
// - blocks that wait for each other for ever;
// and, in sources compiled with -fsanitize=thread (whose runtime is not linked: access_log.cpp has the functions that
// the compiler calls at every load and store),
// - a load or store outside shared memory, the thread's own stack and the buffers given to watch(), once there are any;
// - races: two accesses of the same bytes by different threads, at least one of them a plain store, that no barrier,
//   __syncwarp(), or fence-atomic-fence chain between blocks orders. Which one came first in this run does not matter.
// options().without plants a fault: one barrier or fence of the kernels themselves, of those in sites(), does nothing.
// Under AddressSanitizer, which excludes the other, its own checks stand in, and options().seed shuffles the order in
// which threads run between barriers, so that a race changes results.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <tuple>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __syncthreads() ::shim::sync_block({__FILE__, __LINE__})
#define __threadfence() ::shim::fence({__FILE__, __LINE__})
#define threadIdx (::shim::here(0))
#define blockIdx (::shim::here(1))
#define blockDim (::shim::here(2))
#define gridDim (::shim::here(3))

namespace shim {

struct Index {
  unsigned x = 1, y = 1, z = 1;
};

// Where a barrier or a fence stands.
struct Site {
  const char* file = "";
  int line = 0;
  bool operator==(const Site& other) const { return line == other.line && std::strcmp(file, other.file) == 0; }
};

struct Options {
  uint64_t seed = 0;              // 0: threads run in order; else the order is shuffled anew at every turn
  bool log = true;                // where accesses can be logged; it takes most of the time
  int multiprocessors = 4;        // of the device that launchers are told of
  std::size_t shared = 64 << 10;  // bytes of shared memory a block may have
  Site without;                   // the barrier or fence that does nothing: a planted fault
};
Options& options();

// The barriers and fences that were reached since the program began.
const std::vector<Site>& sites();

// Whether this build logs accesses, so that races and stray pointers are found for certain.
bool logs_accesses();

// Names global memory that kernels may touch. Once there is any, all other is out of bounds.
void watch(const char* name, const void* memory, std::size_t bytes);
void forget_all();
// Bytes of it that kernels have loaded or stored since then, where accesses are logged.
std::size_t touched(const char* name);

Index here(int which);  // 0: threadIdx, 1: blockIdx, 2: blockDim, 3: gridDim; by value, to be in registers
void sync_block(Site site);
void yield();
void fence(Site site);

// Per block, alive as long as it: `key` tells one variable from another. Starts as bytes of 0xFF (floats: NaN).
void* static_shared(const void* key, std::size_t bytes);
unsigned char* dynamic_shared();

enum class WarpOp { sync, shuffle, up, down, exchange, ballot };
// The 64 bits that this lane gets from the operation: of another lane, or the mask of lanes with value != 0.
uint64_t warp(WarpOp op, uint32_t mask, uint64_t value, int argument);

// Logs an atomic access; the caller then does it in the plain way, since nothing else runs meanwhile.
void atomic(const void* memory, std::size_t bytes);
void touch(const void* memory, std::size_t bytes, bool write);

// Runs `body` in every thread of the grid. Returns null or what went wrong, valid until the next launch.
const char* run(Index grid, Index block, std::size_t dynamic_bytes, bool cooperative, void (*body)(void*), void* data);

template <typename... Parameters, typename... Arguments>
const char* launch(void (*kernel)(Parameters...), Index grid, Index block, std::size_t dynamic_bytes, bool cooperative,
                   Arguments&&... arguments) {
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<Parameters...> parameters;
  } call{kernel, std::tuple<Parameters...>(std::forward<Arguments>(arguments)...)};
  return run(
      grid, block, dynamic_bytes, cooperative,
      [](void* data) {
        Call& mine = *static_cast<Call*>(data);
        std::apply(mine.kernel, mine.parameters);
      },
      &call);
}

template <typename T>
uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= 8, "a lane's value has 64 bits at most");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}
template <typename T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

template <typename T, typename F>
__attribute__((no_sanitize("thread"))) T update(T* p, F next) {
  atomic(p, sizeof(T));
  const T old = *p;
  *p = next(old);
  return old;
}

}  // namespace shim

inline void __syncwarp(uint32_t mask = ~0u) { shim::warp(shim::WarpOp::sync, mask, 0, 0); }
template <typename T>
T __shfl_sync(uint32_t mask, T value, int lane) {
  return shim::from_bits<T>(shim::warp(shim::WarpOp::shuffle, mask, shim::to_bits(value), lane));
}
template <typename T>
T __shfl_up_sync(uint32_t mask, T value, unsigned delta) {
  return shim::from_bits<T>(shim::warp(shim::WarpOp::up, mask, shim::to_bits(value), int(delta)));
}
template <typename T>
T __shfl_down_sync(uint32_t mask, T value, unsigned delta) {
  return shim::from_bits<T>(shim::warp(shim::WarpOp::down, mask, shim::to_bits(value), int(delta)));
}
template <typename T>
T __shfl_xor_sync(uint32_t mask, T value, int lanes) {
  return shim::from_bits<T>(shim::warp(shim::WarpOp::exchange, mask, shim::to_bits(value), lanes));
}
inline uint32_t __ballot_sync(uint32_t mask, int predicate) {
  return uint32_t(shim::warp(shim::WarpOp::ballot, mask, predicate != 0, 0));
}
inline int __any_sync(uint32_t mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(uint32_t mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }

inline void __nanosleep(unsigned) { shim::yield(); }

template <typename T>
T atomicAdd(T* p, T value) {
  return shim::update(p, [=](T old) { return T(old + value); });
}
template <typename T>
T atomicMax(T* p, T value) {
  return shim::update(p, [=](T old) { return old < value ? value : old; });
}
template <typename T>
T atomicOr(T* p, T value) {
  return shim::update(p, [=](T old) { return T(old | value); });
}
template <typename T>
T atomicExch(T* p, T value) {
  return shim::update(p, [=](T) { return value; });
}

// The compiler is told not to contract these (-ffp-contract=off).
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline long long __float2ll_rn(float a) { return std::llrint(a); }
inline long long __double2ll_rn(double a) { return std::llrint(a); }
inline uint32_t __float_as_uint(float a) { return uint32_t(shim::to_bits(a)); }
inline float __uint_as_float(uint32_t a) { return shim::from_bits<float>(a); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>((static_cast<unsigned __int128>(a) * b) >> 64);
}
inline int __popc(unsigned a) { return __builtin_popcount(a); }
inline int __ffs(int a) { return __builtin_ffs(a); }
inline int __clz(int a) { return a == 0 ? 32 : __builtin_clz(unsigned(a)); }
