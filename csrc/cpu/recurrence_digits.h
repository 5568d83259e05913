// What recurrent layers keep for tiles: states and the gates' gradients as digits (digits.h), inputs as
// either, digits or parts (amx.h).
#pragma once

#include "amx.h"
#include "digits.h"
#include "recurrence.h"

namespace fastlm {
namespace FASTLM_ISA {

// In place of a weight's type: weights in digits. Levels that have no tiles compile none of it.
struct Digits {};
#if defined(__AVX512F__)
constexpr bool kHasDigits = true;
#else
constexpr bool kHasDigits = false;
#endif

// Steps are taken together in larger chunks than of floats: a chunk's pass over W_ih drives W_hh out of level 2.
constexpr int64_t kDigitChunkRows = 512;

FASTLM_INLINE int64_t floats_for(int64_t bytes) { return panels_for(bytes, 64) * 16; }
FASTLM_INLINE uint8_t* take_bytes(float*& memory, int64_t bytes) {
  uint8_t* const taken = reinterpret_cast<uint8_t*>(memory);
  memory += floats_for(bytes);
  return taken;
}
FASTLM_INLINE float* take_floats(float*& memory, int64_t n) {
  return reinterpret_cast<float*>(take_bytes(memory, n * static_cast<int64_t>(sizeof(float))));
}

// Rows of input whose numbers need not have one scale, as states have: three bfloat16 each, which keep the range of
// floats (amx.h); and so are the weights, in blocks of 16 columns.
class InputParts {
 public:
  static int64_t words(int64_t k) { return panels_for(k, kDepth) * kParts * kTileWords; }  // of 16 rows, or columns
  InputParts() = default;
  InputParts(float*& memory, int64_t rows, int64_t k) : k_(k) {
    tiles_ = reinterpret_cast<uint32_t*>(take_floats(memory, panels_for(rows, kTile) * words(k)));
  }

  void put(const float* input, Range rows) const {
    for (int64_t i = rows.begin; i < rows.end; ++i) put_row(input + i * k_, i);
  }
  void put_row(const float* x, int64_t i) const {
#if defined(__AVX512F__)
    uint32_t* to = tiles_ + i / kTile * words(k_) + i % kTile * kTile;
    for (int64_t at = 0; at < k_; at += kDepth, to += kParts * kTileWords) {
      vu parts[kParts];
      split(load_until(x, at, k_, 0.0f), load_until(x, at + kTile, k_, 0.0f), parts);
      for (int j = 0; j < kParts; ++j) std::memcpy(to + j * kTileWords, &parts[j], sizeof(parts[j]));
    }
#else
    (void)x, (void)i;  // only levels that have tiles come here
#endif
  }

  // Adds a panel's product to `count` rows of sums, as panel_product: that of the row i to the row places[i], if given.
  // Takes the tile registers.
  template <int V, int Last>
  void product(int64_t count, const void* weights, int64_t panel, float* out, const int32_t* places = nullptr) const {
#if defined(__AVX512F__)
    const int64_t block = words(k_), steps = panels_for(k_, kDepth), tiles = panels_for(count, kTile);
    const uint32_t* const columns = static_cast<const uint32_t*>(weights) + panel * V * block;
    TileUnit unit;
    TileSums sums[2];
    // Two vectors of columns at a time; a block is added while the next one is multiplied.
    for (int64_t item = 0, all = (V + 1) / 2 * tiles; item <= all; ++item) {
      if (item < all) {
        const int64_t v = item / tiles * 2, row = item % tiles * kTile;
        unit.set_rows(count - row < kTile ? count - row : kTile);
        unit.multiply<kParts>(tiles_ + item % tiles * block, columns + v * block, v + 1 < V ? block : 0, steps,
                              sums[item % 2]);
      }
      if (item == 0) continue;
      const int64_t v = (item - 1) / tiles * 2, first = (item - 1) % tiles * kTile;
      for (int64_t i = first; i < count && i < first + kTile; ++i)
        for (int64_t w = v; w < V && w < v + 2; ++w) {
          float* const to = out + (places != nullptr ? places[i] : i) * kPanel + (w == V - 1 ? Last : w) * kLanes;
          store(to, load(to) + sums[(item - 1) % 2].at(i - first, (w - v) * kTile));
        }
    }
#else
    (void)count, (void)weights, (void)panel, (void)out, (void)places;
#endif
  }

