// Calls that Python has checked before, so that those which only bring other addresses or numbers need not be again.
#pragma once

#include <algorithm>
#include <utility>

namespace fastlm {

// The last 64 of them. Never freed: they hold Python's objects, and outlive the interpreter. Under the GIL; what is
// found may be forgotten as soon as any Python runs.
template <typename Known>
class KnownCalls {
 public:
  static KnownCalls& instance() {
    static KnownCalls* const calls = new KnownCalls;
    return *calls;
  }

  // One of which `matches` is true, or null; the one found last is tried first.
  template <typename Matches>
  const Known* find(const Matches& matches) {
    for (int i = 0; i < count_; ++i) {
      const int at = (last_ + i) % count_;
      if (!matches(known_[at])) continue;
      last_ = at;
      return &known_[at];
    }
    return nullptr;
  }
  void remember(Known known) {
    const int at = next_;
    last_ = at;
    count_ = std::max(count_, at + 1);
    next_ = (at + 1) % kMost;
    std::swap(known_[at], known);  // what it held goes last: that can run any Python
  }
  // Returns how many there were.
  int forget() {
    const int count = count_;
    count_ = next_ = last_ = 0;
    for (Known& known : known_) {
      Known gone{};
      std::swap(known, gone);
    }
    return count;
  }

 private:
  static constexpr int kMost = 64;
  Known known_[kMost];
  int count_ = 0, next_ = 0, last_ = 0;
};

}  // namespace fastlm
