#include <memory>
#include <utility>
#include <vector>

#include "bindings.h"

namespace fastlm {

void* scratch(std::size_t bytes) {
  constexpr std::size_t kAlignment = 64;
  if (Program* const program = recording()) return program->scratch(bytes, true);
  thread_local std::unique_ptr<char[]> memory;
  thread_local std::size_t size = 0;
  if (size < bytes + kAlignment) {
    memory.reset();
    size = 0;
    memory.reset(new char[bytes + kAlignment]);
    size = bytes + kAlignment;
  }
  const auto at = reinterpret_cast<address>(memory.get());
  return memory.get() + (kAlignment - at % kAlignment) % kAlignment;
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
