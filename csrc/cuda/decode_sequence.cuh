// A sequence and its cache, as kernels find them: whatever the tensors of lengths and pages hold, nothing is read or written
// outside the cache.
#pragma once
#include "cuda/decode_plan.h"
#include "cuda/ptx.cuh"

namespace attn_ext::cuda {

class Sequence {
  const DeviceDecodeParams& p_;
  int batch_, length_;

 public:
  DEVICE Sequence(const DeviceDecodeParams& p, int batch)
      : p_(p), batch_(batch), length_(static_cast<int>(max_i64(0, min_i64(p.given_lengths.at(batch), p.room)))) {}

  // Tokens before the append, and after.
  DEVICE int length() const { return length_; }
  DEVICE int total() const { return length_ + static_cast<int>(p_.shape.kv_len); }
  // Of a query; negative if it comes before the first token.
  DEVICE int position(int query) const { return total() - static_cast<int>(p_.shape.query_len) + query; }
  DEVICE int first_key(int query) const { return first_key_from(position(query)); }
  DEVICE int first_key_from(int position) const {
    return position > p_.window_left ? position - static_cast<int>(p_.window_left) : 0;
  }

  // The page of a token, -1 if the table names none that there is.
  DEVICE int page(int token) const {
    if (!p_.table.data) return batch_;
    const int64_t page = p_.table.at(batch_, static_cast<unsigned>(token) / static_cast<unsigned>(p_.page_size));
    return 0 <= page && page < min_i64(p_.page_count, std::numeric_limits<int>::max()) ? static_cast<int>(page) : -1;
  }
  DEVICE int row(int token) const { return static_cast<int>(static_cast<unsigned>(token) % static_cast<unsigned>(p_.page_size)); }

  // Its ranges of keys.
  DEVICE int first_of_all() const { return first_key(0); }
  DEVICE int keys_of_range() const {
    return cuda::keys_of_range(max(1, total() - first_of_all()), static_cast<int>(p_.splits));
  }
  DEVICE int ranges() const {
    const int keys = total() - first_of_all(), each = keys_of_range();
    return keys > 0 ? (keys + each - 1) / each : 0;
  }
};

}  // namespace attn_ext::cuda
