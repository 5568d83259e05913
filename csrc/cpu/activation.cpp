#include "fastlm/activation.h"

#include "bfloat.h"
#include "light_work.h"
#include "simd_math.h"

namespace fastlm {
namespace FASTLM_ISA {
namespace {

struct Value {
  vf value, slope;
};

struct Silu {
  static FASTLM_MEMBER Value at(vf x) {
    const vf s = sigmoid(x);
    return {x * s, s * (x * (1.0f - s) + 1.0f)};
  }
};

// (1 + tanh u) / 2 = sigmoid(2 u), which loses nothing where tanh is near -1.
struct GeluTanh {
  static FASTLM_MEMBER Value at(vf x) {
    const vf s = sigmoid((x + x * x * x * 0.044715f) * 1.59576912160573f);
    return {x * s, s * (x * (1.0f - s) * (x * x * (3 * 0.044715f * 1.59576912160573f) + 1.59576912160573f) + 1.0f)};
  }
};

template <typename F, bool Bfloats>
struct Forward {
  static FASTLM_MEMBER void run(const Activation& a, Range mine) {
    using Memory = At<Bfloats>;
    for (int64_t i = mine.begin; i < mine.end; i += kLanes) {
      // The last few elements take the same path as all others: a scalar tail would round differently.
      vf y = F::at(Memory::load(a.input, i, mine.end)).value;
      if (a.factor) y *= Memory::load(a.factor, i, mine.end);
      Memory::store(a.output, i, mine.end, y);
    }
  }
};

template <typename F, bool Bfloats>
struct Backward {
  static FASTLM_MEMBER void run(const ActivationBackward& a, Range mine) {
    using Memory = At<Bfloats>;
    for (int64_t i = mine.begin; i < mine.end; i += kLanes) {
      vf grad = Memory::load(a.grad_output, i, mine.end);
      const Value f = F::at(Memory::load(a.input, i, mine.end));
      if (a.factor) {
        Memory::store(a.grad_factor, i, mine.end, grad * f.value);
        grad *= Memory::load(a.factor, i, mine.end);
      }
      Memory::store(a.grad_input, i, mine.end, grad * f.slope);
    }
  }
};

template <template <typename, bool> class Pass, typename F, typename Args>
FASTLM_INLINE void with_memory(const Args& a, Range mine) {
  if (a.bfloats)
    Pass<F, true>::run(a, mine);
  else
    Pass<F, false>::run(a, mine);
}

template <template <typename, bool> class Pass, typename Args>
FASTLM_INLINE void run(const Args& a) {
  parallel(light_threads(a.count, a.threads), [&](int thread, int threads, Barrier&) {
    const Range mine = share(a.count, thread, threads, kLanes);
    if (a.function == ActivationFunction::kSilu)
      with_memory<Pass, Silu>(a, mine);
    else
      with_memory<Pass, GeluTanh>(a, mine);
  });
}

}  // namespace

void activation(const Activation& a) { run<Forward>(a); }

void activation_backward(const ActivationBackward& a) { run<Backward>(a); }

}  // namespace FASTLM_ISA
}  // namespace fastlm
