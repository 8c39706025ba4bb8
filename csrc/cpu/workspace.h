// Scratch memory: one block per call, cut into pieces.  A small block is kept for the next call of the same thread,
// so that short calls never allocate.
#pragma once
#include <cstddef>
#include <cstdint>

namespace attn_ext::cpu {

// Memory of at least `bytes`, aligned to a cache line, for the life of this object.  Throws std::bad_alloc.
class Workspace {
 public:
  explicit Workspace(size_t bytes);
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  char* data() const { return data_; }

 private:
  char* data_;
  bool cached_;
};

constexpr size_t kCacheLine = 64;

inline size_t round_up_to_line(size_t bytes) { return (bytes + kCacheLine - 1) / kCacheLine * kCacheLine; }

// Cuts pieces off a block.  Started at null it only measures: used() is then what a real run will need.
class Pieces {
  static constexpr size_t kMostBytes = ~size_t{0} / 4 / kCacheLine * kCacheLine;  // which no allocation will grant

 public:
  explicit Pieces(char* base) : base_(base) {}
  template <class T>
  T* take(size_t count) {
    char* piece = base_ ? base_ + used_ : nullptr;
    size_t bytes;
    if (__builtin_mul_overflow(count, sizeof(T), &bytes) || bytes > kMostBytes - used_) bytes = kMostBytes - used_;
    used_ += round_up_to_line(bytes);
    return reinterpret_cast<T*>(piece);
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

}  // namespace attn_ext::cpu
