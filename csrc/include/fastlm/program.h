// A recorded sequence of kernel calls that is replayed without Python: what a CUDA graph is to a GPU.
//
// While a program records, each kernel call that comes through the bindings also becomes a step of it, with the
// pointers it was given. A replay runs the steps in order on one team of threads that stays together from the first
// step to the last, so what changes from one replay to the next must lie in memory: token ids, positions, lengths.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

namespace fastlm {

class Program {
 public:
  // Runs a kernel; returns -1, or 0 or more where the kernel refuses its input, which ends the replay. Every thread of
  // the team calls each step, and all must get the same result.
  using Step = std::function<int64_t()>;

  explicit Program(int threads) : threads_(threads) {}
  Program(const Program&) = delete;
  Program& operator=(const Program&) = delete;
  ~Program();

  void add(Step step) { steps_.push_back(std::move(step)); }

  // Memory for a step's scratch, aligned to 64 bytes, that lives as long as the program. Steps run one after another,
  // so `shared` memory may be handed out again; the rest belongs to its step alone and starts as zeros.
  void* scratch(std::size_t bytes, bool shared);

  struct Watch {
    const int64_t* values;  // [count], read after each replay
    int64_t count;
    const int64_t* stops;  // [stop_count]; the replay after which one of them is among the values is the last
    int64_t stop_count;
    int64_t* log;  // [times, count] out: the values after each replay
  };
  struct Result {
    int64_t replays;  // completed ones
    bool refused;     // whether a kernel ended the one after them
  };
  // Replays up to `times` times on at most `threads` threads, and on no more than were there when it was recorded.
  Result run(int64_t times, const Watch& watch, int threads);

  std::size_t size() const { return steps_.size(); }
  int threads() const { return threads_; }

 private:
  struct Block {
    std::unique_ptr<char[]> memory;
    char* start;
    std::size_t bytes;
    bool shared;
  };
  std::vector<Step> steps_;
  std::vector<Block> blocks_;
  int threads_;
};

// The program that records the calling thread's kernel calls, or null. Assignable.
Program*& recording();

}  // namespace fastlm
