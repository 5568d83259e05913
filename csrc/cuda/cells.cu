// Launchers of the recurrent cells' pointwise halves: a block for each row.
#include "fastlm/recurrent_cuda.h"
#include "gru_cell.cuh"
#include "launch.h"
#include "lstm_cell.cuh"

namespace fastlm {
namespace {

// A block for each row, with `floats` of dynamic shared memory for each unit.
template <typename Cell, typename Launch>
const char* each_row(const Cell& cell, int floats, Launch launch) {
  if (cell.batch == 0 || cell.hidden == 0) return nullptr;
  const std::size_t shared = std::size_t(cell.hidden) * floats * 4;
  if (shared > 0) {
    constexpr std::size_t kSums = 32;  // static, of the block's sums
    device::Limits limits;
    if (const char* error = device::limits(&limits)) return error;
    if (shared + kSums > std::size_t(limits.shared))
      return "the hidden size is too large for shared memory with layer normalisation of c";
  }
  return device::with_type(cell.storage, [&](auto type) {
    return launch(type, device::Shape{unsigned(cell.batch), device::kCellThreads, shared, false});
  });
}

}  // namespace

const char* lstm_cell_cuda(const LstmCellCuda& args, void* stream) {
  return each_row(args, args.ln_c ? 1 : 0, [&](auto type, const device::Shape& shape) {
    return device::launch(device::lstm_cell_kernel<decltype(type)>, shape, stream, args);
  });
}

const char* lstm_cell_backward_cuda(const LstmCellGradientsCuda& args, void* stream) {
  return each_row(args.cell, args.cell.ln_c ? 2 : 0, [&](auto type, const device::Shape& shape) {
    return device::launch(device::lstm_cell_backward_kernel<decltype(type)>, shape, stream, args);
  });
}

const char* gru_cell_cuda(const GruCellCuda& args, void* stream) {
  return each_row(args, 0, [&](auto type, const device::Shape& shape) {
    return device::launch(device::gru_cell_kernel<decltype(type)>, shape, stream, args);
  });
}

const char* gru_cell_backward_cuda(const GruCellGradientsCuda& args, void* stream) {
  return each_row(args.cell, 0, [&](auto type, const device::Shape& shape) {
    return device::launch(device::gru_cell_backward_kernel<decltype(type)>, shape, stream, args);
  });
}

}  // namespace fastlm
