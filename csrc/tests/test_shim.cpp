// The tool that runs CUDA device code on the CPU: it computes what a GPU would, and finds what is planted.
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "check.h"
#include "shim/cuda_on_cpu.h"

namespace {

using shim::Index;

// Launches `body`, a callable without arguments, and returns what went wrong, or "".
template <typename F>
std::string run(unsigned blocks, unsigned threads, F body, std::size_t shared = 0, bool cooperative = false) {
  struct Data {
    F body;
  } data{body};
  const char* error = shim::run({blocks}, {threads}, shared, cooperative,
                                [](void* d) { static_cast<Data*>(d)->body(); }, &data);
  return error == nullptr ? "" : error;
}
bool has(const std::string& text, const char* part) { return text.find(part) != std::string::npos; }

struct Seed {
  explicit Seed(uint64_t seed) { shim::options().seed = seed; }
  ~Seed() { shim::options().seed = 0; }
};
struct Watch {
  Watch(const char* name, const void* p, std::size_t bytes) { shim::watch(name, p, bytes); }
  ~Watch() { shim::forget_all(); }
};

const char kKey = 0;
float* shared_floats(int n) { return static_cast<float*>(shim::static_shared(&kKey, n * sizeof(float))); }

float warp_sum(float x) {
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(~0u, x, lanes);
  return x;
}

// Every block leaves the sum of `in` over its threads, by shuffles and shared memory; `barrier` false plants a race.
void block_sum(const float* in, float* out, bool barrier) {
  float* const partial = shared_floats(8);
  const unsigned t = threadIdx.x;
  const float sum = warp_sum(in[blockIdx.x * blockDim.x + t]);
  if (t % 32 == 0) partial[t / 32] = sum;
  if (barrier) __syncthreads();
  if (t == 0) {
    float total = 0;
    for (unsigned w = 0; w < blockDim.x / 32; ++w) total += partial[w];
    out[blockIdx.x] = total;
  }
}

// Blocks meet: `fenced` false leaves the fence out before the arrival is announced.
void meet(unsigned* count, unsigned blocks, bool fenced = true) {
  __syncthreads();
  if (threadIdx.x == 0) {
    if (fenced) __threadfence();
    atomicAdd(count, 1u);
    while (atomicAdd(count, 0u) < blocks) __nanosleep(20);
    __threadfence();
  }
  __syncthreads();
}

}  // namespace

FASTLM_TEST_ONCE(shim_runs_blocks_with_shuffles_barriers_and_shared_memory) {
  std::vector<float> in(3 * 256), out(3, NAN);
  for (size_t i = 0; i < in.size(); ++i) in[i] = float(i % 97);
  for (const uint64_t seed : {0, 1, 2, 3}) {
    Seed shuffled(seed);
    CHECK(run(3, 256, [&] { block_sum(in.data(), out.data(), true); }) == "");
    for (int b = 0; b < 3; ++b) {
      float want = 0;
      for (int i = 0; i < 256; ++i) want += in[b * 256 + i];
      CHECK(out[b] == want);
    }
  }
}

FASTLM_TEST_ONCE(shim_warp_operations) {
  std::vector<int> found(32 * 5);
  CHECK(run(1, 32, [&] {
          const int lane = int(threadIdx.x);
          found[lane] = __shfl_sync(~0u, lane, (lane + 5) % 32);
          found[32 + lane] = __shfl_up_sync(~0u, lane, 3);
          found[64 + lane] = __shfl_down_sync(~0u, lane, 3);
          found[96 + lane] = int(__ballot_sync(~0u, lane % 3 == 0));
          if (lane < 8) found[128 + lane] = __shfl_xor_sync(0xFFu, lane, 1) + 10 * __any_sync(0xFFu, lane == 7);
        }) == "");
  for (int lane = 0; lane < 32; ++lane) {
    CHECK(found[lane] == (lane + 5) % 32);
    CHECK(found[32 + lane] == (lane < 3 ? lane : lane - 3));
    CHECK(found[64 + lane] == (lane + 3 > 31 ? lane : lane + 3));
    CHECK(uint32_t(found[96 + lane]) == 0x49249249u);
    if (lane < 8) CHECK(found[128 + lane] == (lane ^ 1) + 10);
  }
  CHECK(has(run(1, 32, [] { __shfl_sync(threadIdx.x == 4 ? 0xFu : ~0u, 1, 0); }), "leaves out the caller"));
  CHECK(has(run(1, 32, [] {
              if (threadIdx.x < 8) __shfl_sync(0xFFu, 1, 9);
            }),
            "reads lane 9, which is not in its mask"));
  CHECK(has(run(1, 32, [] {
              if (threadIdx.x != 3) __syncwarp();
            }),
            "names lane 3, which does not run"));
}

