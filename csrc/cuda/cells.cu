// Launchers of the recurrent cells' pointwise halves: a block for each row.
#include "fastlm/recurrent_cuda.h"
#include "gru_cell.cuh"
#include "launch.h"
#include "lstm_cell.cuh"

namespace fastlm {
namespace {

using device::Shape;

}  // namespace

const char* lstm_cell_cuda(const LstmCellCuda& args, void* stream) {
  if (args.batch == 0) return nullptr;
  const Shape shape{unsigned(args.batch), device::kCellThreads, args.ln_c ? std::size_t(args.hidden) * 4 : 0, false};
  return device::with_type(args.storage, [&](auto type) {
    return device::launch(device::lstm_cell_kernel<decltype(type)>, shape, stream, args);
  });
}

const char* lstm_cell_backward_cuda(const LstmCellGradientsCuda& args, void* stream) {
  if (args.cell.batch == 0) return nullptr;
  const bool norm = args.cell.ln_c != nullptr || args.cell.ln_ih != nullptr || args.cell.ln_hh != nullptr;
  const Shape shape{unsigned(args.cell.batch), device::kCellThreads, norm ? std::size_t(args.cell.hidden) * 24 : 0,
                    false};
  return device::with_type(args.cell.storage, [&](auto type) {
    return device::launch(device::lstm_cell_backward_kernel<decltype(type)>, shape, stream, args);
  });
}

const char* gru_cell_cuda(const GruCellCuda& args, void* stream) {
  if (args.batch == 0) return nullptr;
  const Shape shape{unsigned(args.batch), device::kCellThreads, 0, false};
  return device::with_type(args.storage, [&](auto type) {
    return device::launch(device::gru_cell_kernel<decltype(type)>, shape, stream, args);
  });
}

const char* gru_cell_backward_cuda(const GruCellGradientsCuda& args, void* stream) {
  if (args.cell.batch == 0) return nullptr;
  const bool norm = args.cell.ln_ih != nullptr || args.cell.ln_hh != nullptr;
  const Shape shape{unsigned(args.cell.batch), device::kCellThreads, norm ? std::size_t(args.cell.hidden) * 16 : 0,
                    false};
  return device::with_type(args.cell.storage, [&](auto type) {
    return device::launch(device::gru_cell_backward_kernel<decltype(type)>, shape, stream, args);
  });
}

}  // namespace fastlm
