// A test framework of one page: FASTLM_TEST(name) { CHECK(...); } registers a test, FASTLM_TEST_ONCE one that is the same
// at every instruction-set level; main() in main.cpp runs them all.
#pragma once

#include <cstdio>
#include <limits>
#include <string>
#include <vector>

namespace check {

struct Test {
  const char* name;
  void (*run)();
  bool once;
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
  Register(const char* name, void (*run)(), bool once) { tests().push_back({name, run, once}); }
};


// The larger of two errors. NaN is the worst there is, and stays: both std::max and a comparison would let go of it.
inline double worse(double a, double b) {
  if (a != a || b != b) return std::numeric_limits<double>::infinity();
  return a < b ? b : a;
}

}  // namespace check

#define FASTLM_REGISTER(name, once)                          \
  static void name();                                        \
  static check::Register register_##name(#name, name, once); \
  static void name()
#define FASTLM_TEST(name) FASTLM_REGISTER(name, false)
#define FASTLM_TEST_ONCE(name) FASTLM_REGISTER(name, true)

#define CHECK(condition)                                                           \
  do {                                                                             \
    if (!(condition)) {                                                            \
      std::printf("%s:%d: CHECK(%s) failed\n", __FILE__, __LINE__, #condition);    \
      ++check::failures();                                                         \
    }                                                                              \
  } while (false)
