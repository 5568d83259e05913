// The log of accesses: what is out of bounds, and what races; see cuda_on_cpu.h. Not itself instrumented.
#include "machine.h"

namespace shim {
namespace {

bool ordered(const Access& a, const Fiber& f) {
  if (a.thread == f.id) return true;
  if (a.block != f.block->index) return a.block < f.block->known.size() && a.epoch < f.block->known[a.block];
  return a.epoch < f.block->epoch || (a.block_warp == f.warp && a.warp_epoch < f.block->warp_epochs[f.warp]);
}

void check_bounds(const Fiber& f, uintptr_t p, std::size_t bytes, bool write) {
  const auto within = [&](uintptr_t begin, uintptr_t end) { return p >= begin && p + bytes <= end; };
  const auto dynamic = reinterpret_cast<uintptr_t>(f.block->dynamic);
  if (f.block->dynamic != nullptr && within(dynamic, dynamic + machine.dynamic_bytes)) return;
  for (const auto& [key, memory] : f.block->statics) {
    const auto begin = reinterpret_cast<uintptr_t>(memory.first);
    if (within(begin, begin + memory.second)) return;
  }
  if (!write && within(machine.parameters_begin, machine.parameters_end)) return;
  if (machine.watched.empty()) return;
  std::string nearest = "far from everything it may touch";
  uintptr_t best = 1 << 16;
  for (Watched& buffer : machine.watched) {
    if (within(buffer.begin, buffer.end)) {
      buffer.touched += bytes;
      return;
    }
    const bool before = p < buffer.begin;
    const uintptr_t distance = before ? buffer.begin - p : p - buffer.end;
    if (distance < best) {
      best = distance;
      nearest = std::to_string(distance) + (before ? " bytes before " : " bytes past the end of ") + buffer.name;
    }
  }
  fail(name_of(f) + (write ? " writes " : " reads ") + std::to_string(bytes) + " bytes out of bounds, " + nearest);
}

void log_access(const void* memory, std::size_t bytes, bool write, bool atomic) {
  Fiber* const f = machine.current;
  const auto p = reinterpret_cast<uintptr_t>(memory);
  const auto stack = reinterpret_cast<uintptr_t>(f->stack);
  if (p >= stack && p < stack + kStack) return;
  check_bounds(*f, p, bytes, write);
  if (write && !atomic) f->fenced = false;
  const Access now = {f->id, f->block->epoch, f->block->warp_epochs[f->warp], f->warp, f->block->index, atomic};
  for (uintptr_t half = p / 2; half <= (p + bytes - 1) / 2; ++half) {
    Cell& cell = machine.cells[half];
    const auto conflict = [&](const Access& before) {
      if (before.thread == 0 || (atomic && before.atomic) || ordered(before, *f)) return;
      const std::string where = f->block->dynamic != nullptr && p - uintptr_t(f->block->dynamic) < machine.dynamic_bytes
                                    ? " at byte " + std::to_string(p - uintptr_t(f->block->dynamic)) + " of dynamic shared memory"
                                    : "";
      std::string buffer;
      for (const Watched& w : machine.watched)
        if (p >= w.begin && p < w.end) buffer = " at byte " + std::to_string(p - w.begin) + " of " + w.name;
      fail(name_of(*f) + (write ? " writes" : " reads") + where + buffer + " what thread number " +
           std::to_string(before.thread - 1) + " of the grid " + (&before == &cell.write ? "writes" : "reads") +
           ", and nothing orders the two: a race");
    };
    conflict(cell.write);
    if (write) {
      conflict(cell.reads[0]);
      conflict(cell.reads[1]);
      cell.write = now;
    } else if (cell.reads[0].thread == 0 || ordered(cell.reads[0], *f)) {
      cell.reads[0] = now;
    } else {
      cell.reads[1] = now;
    }
  }
}

}  // namespace

bool logs_accesses() {
#if defined(FASTLM_SHIM_LOGS)
  return true;
#else
  return false;
#endif
}

void watch(const char* name, const void* memory, std::size_t bytes) {
  const auto begin = reinterpret_cast<uintptr_t>(memory);
  machine.watched.push_back({name, begin, begin + bytes, 0});
}
void forget_all() { machine.watched.clear(); }
std::size_t touched(const char* name) {
  std::size_t bytes = 0;
  for (const Watched& buffer : machine.watched)
    if (buffer.name == name) bytes += buffer.touched;
  return bytes;
}

void touch(const void* memory, std::size_t bytes, bool write) {
  if (machine.current == nullptr || machine.busy || !machine.options.log) return;
  const Inside inside;
  log_access(memory, bytes, write, false);
}

void atomic(const void* memory, std::size_t bytes) {
  const Inside inside;
  current("an atomic");
  if (!machine.options.log) return;
  log_access(memory, bytes, true, true);
  Fiber* const fiber = machine.current;
  Clock& clock = machine.published[reinterpret_cast<uintptr_t>(memory)];
  merge(fiber->acquired, clock);
  if (!fiber->fenced) return;
  // What the block did before its last barrier, and what it knew of others then.
  merge(clock, fiber->block->known);
  Clock own(fiber->block->index + 1);
  own.back() = fiber->block->epoch;
  merge(clock, own);
}

}  // namespace shim

#if defined(FASTLM_SHIM_LOGS)
// What the compiler calls under -fsanitize=thread.
extern "C" {
#define FASTLM_SHIM_ACCESS(n)                                                   \
  void __tsan_read##n(void* p) { ::shim::touch(p, n, false); }                  \
  void __tsan_write##n(void* p) { ::shim::touch(p, n, true); }                  \
  void __tsan_unaligned_read##n(void* p) { ::shim::touch(p, n, false); }        \
  void __tsan_unaligned_write##n(void* p) { ::shim::touch(p, n, true); }        \
  void __tsan_volatile_read##n(void* p) { ::shim::touch(p, n, false); }         \
  void __tsan_volatile_write##n(void* p) { ::shim::touch(p, n, true); }
FASTLM_SHIM_ACCESS(1)
FASTLM_SHIM_ACCESS(2)
FASTLM_SHIM_ACCESS(4)
FASTLM_SHIM_ACCESS(8)
FASTLM_SHIM_ACCESS(16)
void __tsan_read_range(void* p, std::size_t bytes) { ::shim::touch(p, bytes, false); }
void __tsan_write_range(void* p, std::size_t bytes) { ::shim::touch(p, bytes, true); }
void __tsan_vptr_read(void**) {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
}
#endif
