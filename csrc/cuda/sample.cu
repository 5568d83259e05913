// Launcher of the sampler.
#include "fastlm/sample_cuda.h"

#include "launch.h"
#include "sample.cuh"

namespace fastlm {
namespace {

// Elements for which another block pays: fewer are read in less time than blocks take to meet.
constexpr int64_t kElementsPerBlock = 4096;

template <typename T>
const char* run(const SampleArgs& args, void* stream) {
  device::Shape shape{1, device::kSampleThreads, 0, true};
  int resident = 0;
  device::Limits limits;
  if (const char* error = device::limits(&limits)) return error;
  if (const char* error = device::resident_blocks(device::sample_kernel<T>, shape, &resident)) return error;
  // All blocks of a group have to be resident, so as many groups as there are rows have to fit.
  int64_t blocks = int64_t{resident} * limits.multiprocessors / args.batch;
  blocks = blocks < args.vocab / kElementsPerBlock ? blocks : args.vocab / kElementsPerBlock;
  blocks = blocks < 1 ? 1 : blocks > device::kMostSampleBlocks ? device::kMostSampleBlocks : blocks;
  shape.blocks = unsigned(args.batch * blocks);
  shape.cooperative = blocks > 1;
  device::SampleLaunch launch{args, static_cast<device::SampleScratch*>(args.scratch), nullptr, nullptr,
                              unsigned(blocks)};
  launch.processed = reinterpret_cast<float*>(launch.rows + args.batch);
  launch.counts = reinterpret_cast<unsigned*>(launch.processed + args.batch * args.vocab);
  return device::launch(device::sample_kernel<T>, shape, stream, launch);
}

}  // namespace

std::size_t sample_cuda_scratch(int64_t batch, int64_t vocab, bool history) {
  return std::size_t(batch) * (sizeof(device::SampleScratch) + (history ? std::size_t(vocab) * 8 : 0));
}

const char* sample_cuda(const SampleArgs& args, Storage storage, void* stream) {
  if (args.batch == 0) return nullptr;
  return device::with_type(storage, [&](auto type) { return run<decltype(type)>(args, stream); });
}

}  // namespace fastlm
