// The scheduler of fibers; see cuda_on_cpu.h. Not itself instrumented.
#include "machine.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace shim {

Machine machine;

void merge(Clock& into, const Clock& from) {
  if (into.size() < from.size()) into.resize(from.size());
  for (std::size_t i = 0; i < from.size(); ++i) into[i] = std::max(into[i], from[i]);
}

std::string name_of(const Fiber& fiber) {
  const Index &t = fiber.here[0], &b = fiber.here[1];
  char text[96];
  std::snprintf(text, sizeof text, "thread (%u, %u, %u) of block (%u, %u, %u)", t.x, t.y, t.z, b.x, b.y, b.z);
  return text;
}

void fail(const std::string& what) {
  if (machine.error.empty()) machine.error = what;
  if (Fiber* const fiber = machine.current) {
    machine.current = nullptr;
    switch_to(fiber->context, machine.scheduler);
  }
}

Fiber* current(const char* what) {
  if (machine.current == nullptr) {
    std::fprintf(stderr, "shim: %s outside a launch\n", what);
    std::abort();
  }
  return machine.current;
}

namespace {

constexpr int kPatience = 20000;  // turns of which none but waiting for another block's atomics came

void enter() {
  machine.busy = false;
  machine.body(machine.data);
  machine.busy = true;
  Fiber* const fiber = machine.current;
  fiber->state = State::done;
  ++fiber->block->done;
  machine.progress = true;
  machine.current = nullptr;
  switch_to(fiber->context, machine.scheduler);
}

void pause(Fiber* fiber) {
  machine.current = nullptr;
  switch_to(fiber->context, machine.scheduler);
}

// Completes a warp's operation once all lanes of its mask wait for it.
void try_warp(Fiber* fiber) {
  Fiber* lanes[kWarp] = {};
  const std::size_t first = fiber->warp * kWarp;
  for (std::size_t i = first; i < std::min(fiber->block->fibers.size(), first + kWarp); ++i)
    lanes[i - first] = fiber->block->fibers[i];
  for (int lane = 0; lane < kWarp; ++lane) {
    if (!(fiber->mask >> lane & 1)) continue;
    const Fiber* const other = lanes[lane];
    if (other == nullptr || other->state == State::done)
      return fail(name_of(*fiber) + ": a warp operation's mask names lane " + std::to_string(lane) +
                  ", which does not run");
    if (other->state != State::warp || other->op != fiber->op || other->mask != fiber->mask) return;
  }
  uint64_t ballot = 0;
  for (int lane = 0; lane < kWarp; ++lane)
    if ((fiber->mask >> lane & 1) && lanes[lane]->value) ballot |= uint64_t{1} << lane;
  for (int lane = 0; lane < kWarp; ++lane) {
    if (!(fiber->mask >> lane & 1)) continue;
    Fiber* const mine = lanes[lane];
    int source = lane;
    if (mine->op == WarpOp::shuffle) source = mine->argument & 31;
    if (mine->op == WarpOp::exchange) source = (lane ^ mine->argument) & 31;
    if (mine->op == WarpOp::up) source = lane >= mine->argument ? lane - mine->argument : lane;
    if (mine->op == WarpOp::down) source = lane + mine->argument < kWarp ? lane + mine->argument : lane;
    if (!(mine->mask >> source & 1))
      return fail(name_of(*mine) + ": a shuffle reads lane " + std::to_string(source) + ", which is not in its mask");
    mine->result = mine->op == WarpOp::ballot ? ballot : lanes[source]->value;
    mine->state = State::ready;
  }
  // Shuffles order no memory; __syncwarp of the whole warp does.
  if (fiber->op == WarpOp::sync && fiber->mask == ~0u) ++fiber->block->warp_epochs[fiber->warp];
}

uint64_t next_random() {
  machine.random ^= machine.random << 13;
  machine.random ^= machine.random >> 7;
  machine.random ^= machine.random << 17;
  return machine.random;
}

template <typename T>
void shuffle(std::vector<T>& items) {
  if (machine.options.seed == 0) return;
  for (std::size_t i = items.size(); i > 1; --i) std::swap(items[i - 1], items[next_random() % i]);
}

// A turn for every thread, again and again, until all are done or one cannot go on.
void schedule(std::vector<Fiber*> fibers) {
  int idle = 0;
  while (!fibers.empty() && machine.error.empty()) {
    shuffle(fibers);
    bool ran = false;
    machine.progress = false;
    for (Fiber* const fiber : fibers) {
      if (fiber->state != State::ready) continue;
      ran = true;
      machine.current = fiber;
      machine.busy = true;
      switch_to(machine.scheduler, fiber->context);
      machine.current = nullptr;
      if (!machine.error.empty()) return;
    }
    fibers.erase(std::remove_if(fibers.begin(), fibers.end(), [](Fiber* f) { return f->state == State::done; }),
                 fibers.end());
    if (!ran && !fibers.empty()) {
      const Fiber* const stuck = fibers[0];
      const bool barrier = stuck->state == State::barrier;
      return fail(name_of(*stuck) + (barrier ? ": waits at " + std::string(stuck->site.file) + ":" +
                                                   std::to_string(stuck->site.line) + " for threads that never come"
                                             : ": waits in a warp operation for lanes that never come"));
    }
    idle = machine.progress ? 0 : idle + 1;
    if (idle > kPatience) return fail(name_of(*fibers[0]) + ": blocks wait for each other for ever");
  }
}

// Notes a barrier or fence; whether it is the one to do nothing.
bool left_out(const Site& site) {
  std::vector<Site>& all = machine.sites;
  if (std::find(all.begin(), all.end(), site) == all.end()) all.push_back(site);
  return site == machine.options.without;
}

unsigned char* allocate(std::size_t bytes) {
  auto* const memory = static_cast<unsigned char*>(std::malloc(bytes));  // by itself, so that ASan knows its end
  std::memset(memory, 0xFF, bytes);
  return memory;
}

}  // namespace

