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
  DEVICE int first_key(int query) const {
    const int at = position(query);
    return at > p_.window_left ? at - static_cast<int>(p_.window_left) : 0;
  }

  // The page of a token, -1 if the table names none that there is.
  DEVICE int64_t page(int token) const {
    if (!p_.table.data) return batch_;
    const int64_t page = p_.table.at(batch_, token / static_cast<int>(p_.page_size));
    return 0 <= page && page < p_.page_count ? page : -1;
  }
  DEVICE int row(int token) const { return token % static_cast<int>(p_.page_size); }

  // Its ranges of keys.
  DEVICE int first_of_all() const { return first_key(0); }
  DEVICE int keys_of_range() const {
    return static_cast<int>(cuda::keys_of_range(max_i64(1, total() - first_of_all()), p_.splits));
  }
  DEVICE int ranges() const {
    const int keys = total() - first_of_all(), each = keys_of_range();
    return keys > 0 ? (keys + each - 1) / each : 0;
  }
};

}  // namespace attn_ext::cuda
