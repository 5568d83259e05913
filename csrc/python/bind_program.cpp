#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdlib>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#include "bindings.h"

namespace fastlm {

namespace {

struct Free {
  void operator()(char* memory) const { std::free(memory); }
};
using Memory = std::unique_ptr<char[], Free>;

// Aligned to 64, `size` a multiple of it. A kernel that fills megabytes of ordinary pages looks most of them up.
Memory aligned(std::size_t size) {
  constexpr std::size_t kHuge = std::size_t{1} << 21;
  const std::size_t alignment = size < kHuge ? 64 : kHuge;
  size += (alignment - size % alignment) % alignment;
  Memory memory(static_cast<char*>(std::aligned_alloc(alignment, size)));
  if (memory == nullptr) throw std::bad_alloc();
#if defined(__linux__)
  if (size >= kHuge) madvise(memory.get(), size, MADV_HUGEPAGE);  // a refusal changes nothing
#endif
  return memory;
}

}  // namespace

void* scratch(std::size_t bytes) {
  if (Program* const program = recording()) return program->scratch(bytes, true);
  thread_local Memory memory;
  thread_local std::size_t size = 0;
  if (size < bytes) {
    memory.reset();
    size = 0;
    memory = aligned(bytes + (64 - bytes % 64) % 64);
    size = bytes;
  }
  return memory.get();
}

void bind_program(py::module_& m) {
  py::register_exception<NotRecordable>(m, "NotRecordable");
  m.def("recording", [] { return recording() != nullptr; });
  py::class_<Program>(m, "Program")
      .def(py::init<int>(), py::arg("threads"))
      .def("__len__", &Program::size)
      .def("start",
           [](Program& program) {
             if (recording() != nullptr) throw std::runtime_error("a program is being recorded already");
             recording() = &program;
           })
      .def("stop",
           [](Program& program) {
             if (recording() == &program) recording() = nullptr;
           })
      .def(
          "run",
          [](Program& program, int64_t times, address watched, int64_t count, const std::vector<int64_t>& stops,
             address log, int threads) {
            if (recording() != nullptr) throw std::runtime_error("a program is being recorded");
            if (times < 0 || count < 0 || threads < 1) throw py::value_error("times, count or threads out of range");
            py::gil_scoped_release release;
            const Program::Result result = program.run(
                times,
                {pointer<const int64_t>(watched), count, stops.data(), static_cast<int64_t>(stops.size()),
                 pointer<int64_t>(log)},
                threads);
            return std::pair(result.replays, result.refused);
          },
          py::arg("times"), py::arg("watched"), py::arg("count"), py::arg("stops"), py::arg("log"),
          py::arg("threads"),
          "Returns how many replays completed, and whether a kernel refused the one after them.");
}

}  // namespace fastlm
