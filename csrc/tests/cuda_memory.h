// What the tests of the recurrent CUDA kernels share: memory that the shim knows, and faults planted in their barriers.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <string>
#include <vector>

#include "cuda_on_cpu.h"

namespace {

struct Random {
  uint32_t state = 3;
  float operator()(float scale) {
    state = state * 1664525u + 1013904223u;
    return (float(state >> 8) / (1 << 23) - 1) * scale;
  }
};

// Device memory: known to the shim by name.
struct Memory {
  std::vector<std::vector<float>> kept;
  Random random;
  Memory() { kept.reserve(64); }
  ~Memory() {
    shim::forget_all();
    shim::options() = shim::Options();
  }
  float* operator()(const char* name, int64_t n, float scale) {
    kept.emplace_back(n);
    for (float& x : kept.back()) x = scale == 0 ? NAN : random(scale);
    shim::watch(name, kept.back().data(), n * 4);
    return kept.back().data();
  }
};

inline double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }
inline double share(const float* p, int64_t i) { return p == nullptr ? 0 : p[i]; }

inline std::string told(std::string error) {
  if (!error.empty()) std::puts(error.c_str());
  return error;
}
inline std::string told(const char* error) { return told(std::string(error == nullptr ? "" : error)); }

// Those barriers and fences in files of these names, of all that were reached, without which `run` goes through: none
// should, or they would be too many, or the shim blind to them. `planted` counts the others.
inline std::vector<shim::Site> needless(std::initializer_list<const char*> files,
                                        const std::function<std::string(shim::Site)>& run, int* planted) {
  std::vector<shim::Site> found;
  for (const shim::Site& site : std::vector<shim::Site>(shim::sites())) {
    bool ours = false;
    for (const char* file : files) ours = ours || std::strstr(site.file, file) != nullptr;
    if (!ours) continue;
    if (!run(site).empty()) {
      ++*planted;
      continue;
    }
    std::printf("%s:%d can be left out\n", site.file, site.line);
    found.push_back(site);
  }
  return found;
}

}  // namespace
