// Launchers of one LSTM step and of sequences.
#include "fastlm/recurrent_cuda.h"

#include "launch.h"
#include "lstm_sequence_backward.cuh"

namespace fastlm {
namespace {

using device::Shape;

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

int64_t padded(int64_t hidden) { return (hidden + 7) / 8 * 8; }  // whole packs of every storage

// Units of a block of the persistent kernels: one block on each multiprocessor, or fewer, since the more there are, the
// longer they take to meet.
int64_t units_of_block(int64_t hidden, int multiprocessors) {
  const int64_t units = (hidden + multiprocessors - 1) / multiprocessors, warps = device::kSequenceWarps;
  return units < warps ? (hidden < warps ? hidden : warps) : units;
}

}  // namespace

const char* lstm_step_cuda(const LstmStepCuda& args, void* stream) {
  if (args.batch == 0 || args.hidden == 0) return nullptr;
  constexpr int kUnits = device::kStepThreads / device::kWarp;
  const Shape shape{unsigned((args.hidden + kUnits - 1) / kUnits), device::kStepThreads, 0, false};
  return device::with_type(args.storage, [&](auto type) {
    using T = decltype(type);
    constexpr int kPack = 16 / sizeof(T);
    const bool whole = args.inputs % kPack == 0 && args.hidden % kPack == 0 && aligned(args.x) &&
                       aligned(args.h_prev) && aligned(args.w_ih) && aligned(args.w_hh);
    const auto kernel = !whole            ? device::lstm_step_kernel<T, 4, 1>
                        : args.batch == 1 ? device::lstm_step_kernel<T, 1, kPack>
                                          : device::lstm_step_kernel<T, 4, kPack>;
    return device::launch(kernel, shape, stream, args);
  });
}

std::size_t lstm_sequence_cuda_scratch(int64_t batch, int64_t hidden) {
  return 64 + std::size_t(batch) * std::size_t(hidden) * 8 + std::size_t(batch) * std::size_t(padded(hidden)) * 8 + 16;
}

const char* lstm_sequence_cuda(const LstmSequenceCuda& args, void* stream) {
  if (args.batch == 0 || args.steps == 0 || args.hidden == 0) return nullptr;
  device::Limits limits;
  if (const char* error = device::limits(&limits)) return error;
  return device::with_type(args.storage, [&](auto type) -> const char* {
    using T = decltype(type);
    device::LstmSequenceLaunch launch{};
    launch.args = args;
    launch.barrier = static_cast<unsigned*>(args.scratch);
    launch.states = reinterpret_cast<float*>(static_cast<char*>(args.scratch) + 64);
    const std::size_t states = std::size_t(args.batch) * std::size_t(args.hidden) * 8;
    launch.exchanged = static_cast<char*>(args.scratch) + 64 + (states + 15) / 16 * 16;
    launch.stride = padded(args.hidden);
    launch.units = units_of_block(args.hidden, limits.multiprocessors);
    const int64_t row = launch.stride * int64_t{sizeof(T)}, rows = args.batch == 1 || limits.shared < 8 * row ? 1 : 8;
    const int64_t space = limits.shared - rows * row;
    if (space < 0) return "lstm_sequence: the hidden size is too large for shared memory";
    launch.shared_units = space / (4 * row) < launch.units ? space / (4 * row) : launch.units;
    const Shape shape{unsigned((args.hidden + launch.units - 1) / launch.units), device::kSequenceThreads,
                      std::size_t(rows * row + launch.shared_units * 4 * row), true};
    return device::launch(rows == 1 ? device::lstm_sequence_kernel<T, 1> : device::lstm_sequence_kernel<T, 8>, shape,
                          stream, launch);
  });
}

const char* lstm_sequence_backward_cuda(const LstmSequenceGradientsCuda& args, void* stream) {
  const LstmSequenceCuda& a = args.sequence;
  if (a.batch == 0 || a.steps == 0 || a.hidden == 0) return nullptr;
  device::Limits limits;
  if (const char* error = device::limits(&limits)) return error;
  return device::with_type(a.storage, [&](auto type) -> const char* {
    using T = decltype(type);
    device::LstmSequenceBackwardLaunch launch{};
    launch.args = args;
    launch.barrier = static_cast<unsigned*>(a.scratch);
    launch.states = reinterpret_cast<float*>(static_cast<char*>(a.scratch) + 64);
    // Whole quadruples, of which a warp makes each in the time of one unit.
    launch.units = (units_of_block(a.hidden, limits.multiprocessors) + 3) / 4 * 4;
    const int64_t rows = a.batch == 1 ? 1 : 8, row = 4 * a.hidden * int64_t{sizeof(T)};
    const int64_t sums = launch.units / 4 * device::kSequenceWarps * 4 * rows * 4, space = limits.shared - sums;
    if (space < 0) return "lstm_sequence_backward: the hidden size is too large for shared memory";
    launch.shared_units = space / row / 4 * 4 < launch.units ? space / row / 4 * 4 : launch.units;
    const Shape shape{unsigned((a.hidden + launch.units - 1) / launch.units), device::kSequenceThreads,
                      std::size_t(sums + launch.shared_units * row), true};
    return device::launch(rows == 1 ? device::lstm_sequence_backward_kernel<T, 1>
                                    : device::lstm_sequence_backward_kernel<T, 8>,
                          shape, stream, launch);
  });
}

const char* cuda_device_error() {
#if defined(__CUDACC__)
  cudaFuncAttributes attributes;
  return device::message(cudaFuncGetAttributes(&attributes, device::lstm_step_kernel<float, 1, 4>));
#else
  return nullptr;
#endif
}

int cuda_device_count() {
#if defined(__CUDACC__)
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
  cudaGetLastError();  // clears the error, which would otherwise surface in the next launch
  return 0;
#else
  return 1;
#endif
}

}  // namespace fastlm
