#include "cpu/workspace.h"

#include <cstdlib>
#include <new>
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace attn_ext::cpu {
namespace {

constexpr size_t kKeptBytes = size_t{16} << 20;

// Touching fresh memory a page of 4 KiB at a time costs as much as the work of a sparse problem: where the system lets
// programs ask for huge pages, large blocks do.
char* allocate(size_t bytes) {
  constexpr size_t kHugePage = size_t{2} << 20;
  const bool huge = bytes >= 2 * kHugePage;
  const size_t alignment = huge ? kHugePage : kCacheLine;
  void* p = std::aligned_alloc(alignment, (bytes ? bytes + alignment - 1 : alignment) / alignment * alignment);
  if (!p) throw std::bad_alloc();
#ifdef __linux__
  if (huge) madvise(p, bytes / kHugePage * kHugePage, MADV_HUGEPAGE);
#endif
  return static_cast<char*>(p);
}

struct Kept {
  char* data = nullptr;
  size_t bytes = 0;
  bool in_use = false;
  ~Kept() { std::free(data); }
};
thread_local Kept kept;

}  // namespace

Workspace::Workspace(size_t bytes) : cached_(bytes <= kKeptBytes && !kept.in_use) {
  if (!cached_) {
    data_ = allocate(bytes);
    return;
  }
  if (kept.bytes < bytes) {
    std::free(kept.data);
    kept.data = nullptr;
    kept.bytes = 0;
    kept.data = allocate(bytes);
    kept.bytes = bytes;
  }
  kept.in_use = true;
  data_ = kept.data;
}

Workspace::~Workspace() {
  if (cached_) {
    kept.in_use = false;
  } else {
    std::free(data_);
  }
}

}  // namespace attn_ext::cpu
