// Runs every registered test at every instruction-set level this processor has.
#include <cstring>

#include "check.h"
#include "fastlm/isa.h"

int main(int argc, char** argv) {
  int passed = 0, failed = 0;
  bool first = true;
  for (const char* level : fastlm::isa_available()) {
    fastlm::isa_force(level);
    for (const check::Test& test : check::tests()) {
      if (test.once && !first) continue;
      if (argc > 1 && std::strstr(test.name, argv[1]) == nullptr) continue;
      const int before = check::failures();
      test.run();
      const bool ok = check::failures() == before;
      if (!ok) std::printf("FAILED %s [%s]\n", test.name, level);
      ++(ok ? passed : failed);
    }
    first = false;
  }
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 && passed > 0 ? 0 : 1;
}
