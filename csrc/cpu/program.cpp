// Replays recorded kernel calls. Compiled once: the steps reach the kernels of the active level themselves.
#include "fastlm/program.h"

#include <omp.h>

#include <cstring>

#include "team.h"

namespace fastlm {

Team*& current_team() {
  static thread_local Team* team = nullptr;
  return team;
}

Program*& recording() {
  static thread_local Program* program = nullptr;
  return program;
}

Program::~Program() {
  if (recording() == this) recording() = nullptr;
}

void* Program::scratch(std::size_t bytes, bool shared) {
  if (shared)
    for (const Block& block : blocks_)
      if (block.shared && block.bytes >= bytes) return block.start;
  constexpr std::size_t kAlignment = 64;
  Block block{std::unique_ptr<char[]>(new char[bytes + kAlignment]), nullptr, bytes, shared};
  const auto at = reinterpret_cast<std::uintptr_t>(block.memory.get());
  block.start = block.memory.get() + (kAlignment - at % kAlignment) % kAlignment;
  if (!shared) std::memset(block.start, 0, bytes);
  blocks_.push_back(std::move(block));
  return blocks_.back().start;
}

Program::Result Program::run(int64_t times, const Watch& watch, int threads) {
  Result result{0, false};
  if (threads > threads_) threads = threads_;
  Barrier barrier(threads);
  int64_t decisions[2] = {0, 0};
#pragma omp parallel num_threads(threads)
  {
    Team team{omp_get_thread_num(), omp_get_num_threads(), &barrier, decisions, 0, false};
    barrier.set_threads(team.threads);
    current_team() = &team;
    for (int64_t replay = 0; replay < times; ++replay) {
      bool refused = false, stop = false;
      for (const Step& step : steps_)
        if (step() >= 0) {
          refused = true;
          break;
        }
      barrier.wait();
      team.behind = false;
      for (int64_t i = 0; i < watch.count; ++i)
        for (int64_t j = 0; j < watch.stop_count; ++j) stop = stop || watch.values[i] == watch.stops[j];
      if (team.thread == 0) {
        if (refused) {
          result.refused = true;
        } else {
          std::memcpy(watch.log + replay * watch.count, watch.values, watch.count * sizeof(int64_t));
          result.replays = replay + 1;
        }
      }
      barrier.wait();  // nobody overwrites the values before all have looked at them
      if (refused || stop) break;
    }
    current_team() = nullptr;
  }
  return result;
}

}  // namespace fastlm
