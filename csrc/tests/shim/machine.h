// The state of the shim, between the scheduler of fibers (cuda_on_cpu.cpp) and the log of accesses (access_log.cpp).
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "cuda_on_cpu.h"
#include "fiber.h"

namespace shim {

constexpr std::size_t kStack = 256 << 10;  // reserved; what is untouched costs nothing
constexpr int kWarp = 32;

enum class State { ready, barrier, warp, done };

// How far each block has come, in barriers, as far as this one can know. Between blocks, that is through atomics.
using Clock = std::vector<uint32_t>;

void merge(Clock& into, const Clock& from);

struct Block;

struct Fiber {
  Context context;
  char* stack;
  Index here[4];  // as in shim::here
  Block* block;
  uint32_t id, lane, warp;
  State state;
  // What it waits for.
  Site site;
  WarpOp op;
  uint32_t mask;
  uint64_t value, result;
  int argument;
  bool fenced;     // a fence since its last plain store and barrier: its next atomic publishes
  Clock acquired;  // from atomics; known to the block after a fence and a barrier
};

struct Block {
  uint32_t index, epoch = 0;
  std::vector<Fiber*> fibers;
  std::vector<uint32_t> warp_epochs;
  unsigned at_barrier = 0, done = 0;
  Clock known, arriving;
  std::map<const void*, std::pair<unsigned char*, std::size_t>> statics;
  unsigned char* dynamic = nullptr;
};

struct Access {
  uint32_t thread = 0, epoch, warp_epoch, block_warp;  // thread: its number in the grid, from 1; 0: none
  uint32_t block;
  bool atomic;
};
struct Cell {
  Access write, reads[2];
};
struct Watched {
  std::string name;
  uintptr_t begin, end;
  std::size_t touched = 0;
};

struct Machine {
  Options options;
  Context scheduler;
  Fiber* current = nullptr;
  bool busy = false;  // in here, not in device code: the linker may choose an instrumented copy of a std function
  bool progress = false;
  std::string error;
  std::vector<char*> stacks;
  std::vector<Watched> watched;
  std::vector<Site> sites;
  uintptr_t parameters_begin = 0, parameters_end = 0;
  std::size_t dynamic_bytes = 0;
  std::unordered_map<uintptr_t, Cell> cells;        // by address / 2
  std::unordered_map<uintptr_t, Clock> published;  // by the atomic's address
  void (*body)(void*) = nullptr;
  void* data = nullptr;
  uint64_t random = 0;
};
extern Machine machine;

// In every function that device code calls. A switch away and back leaves `busy` as it is.
struct Inside {
  Inside() { machine.busy = true; }
  ~Inside() { machine.busy = false; }
};

std::string name_of(const Fiber& fiber);
// Ends the launch. From a fiber it does not return.
void fail(const std::string& what);
// The thread that runs; the program ends where `what` is done outside a launch.
Fiber* current(const char* what);

}  // namespace shim
