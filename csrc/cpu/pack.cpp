#include "fastlm/pack.h"

#include <utility>

#include "gemm_panel.h"

namespace fastlm {
namespace FASTLM_ISA {

namespace {

// One stage of a transpose: where the lane's bit S is not that of the row, rows i and i + S exchange lanes.
template <int S, int... Lane>
FASTLM_INLINE void exchange(vf (&rows)[kLanes], std::integer_sequence<int, Lane...>) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i & S) continue;
    const vf low = rows[i], high = rows[i + S];
    rows[i] = __builtin_shufflevector(low, high, (Lane & S ? kLanes + Lane - S : Lane)...);
    rows[i + S] = __builtin_shufflevector(low, high, (Lane & S ? kLanes + Lane : Lane + S)...);
  }
}
template <int S = kLanes / 2>
FASTLM_INLINE void transpose(vf (&rows)[kLanes]) {
  exchange<S>(rows, std::make_integer_sequence<int, kLanes>());
  if constexpr (S > 1) transpose<S / 2>(rows);
}

template <typename W>
void pack_as(const PackPanels& a) {
  constexpr int64_t kSteps = sizeof(W) == 2 ? 2 : 1;  // values of k that lie beside each other
  const bool by_gates = a.gates != 0;
  const int64_t units = by_gates ? a.n / a.gates : a.n;
  const int64_t per_panel = by_gates ? kLanes : kPanel;
  const int64_t vectors = by_gates ? a.gates : 4;
  // Where a panel's vector v begins in the source, and how many of its lanes the matrix has.
  const int64_t between = by_gates ? units : kLanes;
  const int64_t panels = panels_for(units, per_panel);
  const int64_t tile = a.stride_k == 1 ? 64 : 16;  // along k, of which cache lines of the source are
#pragma omp parallel for num_threads(a.threads) if (a.threads > 1)
  for (int64_t p = 0; p < panels; ++p) {
    W* panel = static_cast<W*>(a.packed) + p * panel_size<W>(a.k, vectors * kLanes);
    for (int64_t k0 = 0; k0 < a.k; k0 += tile) {
      const int64_t k1 = k0 + tile < a.k ? k0 + tile : a.k;
      for (int64_t v = 0; v < vectors; ++v) {
        const int64_t first = p * per_panel + (by_gates ? 0 : v * kLanes);
        int64_t valid = units - first;
        valid = valid < 0 ? 0 : valid < kLanes ? valid : kLanes;
        const W* source = static_cast<const W*>(a.source) + (p * per_panel + v * between) * a.stride_n;
        int64_t k = k0;
        // The two bfloat16 that share a word move together.
        for (; a.stride_k == 1 && valid == kLanes && k + kLanes * kSteps <= k1; k += kLanes * kSteps) {
          vf rows[kLanes];
#pragma GCC unroll 16
          for (int lane = 0; lane < kLanes; ++lane) rows[lane] = load_as<vf>(source + k + lane * a.stride_n);
          transpose(rows);
#pragma GCC unroll 16
          for (int i = 0; i < kLanes; ++i)
            std::memcpy(panel + ((k / kSteps + i) * vectors + v) * kLanes * kSteps, &rows[i], sizeof(vf));
        }
        for (; k < k1; ++k) {
          W* to = panel + (k / kSteps * vectors + v) * kLanes * kSteps + k % kSteps;
          const W* from = source + k * a.stride_k;
          if (valid < kLanes) {
            for (int64_t lane = 0; lane < kLanes; ++lane)
              to[lane * kSteps] = lane < valid ? from[lane * a.stride_n] : W{};
          } else if (kSteps == 1 && a.stride_n == 1) {
            std::memcpy(to, from, kLanes * sizeof(W));
          } else {
            for (int64_t lane = 0; lane < kLanes; ++lane) to[lane * kSteps] = from[lane * a.stride_n];
          }
        }
      }
    }
  }
}

}  // namespace

void pack_panels(const PackPanels& a) { a.bfloat ? pack_as<uint16_t>(a) : pack_as<float>(a); }

int64_t packed_size(int64_t k, int64_t n, int64_t gates, bool bfloat) {
  const int64_t columns = gates != 0 ? panels_for(n / gates, kLanes) * gates * kLanes : panels_for(n, kPanel) * kPanel;
  return bfloat ? panel_size<uint16_t>(k, columns) : panel_size<float>(k, columns);
}

}  // namespace FASTLM_ISA
}  // namespace fastlm
