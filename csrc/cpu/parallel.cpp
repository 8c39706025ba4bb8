#include "cpu/parallel.h"

#include <algorithm>
#include <numeric>

namespace attn_ext::cpu {

void longest_first(const int64_t* costs, int64_t* tasks, int64_t count) {
  std::iota(tasks, tasks + count, int64_t{0});
  std::sort(tasks, tasks + count, [&](int64_t a, int64_t b) { return costs[a] != costs[b] ? costs[a] > costs[b] : a < b; });
}

}  // namespace attn_ext::cpu