 private:
  int64_t k_ = 0;
  uint32_t* tiles_ = nullptr;
};

// Whether a row of inputs may be in digits: where rounding to 24 bits of the row's largest number, and of a column of
// W_ih's, moves no sum by more than gates are rounded by anyway. Sums that are `normalised` are divided by their size, so
// what is rounded is held against that, guessed from the row's and W_ih's.
class RowErrors {
 public:
  RowErrors() = default;
  RowErrors(const void* weights, int64_t k, int64_t blocks, bool normalised) : k_(k), normalised_(normalised) {
    const uint8_t* const end = static_cast<const uint8_t*>(weights) + blocks * digit_column_block(k);
    std::memcpy(&columns_, end, sizeof(columns_));
  }

  bool few(const float* x) const {
    vf squares{};
    for (int64_t i = 0; i < k_; i += kLanes) {
      const vf v = load_until(x, i, k_, 0.0f);
      squares += v * v;
    }
    const float most = float_of(static_cast<uint32_t>(largest_magnitude(x, k_)));  // NaN if there is one
    const float length = __builtin_sqrtf(reduce_add(squares));
    // In units of 2^-24: at most what rounding the row, and the weights, can add up to, if the errors' signs are random.
    const float error = most * columns_.norm + length * columns_.most;
    const float size = normalised_ ? length * columns_.norm / __builtin_sqrtf(static_cast<float>(k_)) : 1.0f;
    return k_ <= kMostDepth && error <= kMostError * size;
  }

 private:
  static constexpr float kMostError = 8.0f;  // sums of gates between 4 and 8 are rounded by as much
  static constexpr int64_t kMostDepth = 40000;  // three products of digits, 2^14 at most, of so many fit 32 bits
  int64_t k_ = 0;
  bool normalised_ = false;
  DigitColumns columns_;
};

// Rows of input, of a chunk at a time: in digits where their errors are few; else, if only by one feature much larger than
// the others, as parts, in twice the time. Each row by itself. The weights come as digits and, unless no row can need
// them (inputs_in_digits), as parts.
class InputRows {
 public:
  InputRows() = default;
  InputRows(float*& memory, int64_t rows, int64_t k, const void* weights, const void* parts_weights, int64_t blocks,
            bool normalised = false)
      : k_(k), blocks_(blocks), normalised_(normalised), weights_(static_cast<const uint8_t*>(weights)),
        parts_weights_(parts_weights) {
    if (parts_weights != nullptr) parts_ = InputParts(memory, rows, k);
    digits_ = {take_bytes(memory, digit_rows_bytes(rows, k)), k, rows <= kFewRows};
    units_ = take_floats(memory, rows);
    wide_ = reinterpret_cast<int32_t*>(take_floats(memory, rows));
  }

  // The rows of a chunk, by all threads together, each of which calls begin() first.
  void begin() {
    if (parts_weights_ != nullptr) errors_ = RowErrors(weights_, k_, blocks_, normalised_);
  }
  void put(const float* input, int64_t rows, int thread, int threads, Barrier& barrier) {
    const Range own = share(rows, thread, threads);
    for (int64_t i = own.begin; i < own.end; ++i) {
      const float* const x = input + i * k_;
      if (parts_weights_ == nullptr || errors_.few(x))
        put_row(x, k_, digits_, i, units_ + i);
      else
        units_[i] = 0.0f;  // times whatever digits are there
    }
    barrier.wait();
    wide_rows_ = 0;
    for (int64_t i = 0; i < rows; ++i)
      if (units_[i] == 0.0f) {
        if (thread == 0) wide_[wide_rows_] = static_cast<int32_t>(i);
        if (wide_rows_ % threads == thread) parts_.put_row(input + i * k_, wide_rows_);
        ++wide_rows_;
      }
    if (wide_rows_ > 0) barrier.wait();
  }