FASTLM_TEST_ONCE(shim_finds_planted_barrier_faults) {
  CHECK(has(run(1, 64, [] {
              if (threadIdx.x < 40) __syncthreads();
            }),
            "barrier that others have exited without") ||
        has(run(1, 64, [] {
              if (threadIdx.x < 40) __syncthreads();
            }),
            "for threads that never come"));
  CHECK(has(run(1, 64, [] {
              if (threadIdx.x < 32)
                __syncthreads();
              else
                __syncthreads();
            }),
            "the barrier at line"));
  CHECK(has(run(1, 32, [] {
              if (threadIdx.x == 0)
                __syncthreads();
              else
                __syncwarp();
            }),
            "never come"));
  unsigned count = 0;
  CHECK(has(run(2, 32, [&] {
              if (blockIdx.x == 0) meet(&count, 2);
            }, 0, true),
            "for ever"));
}

FASTLM_TEST_ONCE(shim_finds_a_planted_race_by_its_log_or_by_the_order) {
  std::vector<float> in(256, 1.0f);
  float out = 0;
  if (shim::logs_accesses())  // even in the order in which the result happens to be right
    CHECK(has(run(1, 256, [&] { block_sum(in.data(), &out, false); }), "a race"));
  bool differs = false;
  for (uint64_t seed = 1; seed < 10; ++seed) {
    Seed shuffled(seed);
    out = 0;
    differs |= run(1, 256, [&] { block_sum(in.data(), &out, false); }) != "" || out != 256;
  }
  CHECK(differs);
}

FASTLM_TEST_ONCE(shim_tells_races_from_what_is_ordered) {
  if (!shim::logs_accesses()) return;
  std::vector<int> data(64);
  int* const d = data.data();
  // All write one place; neighbours across a missing barrier; a read that a later write overtakes.
  CHECK(has(run(1, 32, [=] { d[0] = int(threadIdx.x); }), "a race"));
  CHECK(has(run(1, 32, [=] {
              const int old = d[(threadIdx.x + 1) % 32];
              d[threadIdx.x] = old;
            }),
            "a race"));
  CHECK(run(1, 32, [=] {
          const int old = d[(threadIdx.x + 1) % 32];
          __syncwarp();
          d[threadIdx.x] = old;
        }) == "");
  CHECK(has(run(1, 64, [=] {  // __syncwarp orders no other warp
              const int old = d[(threadIdx.x + 1) % 64];
              __syncwarp();
              d[threadIdx.x] = old;
            }),
            "a race"));
  CHECK(has(run(1, 32, [=] {  // a shuffle orders no memory
              d[threadIdx.x] = 1;
              __shfl_sync(~0u, 1, 0);
              d[threadIdx.x ^ 1] = 2;
            }),
            "a race"));
  CHECK(run(1, 64, [=] { atomicAdd(d, 1); }) == "");
  CHECK(has(run(1, 64, [=] { threadIdx.x == 0 ? void(d[0] = 1) : void(atomicAdd(d, 1)); }), "a race"));
  CHECK(has(run(2, 1, [=] { d[0] = int(blockIdx.x); }), "a race"));
  // Between blocks a fence and an atomic on both sides make the order.
  for (const bool fenced : {true, false}) {
    unsigned count = 0;
    unsigned* const c = &count;
    const std::string error = run(2, 32, [=] {
      d[threadIdx.x + 32 * blockIdx.x] = 3;
      meet(c, 2, fenced);
      d[threadIdx.x + 32 * (1 - blockIdx.x)] += 1;
    }, 0, true);
    CHECK(fenced ? error == "" : has(error, "a race"));
  }
}

FASTLM_TEST_ONCE(shim_finds_planted_accesses_out_of_bounds) {
  if (!shim::logs_accesses()) return;  // ASan's to find, and it ends the process
  std::vector<float> in(100), out(100);
  const float* const a = in.data();
  float* const b = out.data();
  Watch first("in", a, 400), second("out", b, 400);
  const auto copy = [=](unsigned n) {
    return run(1, 128, [=] {
      if (threadIdx.x < n) b[threadIdx.x] = a[threadIdx.x];
    });
  };
  CHECK(copy(100) == "");
  CHECK(has(copy(101), "thread (100, 0, 0) of block (0, 0, 0) reads 4 bytes out of bounds, 0 bytes past the end of in"));
  CHECK(has(run(1, 1, [=] { b[-1] = 0; }), "writes 4 bytes out of bounds, 4 bytes before out"));
  const auto shared = [](int index) {
    return run(1, 1, [=] { reinterpret_cast<float*>(shim::dynamic_shared())[index] = 1; }, 64);
  };
  CHECK(shared(15) == "");
  CHECK(has(shared(16), "out of bounds"));
  CHECK(has(run(1, 1, [] { shared_floats(8)[8] = 1; }), "out of bounds"));
  CHECK(has(run(1, 1, [] {}, 1 << 20), "invalid configuration"));
}
