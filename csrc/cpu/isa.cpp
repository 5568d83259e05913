// Picks the kernel table for this processor, and the public functions that call through it.
#include "fastlm/isa.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "kernel_table.h"

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
