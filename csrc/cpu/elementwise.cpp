#include "fastlm/elementwise.h"

#include <cstring>

#include "bfloat.h"
#include "light_work.h"

namespace fastlm {
namespace FASTLM_ISA {

void add(const Add& a) {
  parallel(light_threads(a.count, a.threads), [&](int thread, int threads, Barrier&) {
    const Range mine = share(a.count, thread, threads, kLanes);
    int64_t i = mine.begin;
    for (; i + kLanes <= mine.end; i += kLanes) store(a.output + i, load(a.a + i) + load(a.b + i));
    for (; i < mine.end; ++i) a.output[i] = a.a[i] + a.b[i];
  });
}

void convert(const Convert& a) {
  parallel(light_threads(a.count, a.threads), [&](int thread, int threads, Barrier&) {
    const Range mine = share(a.count, thread, threads, kLanes);
    for (int64_t i = mine.begin; i < mine.end; i += kLanes)
      if (a.to_bfloats)
        At<true>::store(a.output, i, mine.end, At<false>::load(a.input, i, mine.end));
      else
        At<false>::store(a.output, i, mine.end, At<true>::load(a.input, i, mine.end));
  });
}

void copy_rows(const CopyRows& a) {
  parallel(1, [&](int, int, Barrier&) {
    for (int64_t i = 0; i < a.rows; ++i) {
      const int64_t from = a.source_index ? a.source_index[i] : i, to = a.target_index ? a.target_index[i] : i;
      std::memcpy(static_cast<char*>(a.target) + to * a.row_bytes,
                  static_cast<const char*>(a.source) + from * a.row_bytes, a.row_bytes);
    }
  });
}

void offset(const Offset& a) {
  parallel(1, [&](int, int, Barrier&) {
    for (int64_t i = 0; i < a.count; ++i)
      a.target[a.target_index ? a.target_index[i] : i] = a.source[a.source_index ? a.source_index[i] : i] + a.amount;
  });
}

}  // namespace FASTLM_ISA
}  // namespace fastlm
