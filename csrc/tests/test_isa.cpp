#include <cstring>

#include "check.h"
#include "fastlm/isa.h"

FASTLM_TEST(isa_unknown_level_is_refused) {
  const char* before = fastlm::isa_active();
  CHECK(!fastlm::isa_force("avx1024"));
  CHECK(std::strcmp(fastlm::isa_active(), before) == 0);
}
