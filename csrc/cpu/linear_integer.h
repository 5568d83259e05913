// Integer products of rounded inputs with interleaved weights of the Q kinds.
#pragma once

#include "blocks.h"
#include "threads.h"

namespace fastlm {
namespace FASTLM_ISA {

// --- Rounding of inputs -----------------------------------------------------------------------------------------

constexpr int32_t kLaneNumbers[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// The lanes reduced by `f`.
template <typename F>
FASTLM_INLINE int32_t across(vi v, const F& f) {
  for (int width = kLanes / 2; width > 0; width /= 2) v = f(v, __builtin_shuffle(v, load_as<vi>(kLaneNumbers) ^ width));
  return v[0];
}

// To the nearest integer, halves to even.
FASTLM_INLINE vi round_to_int(vf x) {
#if defined(__AVX512F__)
  return (vi)_mm512_cvtps_epi32((__m512)x);
#elif defined(__AVX2__)
  return (vi)_mm256_cvtps_epi32((__m256)x);
#elif defined(__SSE2__)
  return (vi)_mm_cvtps_epi32((__m128)x);
#else
  vi y;
  for (int i = 0; i < kLanes; ++i) y[i] = static_cast<int32_t>(__builtin_rintf(x[i]));
  return y;
#endif
}

FASTLM_INLINE void store_bytes(int8_t* p, vi v) {
#if defined(__AVX512F__)
  const __m128i bytes = _mm512_cvtepi32_epi8((__m512i)v);
#elif defined(__AVX2__)
  const __m256i halves = _mm256_shuffle_epi8((__m256i)v, _mm256_set1_epi32(0x0c080400));
  const __m128i bytes =
      _mm_unpacklo_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
#else
  typedef int8_t narrow __attribute__((vector_size(kLanes)));
  const narrow bytes = __builtin_convertvector(v, narrow);
#endif
  std::memcpy(p, &bytes, kLanes);
}

// Rounds part `part` of a block's inputs, those that share a scale. See fastlm.reference.linear.quantize_activations.
template <Rounding rounding>
FASTLM_INLINE void round_part(const float* x, InputBlock& block, int part) {
  constexpr bool fine = rounding == Rounding::kBits15;
  constexpr int kCount = fine ? kBlock : kBlock / 2;
  constexpr float kSteps = fine ? 127.0f * 128.0f : 127.0f;
  x += part * kCount;
  vi bits{};  // of the largest magnitude; as integers, NaN > infinity > every number
  const auto larger = [](vi a, vi b) { return (a > b) ? a : b; };
  for (int i = 0; i < kCount; i += kLanes) bits = larger(bits, as_int(load(x + i)) & 0x7fffffff);
  const int32_t largest_bits = across(bits, larger);
  float largest;
  std::memcpy(&largest, &largest_bits, sizeof(largest));

  const bool finite = largest_bits < 0x7f800000, usable = finite && largest >= 0x1p-100f;
  const float inverse = usable ? kSteps / largest : 0.0f;
  vi sum{};
  for (int i = 0; i < kCount; i += kLanes) {
    const vi code = usable ? round_to_int(load(x + i) * inverse) : vi{};
    sum += code;
    if constexpr (fine) {
      const vi high = (code + 64) >> 7;  // code = 128 high + low, -64 <= low < 64
      store_bytes(block.first + i, high);
      store_bytes(block.second + i, code - (high << 7));
    } else {
      store_bytes(block.first + part * kCount + i, code);
    }
  }
  const int32_t total = across(sum, [](vi a, vi b) { return a + b; });
  block.scales[part] = usable ? largest * (1 / kSteps) : finite ? 0.0f : __builtin_nanf("");
  block.minus_8[part] = -8 * total;
  const float scaled = block.scales[part] * static_cast<float>(total);
  block.sum = part == 0 ? scaled : block.sum + scaled;
}

template <Rounding rounding>
FASTLM_INLINE void round_input(const float* x, InputBlock& block) {
  round_part<rounding>(x, block, 0);
  if constexpr (rounding == Rounding::kBits8) round_part<rounding>(x, block, 1);
}

// --- Products ---------------------------------------------------------------------------------------------------

constexpr int64_t panel_bytes(WeightKind kind, int64_t columns) { return kLanes * weight_bytes(kind, columns); }

// Adds a block: `dot`, of codes and scaled inputs, and for Q4_1 what the minimum adds to it.
template <WeightKind kind>
FASTLM_INLINE void add_block(vf& sum, vf dot, vf scale, vf minimum, float input_sum) {
  sum += dot * scale;
  if constexpr (kind == WeightKind::kQ4_1) sum += minimum * input_sum;
}

// The outputs `first` .. of row m, as many as there are in a vector.
FASTLM_INLINE void write_outputs(const LinearWeight& w, int64_t m, int64_t first, vf sum) {
  float* const out = w.output + m * w.outputs + first;
  const vf bias = w.bias == nullptr ? vf{} : load_until(w.bias, first, w.outputs, 0.0f);
  if (first + kLanes <= w.outputs)
    store(out, sum + bias);
  else
    store_partial(out, sum + bias, static_cast<int>(w.outputs - first));
}

// Outputs first .. first + valid - 1 (valid <= kLanes), whose weights are the `panel`, for M rows of the input from m0.
template <WeightKind kind, Rounding rounding, int M>
FASTLM_INLINE void integer_tile(const LinearArgs& a, const LinearWeight& w, const uint8_t* panel, int64_t first,
                                int64_t m0) {
  constexpr int64_t kStep = panel_bytes(kind, kBlock), kHeader = kLanes * (kind == WeightKind::kQ4_1 ? 4 : 2);
  const int64_t ahead = a.ahead != 0 ? a.ahead : 12288;
  constexpr int kVector = kLanes * 4;
  constexpr bool fine = rounding == Rounding::kBits15, nibbles = kind != WeightKind::kQ8_0;
  const int64_t blocks = a.columns / kBlock;
  const InputBlock* x = a.scratch + m0 * blocks;
  vf sums[M] = {};
  for (int64_t b = 0; b < blocks; ++b, ++x, panel += kStep) {
    if constexpr (M == 1 || fine)
      for (int64_t line = 0; line < kStep; line += 64) __builtin_prefetch(panel + ahead + line, 0, 2);
    // Of the first and second 16 columns, or of the high and low parts of the input.
    LaneSum<kind> dots[M][2];
    for (int j = 0; j < 4; ++j) {
      vbyte low, high;
      if constexpr (nibbles) {
        const vbyte packed = load_as<vbyte>(panel + kHeader + j * kVector);
        low = packed & 15;
        high = (vbyte)((vi)packed >> 4) & 15;
      } else {
        low = load_as<vbyte>(panel + kHeader + j * kVector);
        high = load_as<vbyte>(panel + kHeader + (4 + j) * kVector);
      }
      for (int m = 0; m < M; ++m) {
        const InputBlock& input = x[m * blocks];
        dots[m][0].add(low, broadcast_codes(input.first + 4 * j));
        dots[m][fine ? 0 : 1].add(high, broadcast_codes(input.first + 16 + 4 * j));
        if constexpr (fine) {
          dots[m][1].add(low, broadcast_codes(input.second + 4 * j));
          dots[m][1].add(high, broadcast_codes(input.second + 16 + 4 * j));
        }
      }
    }
    const vf scale = load_halves(panel);
    vf minimum{};
    if constexpr (kind == WeightKind::kQ4_1) minimum = load_halves(panel + 2 * kLanes);
    for (int m = 0; m < M; ++m) {
      const InputBlock& input = x[m * blocks];
      constexpr int kEights = added_to_codes(kind) / 8;
      vf dot;
      if constexpr (fine) {
        dot = to_float((dots[m][0].total() << 7) + dots[m][1].total() + input.minus_8[0] * kEights) * input.scales[0];
      } else {
        dot = to_float(dots[m][0].total() + input.minus_8[0] * kEights) * input.scales[0];
        dot += to_float(dots[m][1].total() + input.minus_8[1] * kEights) * input.scales[1];
      }
      add_block<kind>(sums[m], dot, scale, minimum, input.sum);
    }
  }
  for (int m = 0; m < M; ++m) write_outputs(w, m0 + m, first, sums[m]);
}

template <WeightKind kind, Rounding rounding, int M>
FASTLM_INLINE void integer_tiles(const LinearArgs& a, const LinearWeight& w, int64_t begin, int64_t end, int64_t& m) {
  const int64_t bytes = panel_bytes(kind, a.columns);
  const uint8_t* panel = static_cast<const uint8_t*>(w.weight) + begin / kLanes * bytes;
  for (; m + M <= a.rows; m += M)
    for (int64_t n = begin; n < end; n += kLanes)
      integer_tile<kind, rounding, M>(a, w, panel + (n - begin) / kLanes * bytes, n, m);
}

}  // namespace FASTLM_ISA
}  // namespace fastlm