  // A chunk's rows times some panels, and the panels' bias, to out(panel). Takes the tile registers.
  template <int V, int Last, typename Out>
  void product(int64_t rows, Range panels, const float* bias, DigitTiles& tiles, const Out& out) const {
    tiles.set_rows(rows, digits_.few);
    for (int64_t u = panels.begin; u < panels.end; ++u) {
      if (wide_rows_ == rows || V < 4) fill_bias(out(u), bias + u * kPanel, rows);
      if (wide_rows_ < rows)
        digit_product<V, Last>(digits_, {units_, nullptr, rows, 1}, rows, weights_ + u * V * digit_column_block(k_), out(u),
                               kPanel, bias + u * kPanel);
    }
    if (wide_rows_ == 0) return;
    tiles.lost();
    for (int64_t u = panels.begin; u < panels.end; ++u)
      parts_.product<V, Last>(wide_rows_, parts_weights_, u, out(u), wide_);
  }

 private:
  int64_t k_ = 0, blocks_ = 0, wide_rows_ = 0;
  bool normalised_ = false;
  const uint8_t* weights_ = nullptr;
  const void* parts_weights_ = nullptr;
  RowErrors errors_;
  InputParts parts_;
  DigitRows digits_{};
  float* units_ = nullptr;    // [rows]; 0: the row is not in digits
  int32_t* wide_ = nullptr;   // numbers of the rows that are parts
};

// h of all rows before a step and, while that step writes them, before the next one; a step's `turn` says which. They
// are taken to be in -1..1, but for rows of the first ones, h0, that are not.
class StateDigits {
 public:
  StateDigits() = default;
  StateDigits(float*& memory, int64_t batch, int64_t k, const float* h0) : batch_(batch), k_(k), h0_(h0) {
    for (uint8_t*& tiles : tiles_) tiles = take_bytes(memory, digit_rows_bytes(batch, k));
    for (float*& units : units_) units = take_floats(memory, batch);
    scales_ = take_floats(memory, batch);
    first_units_ = take_floats(memory, batch);
    first_scales_ = take_floats(memory, batch);
  }

  // Of `first`, the first step. By each thread, with its panels of kLanes units.
  void begin(const Walk& first, Range own, int thread, int threads, Barrier& barrier) const {
    const Range rows = share(batch_, thread, threads);
    constexpr int32_t kOne = 0x3f800000;  // bits of 1
    for (int64_t i = rows.begin; i < rows.end; ++i) {
      const int32_t largest = largest_magnitude(h0_ + i * k_, k_);
      // As states, unless larger: a sequence in pieces has the bits of the whole.
      const DigitScale later = digit_scale(kOne), at_first = digit_scale(largest > kOne ? largest : kOne);
      scales_[i] = later.scale;
      units_[0][i] = units_[1][i] = later.unit;
      first_scales_[i] = at_first.scale;
      first_units_[i] = at_first.unit;
    }
    barrier.wait();
    join(0, 0, first.rows(), own);
    barrier.wait();
  }

  // The rows [low, high) have their first step at the next turn.
  void join(int turn, int64_t low, int64_t high, Range own) const {
    for (int64_t i = low; i < high; ++i)
      for (int64_t at = own.begin * kLanes; at < own.end * kLanes; at += kLanes)
        put_digits(load_until(h0_ + i * k_, at, k_, 0.0f), first_scales_[i], rows(turn), i, at);
  }

  // kLanes units from `at` on of a row's h, before the step of that turn.
  FASTLM_MEMBER void put(int turn, int64_t row, int64_t at, vf h) const {
    put_digits(h, scales_[row], rows(turn), row, at);
#if defined(__AVX512F__)
    if (__builtin_expect(_mm512_cmp_ps_mask((__m512)h, (__m512)h, _CMP_UNORD_Q) != 0, false)) {
      // No integer is NaN. Every thread that finds one in the row writes the same; so will each of the later steps.
      const float nan = float_of(0x7fc00000);
      __atomic_store(units_[turn] + row, &nan, __ATOMIC_RELAXED);
    }
#endif
  }

  bool few() const { return batch_ <= kFewRows; }

  template <int V, int Last>
  void product(const Walk& step, int turn, const uint8_t* panel, float* out) const {
    const Rows units = {units_[turn], first_units_, step.rows_before(), 1};
    digit_product<V, Last>(rows(turn), units, step.rows(), panel, out, kPanel);
  }

 private:
  DigitRows rows(int turn) const { return {tiles_[turn], k_, few()}; }

