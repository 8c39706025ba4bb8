// The rows of a block of decoding, queries of the heads of a group, and what becomes of their scores.
#pragma once
#include "cuda/decode_sequence.cuh"
#include "cuda/scores.cuh"

namespace attn_ext::cuda {

// Row r of a kv head is query r / group of head r % group of the group: neighbours see the same keys.
DEVICE int group_of(const AttentionShape& shape) { return static_cast<int>(shape.heads) / static_cast<int>(shape.kv_heads); }

struct DecodeRow {
  int head, query;

  DEVICE DecodeRow(const AttentionShape& shape, int kv_head, int row) {
    const int group = group_of(shape);
    head = kv_head * group + row % group, query = row / group;
  }
};

// The two that a thread has of a block's.
class DecodeRows {
  const DeviceDecodeParams& p_;
  const Sequence& sequence_;
  int position_[2];  // keys up to it are seen, as far as a window goes
  int batch_, kv_head_, row0_, count_;
  int first_query_, last_query_;  // of the block

  DEVICE DecodeRow own(int h) const {
    return DecodeRow(p_.shape, kv_head_, row0_ + min(h * 8 + lane_index() / 4, count_ - 1));
  }

 public:
  DEVICE DecodeRows(const DeviceDecodeParams& p, const Sequence& sequence, int batch, int kv_head, int row0, int count)
      : p_(p), sequence_(sequence), batch_(batch), kv_head_(kv_head), row0_(row0), count_(count) {
    UNROLL for (int h = 0; h < 2; ++h) {
      const int row = h * 8 + lane_index() / 4;
      position_[h] = row < count ? sequence.position(own(h).query) : -1;
    }
    first_query_ = row0 / group_of(p.shape), last_query_ = (row0 + count - 1) / group_of(p.shape);
  }

  // What any row of the block sees.
  DEVICE int keys_begin() const { return sequence_.first_key(first_query_); }
  DEVICE int keys_end() const { return sequence_.position(last_query_) + 1; }
  // Whether all of them see keys begin .. end - 1.
  DEVICE bool all_see(int begin, int end) const {
    return sequence_.first_key(last_query_) <= begin && end <= sequence_.position(first_query_) + 1;
  }

  // Products of queries and keys become scores in units of log2.
  template <int NJ>
  DEVICE void apply(Accumulators<1, NJ>& s, int key0) const {
    for_elements<1, NJ>([&](int mi, int h, int j, int e) { s[mi][j][2 * h + e] *= p_.score_factor; });
    if (p_.score_cap > 0.f) {
      for_elements<1, NJ>([&](int mi, int h, int j, int e) {
        s[mi][j][2 * h + e] = p_.score_cap * fast_tanh(s[mi][j][2 * h + e]);
      });
    }
    if (p_.score.alibi_slopes) {
      const double* const slopes = p_.score.alibi_slopes + batch_ * p_.score.alibi_stride_batch;
      const float slope[2] = {static_cast<float>(slopes[own(0).head]) * static_cast<float>(kLog2E),
                              static_cast<float>(slopes[own(1).head]) * static_cast<float>(kLog2E)};
      for_elements<1, NJ>([&](int mi, int h, int j, int e) {
        const int key = key0 + 8 * j + lane_index() % 4 * 2 + e;
        s[mi][j][2 * h + e] -= slope[h] * fabsf(static_cast<float>(position_[h] - key));
      });
    }
  }
  // Those of keys that a row does not see, or that are not there, are -inf.
  template <int NJ>
  DEVICE void hide(Accumulators<1, NJ>& s, int key0, uint32_t there) const {
    const int first[2] = {sequence_.first_key_from(position_[0]), sequence_.first_key_from(position_[1])};
    for_elements<1, NJ>([&](int mi, int h, int j, int e) {
      const int n = 8 * j + lane_index() % 4 * 2 + e, key = key0 + n;
      if (key < first[h] || key > position_[h] || !(there >> n & 1)) s[mi][j][2 * h + e] = -INFINITY;
    });
  }
};

}  // namespace attn_ext::cuda