Options& options() { return machine.options; }
const std::vector<Site>& sites() { return machine.sites; }

Index here(int which) { return current("threadIdx")->here[which]; }

void sync_block(Site site) {
  const Inside inside;
  if (left_out(site)) return;
  Fiber* const fiber = current("__syncthreads");
  Block& block = *fiber->block;
  fiber->site = site;
  fiber->state = State::barrier;
  if (block.done > 0) fail(name_of(*fiber) + ": reaches a barrier that others have exited without");
  if (++block.at_barrier < block.fibers.size()) return pause(fiber);
  for (Fiber* const other : block.fibers) {
    if (!(other->site == site))
      fail(name_of(*fiber) + ": the barrier at line " + std::to_string(site.line) + " meets that at line " +
           std::to_string(other->site.line) + " of " + name_of(*other));
    other->state = State::ready;
    other->fenced = false;  // others' stores have come in, of which its fence knew nothing
  }
  block.at_barrier = 0;
  ++block.epoch;
  merge(block.known, block.arriving);
  machine.progress = true;
}

void yield() {
  const Inside inside;
  pause(current("__nanosleep"));
}

void fence(Site site) {
  const Inside inside;
  if (left_out(site)) return;
  Fiber* const fiber = current("__threadfence");
  fiber->fenced = true;
  merge(fiber->block->arriving, fiber->acquired);
}

void* static_shared(const void* key, std::size_t bytes) {
  const Inside inside;
  auto& [memory, size] = current("shared memory")->block->statics[key];
  if (memory == nullptr) {
    memory = allocate(bytes);
    size = bytes;
  }
  return memory;
}
unsigned char* dynamic_shared() { return current("shared memory")->block->dynamic; }

uint64_t warp(WarpOp op, uint32_t mask, uint64_t value, int argument) {
  const Inside inside;
  Fiber* const fiber = current("a warp operation");
  fiber->op = op;
  fiber->mask = mask;
  fiber->value = value;
  fiber->argument = argument;
  fiber->state = State::warp;
  if (!(mask >> fiber->lane & 1)) fail(name_of(*fiber) + ": a warp operation's mask leaves out the caller");
  try_warp(fiber);
  machine.progress = true;
  if (fiber->state != State::ready) pause(fiber);
  return fiber->result;
}

