// CUDA: drawing one token per row of logits, the very token that sample() of fastlm/sample.h draws.
#pragma once

#include "fastlm/sample.h"
#include "fastlm/storage.h"

namespace fastlm {

// Launches on `stream` of the current device and returns at once: null, or what went wrong. Rows that cannot be drawn
// from get the token -1. Every pointer is device memory, those of per-row options included; logits are of `storage`.
// `threads` and `scratch_vocab` are not used. `scratch` has sample_cuda_scratch() bytes, aligned to 16, all zero before
// its first use; a call leaves it fit for others of the same batch, vocab and history. One call at a time.
const char* sample_cuda(const SampleArgs& args, Storage storage, void* stream);

std::size_t sample_cuda_scratch(int64_t batch, int64_t vocab, bool history);

}  // namespace fastlm
