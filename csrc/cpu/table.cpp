// This level's kernel table. Compiled once per instruction-set level.
#include "kernel_table.h"
#include "simd.h"

namespace fastlm {
namespace FASTLM_ISA {

#define X(ret, name, params, args) ret name params;
FASTLM_KERNEL_LIST(X)
#undef X

int simd_lanes() { return kLanes; }

#define FASTLM_STRING_(x) #x
#define FASTLM_STRING(x) FASTLM_STRING_(x)

extern const KernelTable kTable;
const KernelTable kTable = {
    FASTLM_STRING(FASTLM_ISA),
#define X(ret, name, params, args) &FASTLM_ISA::name,
    FASTLM_KERNEL_LIST(X)
#undef X
};

}  // namespace FASTLM_ISA
}  // namespace fastlm
