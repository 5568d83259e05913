// Picks the kernel table for this processor, and the public functions that call through it.
#include "fastlm/isa.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "kernel_table.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastlm {

namespace baseline {
extern const KernelTable kTable;
}
#if defined(__x86_64__)
namespace avx2 {
extern const KernelTable kTable;
}
namespace avx512 {
extern const KernelTable kTable;
}
#endif

namespace {

struct Level {
  const KernelTable* table;
  bool (*runs_here)();
};

bool always() { return true; }
#if defined(__x86_64__)
// Exactly what -march=x86-64-v3 and -march=x86-64-v4 -mavx512vnni let the compiler use. __builtin_cpu_supports
// also checks that the operating system saves the wide registers.
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
         __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
}
#endif

const Level kLevels[] = {
    {&baseline::kTable, always},
#if defined(__x86_64__)
    {&avx2::kTable, has_avx2},
    {&avx512::kTable, has_avx512},
#endif
};

// AMX: tiles (bit 24) and their products of bfloat16 (bit 22) and bytes (bit 25); and vectors of bfloat16 (leaf 1, bit 5). Linux hands out the registers to processes that ask.
bool has_bfloat_tiles() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr long kAskForState = 0x1023, kTileData = 18;
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  if (!(d >> 22 & 1) || !(d >> 24 & 1) || !(d >> 25 & 1) || !__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a >> 5 & 1)) return false;
  return has_avx512() && syscall(SYS_arch_prctl, kAskForState, kTileData) == 0;
#else
  return false;
#endif
}

bool tiles_allowed = true;

const KernelTable* find(const char* name) {
  for (const Level& level : kLevels)
    if (std::strcmp(level.table->isa, name) == 0 && level.runs_here()) return level.table;
  return nullptr;
}

const KernelTable* best() {
  const KernelTable* table = nullptr;
  for (const Level& level : kLevels)
    if (level.runs_here()) table = level.table;
  return table;
}

const KernelTable*& active() {
  static const KernelTable* table = best();
  return table;
}

}  // namespace

const KernelTable& kernels() { return *active(); }

std::vector<const char*> isa_available() {
  std::vector<const char*> names;
  for (const Level& level : kLevels)
    if (level.runs_here()) names.push_back(level.table->isa);
  return names;
}

std::vector<const char*> isa_compiled() {
  std::vector<const char*> names;
  for (const Level& level : kLevels) names.push_back(level.table->isa);
  return names;
}

void matmul_allow_tiles(bool allowed) { tiles_allowed = allowed; }

bool matmul_tiles() {
  static const bool has = has_bfloat_tiles();
  return has && tiles_allowed && kernels().matmul == best()->matmul;  // a level that was forced does without
}

bool digit_tiles() {
#if defined(__x86_64__) && defined(__linux__)
  static const bool has = [] {
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 25 & 1);  // AMX's products of int8
  }();
  return has && matmul_tiles();
#else
  return false;
#endif
}

const char* isa_active() { return kernels().isa; }

bool isa_force(const char* level) {
  const KernelTable* table = find(level);
  if (table == nullptr) return false;
  active() = table;
  return true;
}

#define X(ret, name, params, args) \
  ret name params { return kernels().name args; }
FASTLM_KERNEL_LIST(X)
#undef X

}  // namespace fastlm