const char* run(Index grid, Index block, std::size_t dynamic_bytes, bool cooperative, void (*body)(void*), void* data) {
  Machine& m = machine;
  m.error.clear();
  const std::size_t threads = std::size_t(block.x) * block.y * block.z;
  const std::size_t blocks = std::size_t(grid.x) * grid.y * grid.z;
  if (threads == 0 || threads > 1024 || blocks == 0 || dynamic_bytes > m.options.shared) {
    m.error = "invalid configuration: " + std::to_string(blocks) + " blocks of " + std::to_string(threads) +
              " threads, " + std::to_string(dynamic_bytes) + " bytes of shared memory";
    return m.error.c_str();
  }
  m.body = body;
  m.data = data;
  m.parameters_begin = reinterpret_cast<uintptr_t>(data);
  m.parameters_end = m.parameters_begin + 4096;  // what a kernel's parameters may take
  m.dynamic_bytes = dynamic_bytes;
  m.cells.clear();
  m.published.clear();
  m.random = m.options.seed * 0x9E3779B97F4A7C15 + 1;
  std::vector<std::size_t> order(blocks);
  for (std::size_t i = 0; i < blocks; ++i) order[i] = i;
  shuffle(order);
  const std::size_t together = cooperative ? blocks : 1;
  while (m.stacks.size() < together * threads)
    m.stacks.push_back(static_cast<char*>(mmap(nullptr, kStack, PROT_READ | PROT_WRITE,
                                               MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)));
  for (std::size_t begin = 0; begin < blocks && m.error.empty(); begin += together) {
    std::vector<Block> alive(together);
    std::vector<Fiber> fibers(together * threads);
    std::vector<Fiber*> all;
    for (std::size_t b = 0; b < together; ++b) {
      Block& home = alive[b];
      home.index = uint32_t(order[begin + b]);
      home.warp_epochs.resize((threads + kWarp - 1) / kWarp);
      if (dynamic_bytes > 0) home.dynamic = allocate(dynamic_bytes);
      for (std::size_t t = 0; t < threads; ++t) {
        Fiber& f = fibers[b * threads + t];
        f.stack = m.stacks[b * threads + t];
#if defined(__SANITIZE_ADDRESS__)
        ASAN_UNPOISON_MEMORY_REGION(f.stack, kStack);
#endif
        prepare(f.context, f.stack, kStack, enter);
        const unsigned i = unsigned(t), j = home.index;
        f.here[0] = {i % block.x, i / block.x % block.y, i / (block.x * block.y)};
        f.here[1] = {j % grid.x, j / grid.x % grid.y, j / (grid.x * grid.y)};
        f.here[2] = block;
        f.here[3] = grid;
        f.block = &home;
        f.id = uint32_t(home.index * threads + t + 1);
        f.lane = i % kWarp;
        f.warp = i / kWarp;
        f.state = State::ready;
        f.fenced = false;
        home.fibers.push_back(&f);
        all.push_back(&f);
      }
    }
    schedule(std::move(all));
    for (Block& home : alive) {
      std::free(home.dynamic);
      for (auto& [key, memory] : home.statics) std::free(memory.first);
      // Its memory may be another block's next.
      if (home.dynamic != nullptr || !home.statics.empty()) {
        const auto drop = [&](const unsigned char* from, std::size_t bytes) {
          for (uintptr_t half = uintptr_t(from) / 2; half <= (uintptr_t(from) + bytes) / 2; ++half) m.cells.erase(half);
        };
        if (home.dynamic != nullptr) drop(home.dynamic, dynamic_bytes);
        for (auto& [key, memory] : home.statics) drop(memory.first, memory.second);
      }
    }
  }
  m.parameters_begin = m.parameters_end = 0;
  return m.error.empty() ? nullptr : m.error.c_str();
}

}  // namespace shim
