// What recurrent layers have in common: the walk over the steps of a packed sequence and the order of the panels.
#pragma once

#include <cstring>

#include "gemm_panel.h"
#include "threads.h"

namespace fastlm {
namespace FASTLM_ISA {

// A thread more must have at least this many multiplications in each step; below, waking it costs more than it saves.
constexpr int64_t kWorkPerThread = 128 * 1024;
// Steps are taken together in chunks of about this many rows: x W_ih^T of a chunk, then its recurrence while those
// gates are still in the cache.
constexpr int64_t kChunkRows = 128;

FASTLM_INLINE int useful_threads(int threads, int64_t work, int64_t panels) {
  const int64_t most = work / kWorkPerThread < panels ? work / kWorkPerThread : panels;
  return most < 1 ? 1 : most < threads ? static_cast<int>(most) : threads;
}

FASTLM_INLINE int64_t padded(int64_t columns) { return panels_for(columns, kPanel) * kPanel; }
FASTLM_INLINE int64_t chunk_rows(int64_t batch, int64_t chunk = kChunkRows) { return batch > chunk ? batch : chunk; }

FASTLM_INLINE int64_t total_rows(const int64_t* batch_sizes, int64_t steps) {
  int64_t rows = 0;
  for (int64_t t = 0; t < steps; ++t) rows += batch_sizes[t];
  return rows;
}

FASTLM_INLINE vf load_lanes(const float* p, int n) { return n == kLanes ? load(p) : load_partial(p, n); }
FASTLM_INLINE void store_lanes(float* p, vf v, int n) {
  if (n == kLanes)
    store(p, v);
  else
    store_partial(p, v, n);
}
FASTLM_INLINE int lanes_left(int64_t columns, int64_t at) {
  return columns - at < kLanes ? static_cast<int>(columns - at) : kLanes;
}

// Visits a thread's panels to and fro: one pass over the weights from the first to the last, the next one back. A pass
// then begins with the panels that the one before left in the level-2 cache; always in one direction, it would find none
// of them there, each having been pushed out just before its turn.
template <typename Visit>
FASTLM_INLINE void sweep(Range panels, bool& back, const Visit& visit) {
  for (int64_t i = panels.begin; i < panels.end; ++i) visit(back ? panels.begin + panels.end - 1 - i : i);
  back = !back;
}

// Goes over the steps in the order of the recurrence, or against it.
class Walk {
 public:
  Walk(const int64_t* batch_sizes, int64_t steps, int64_t total, bool descending)
      : sizes_(batch_sizes), steps_(steps), direction_(descending ? -1 : 1) {
    step_ = descending ? steps - 1 : 0;
    begin = descending ? total - sizes_[step_] : 0;
  }
  bool done() const { return step_ < 0 || step_ >= steps_; }
  int64_t rows() const { return sizes_[step_]; }
  // Rows of the step before or after this one in the walk; 0 beyond its ends.
  int64_t rows_before() const { return size(step_ - direction_); }
  int64_t rows_after() const { return size(step_ + direction_); }
  int64_t begin_before() const { return direction_ > 0 ? begin - rows_before() : begin + rows(); }
  int64_t begin_after() const { return direction_ > 0 ? begin + rows() : begin - rows_after(); }
  void advance() {
    begin = begin_after();
    step_ += direction_;
  }

  int64_t begin;  // first row of the step

 private:
  int64_t size(int64_t t) const { return t < 0 || t >= steps_ ? 0 : sizes_[t]; }
  const int64_t* sizes_;
  int64_t steps_, step_, direction_;
};

// The state of each row of `step` before it: rows that were there one step earlier have it in `states`, the others
// begin here.
FASTLM_INLINE Rows state_before(const Walk& step, const float* states, const float* initial, int64_t width) {
  return {states + step.begin_before() * width, initial, step.rows_before(), width};
}

// The same in a walk against the recurrence, where the step before is the one after.
FASTLM_INLINE Rows backward_state(const Walk& step, const float* states, const float* initial, int64_t width) {
  return {states + step.begin_after() * width, initial, step.rows_after(), width};
}

// to = from (0 where it is null) in the columns of the panels `own`.
static inline void copy_columns(Range own, int64_t rows, int64_t columns, const float* from, int64_t from_stride,
                                float* to, int64_t to_stride) {
  const int64_t low = own.begin * kPanel, high = own.end * kPanel < columns ? own.end * kPanel : columns;
  if (low >= high) return;
  for (int64_t i = 0; i < rows; ++i) {
    if (from == nullptr)
      std::memset(to + i * to_stride + low, 0, (high - low) * sizeof(float));
    else
      std::memcpy(to + i * to_stride + low, from + i * from_stride + low, (high - low) * sizeof(float));
  }
}

// Takes the steps in chunks: inputs(low, high) for the rows [low, high) of some steps together, then step(walk, low)
// for each of those.
template <typename Inputs, typename Step>
FASTLM_INLINE void walk_in_chunks(const int64_t* batch_sizes, int64_t steps, int64_t total, bool reverse,
                                  const Inputs& inputs, const Step& step, int64_t chunk = kChunkRows) {
  Walk ahead(batch_sizes, steps, total, reverse);
  Walk at = ahead;
  while (!at.done()) {
    int64_t low = at.begin, high = at.begin + at.rows();  // of the chunk: the steps up to `ahead`
    for (ahead.advance(); !ahead.done() && high - low + ahead.rows() <= chunk; ahead.advance()) {
      if (ahead.begin < low) low = ahead.begin;
      if (ahead.begin + ahead.rows() > high) high = ahead.begin + ahead.rows();
    }
    inputs(low, high);
    for (; !at.done() && at.begin >= low && at.begin < high; at.advance()) step(at, low);
  }
}

FASTLM_INLINE void fill_bias(float* gates, const float* bias, int64_t rows) {
  vf b[4];
  for (int v = 0; v < 4; ++v) b[v] = load(bias + v * kLanes);
  for (int64_t i = 0; i < rows; ++i)
    for (int v = 0; v < 4; ++v) store(gates + i * kPanel + v * kLanes, b[v]);
}

}  // namespace FASTLM_ISA
}  // namespace fastlm
