#include "cpu/workspace.h"

#include <cstdlib>
#include <new>

namespace attn_ext::cpu {
namespace {

constexpr size_t kKeptBytes = size_t{16} << 20;

char* allocate(size_t bytes) {
  void* p = std::aligned_alloc(kCacheLine, round_up_to_line(bytes ? bytes : 1));
  if (!p) throw std::bad_alloc();
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