  int64_t batch_ = 0, k_ = 0;
  const float* h0_ = nullptr;
  uint8_t* tiles_[2] = {};
  float *units_[2] = {}, *scales_ = nullptr;  // [B]; units_ by turn
  float *first_units_ = nullptr, *first_scales_ = nullptr;
};

// Gradients of the gates of one step, or states that have no bound known beforehand (one gate): each in units of its row's
// largest, whichever gate that is of. As digits their columns are [gates][hidden, filled up to a multiple of 16]. Of few
// rows each thread makes digits of them all, for itself: that takes less time than another meeting of the threads.
class GradientDigits {
 public:
  static int64_t depth(int64_t gates, int64_t hidden) { return gates * panels_for(hidden, kTileHeight) * kTileHeight; }
  GradientDigits() = default;
  GradientDigits(float*& memory, int64_t batch, int64_t gates, int64_t hidden, int threads)
      : gates_(gates), hidden_(hidden), slot_(floats_for(batch * 4)) {
    rows_ = {nullptr, depth(gates, hidden), batch <= kFewRows};
    bytes_ = digit_rows_bytes(batch, rows_.k);
    rows_.tiles = take_bytes(memory, bytes_ * (rows_.few ? threads : 1));
    units_ = take_floats(memory, threads * slot_);
    largest_ = reinterpret_cast<int32_t*>(take_floats(memory, threads * slot_));
  }

  // The gradients of a step as digits, from grads [rows, gates * hidden], of which each thread has written its own
  // units'. Behind the barrier that the step needs.
  void put(const float* grads, int64_t rows, Range units, int thread, int threads, Barrier& barrier) const {
    put({grads, nullptr, rows, gates_ * hidden_}, rows, units, thread, threads, barrier);
  }
  void put(const Rows& grads, int64_t rows, Range units, int thread, int threads, Barrier& barrier) const {
    if (rows_.few) {
      barrier.wait();
      for (int64_t i = 0; i < rows; ++i)
        put_row(grads[i], i, digit_scale(largest_magnitude(grads[i], gates_ * hidden_)), {0, hidden_}, thread);
      return;
    }
    const int64_t high = units.end < hidden_ ? units.end : hidden_;
    for (int64_t i = 0; i < rows; ++i) {
      int32_t most = 0;
      for (int64_t gate = 0; gate < gates_ && units.begin < high; ++gate) {
        const int32_t of_gate = largest_magnitude(grads[i] + gate * hidden_ + units.begin, high - units.begin);
        most = of_gate > most ? of_gate : most;
      }
      largest_[thread * slot_ + i] = most;
    }
    barrier.wait();
    for (int64_t i = 0; i < rows; ++i) {
      int32_t most = 0;
      for (int other = 0; other < threads; ++other)
        most = largest_[other * slot_ + i] > most ? largest_[other * slot_ + i] : most;
      put_row(grads[i], i, digit_scale(most), {units.begin, high}, thread);
    }
    barrier.wait();
  }

  // out += the rows' gradients times a panel of W_hh.
  template <int V = 4, int Last = V - 1>
  void product(int64_t count, const uint8_t* panel, int thread, float* out, int64_t out_stride) const {
    digit_product<V, Last>(rows(thread), {units_ + thread * slot_, nullptr, count, 1}, count, panel, out, out_stride);
  }
  bool few() const { return rows_.few; }
  int64_t panel_bytes() const { return 4 * digit_column_block(rows_.k); }

 private:
  DigitRows rows(int thread) const { return {rows_.tiles + (rows_.few ? thread * bytes_ : 0), rows_.k, rows_.few}; }
  void put_row(const float* row, int64_t i, DigitScale by, Range units, int thread) const {
    units_[thread * slot_ + i] = by.unit;
    for (int64_t gate = 0; gate < gates_; ++gate)
      for (int64_t at = units.begin; at < units.end; at += kLanes)
        put_digits(load_until(row + gate * hidden_, at, hidden_, 0.0f), by.scale, rows(thread), i,
                   gate * (rows_.k / gates_) + at);
  }

  int64_t gates_ = 0, hidden_ = 0, slot_ = 0, bytes_ = 0;
  DigitRows rows_{};
  float* units_ = nullptr;      // [threads][B]
  int32_t* largest_ = nullptr;  // [threads][B], bits of a float
};

}  // namespace FASTLM_ISA
}  // namespace fastlm
