// A test framework of one page: FASTLM_TEST(name) { CHECK(...); } registers a test; main() in main.cpp runs them all.
#pragma once

#include <cstdio>
#include <string>
#include <vector>

namespace check {

struct Test {
  const char* name;
  void (*run)();
};

inline std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}
inline int& failures() {
  static int count = 0;
  return count;
}
struct Register {
  Register(const char* name, void (*run)()) { tests().push_back({name, run}); }
};

}  // namespace check

#define FASTLM_TEST(name)                              \
  static void name();                                  \
  static check::Register register_##name(#name, name); \
  static void name()

#define CHECK(condition)                                                           \
  do {                                                                             \
    if (!(condition)) {                                                            \
      std::printf("%s:%d: CHECK(%s) failed\n", __FILE__, __LINE__, #condition);    \
      ++check::failures();                                                         \
    }                                                                              \
  } while (false)
