// The rows of a block of decoding, queries of the heads of a group, and what becomes of their scores.
#pragma once
#include "cuda/decode_sequence.cuh"
#include "cuda/scores.cuh"

namespace attn_ext::cuda {

// Row r of a kv head is query r / group of head r % group of the group: neighbours see the same keys.
struct DecodeRow {
  int head, query;

  DEVICE DecodeRow(const AttentionShape& shape, int kv_head, int row) {
    const int group = static_cast<int>(shape.group());
    head = kv_head * group + row % group, query = row / group;
  }
};

// The two that a thread has of a block's.
class DecodeRows {
  const DeviceDecodeParams& p_;
  int first_[2], position_[2];  // keys first .. position are seen
  float slope_[2];

 public:
  int keys_begin, keys_end;  // what any row of the block sees
  int all_begin, all_end;    // what all of them see

  DEVICE DecodeRows(const DeviceDecodeParams& p, const Sequence& sequence, int batch, int kv_head, int row0, int count) : p_(p) {
    UNROLL for (int h = 0; h < 2; ++h) {
      const int row = h * 8 + lane_index() / 4;
      const DecodeRow at(p.shape, kv_head, row0 + min(row, count - 1));
      first_[h] = sequence.first_key(at.query);
      position_[h] = row < count ? sequence.position(at.query) : -1;
      slope_[h] = 0.f;
      if (p.score.alibi_slopes)
        slope_[h] = static_cast<float>(p.score.alibi_slopes[batch * p.score.alibi_stride_batch + at.head]) * static_cast<float>(kLog2E);
    }
    const int group = static_cast<int>(p.shape.group()), first = row0 / group, last = (row0 + count - 1) / group;
    keys_begin = sequence.first_key(first), keys_end = sequence.position(last) + 1;
    all_begin = sequence.first_key(last), all_end = sequence.position(first) + 1;
  }

  // Products of queries and keys become scores in units of log2.
  template <int NJ>
  DEVICE void apply(Accumulators<1, NJ>& s, int key0) const {
    const ScoreParams& score = p_.score;
    if (score.softcap > 0) {
      const float to_cap = static_cast<float>(score.scale / score.softcap), cap_log2 = static_cast<float>(score.softcap * kLog2E);
      for_elements<1, NJ>([&](int mi, int h, int j, int e) {
        s[mi][j][2 * h + e] = cap_log2 * fast_tanh(s[mi][j][2 * h + e] * to_cap);
      });
    } else {
      const float scale_log2 = static_cast<float>(score.scale * kLog2E);
      for_elements<1, NJ>([&](int mi, int h, int j, int e) { s[mi][j][2 * h + e] *= scale_log2; });
    }
    if (score.alibi_slopes) {
      for_elements<1, NJ>([&](int mi, int h, int j, int e) {
        const int key = key0 + 8 * j + lane_index() % 4 * 2 + e;
        s[mi][j][2 * h + e] -= slope_[h] * fabsf(static_cast<float>(position_[h] - key));
      });
    }
  }
  // Those of keys that a row does not see, or that are not there, are -inf.
  template <int NJ>
  DEVICE void hide(Accumulators<1, NJ>& s, int key0, uint32_t there) const {
    for_elements<1, NJ>([&](int mi, int h, int j, int e) {
      const int n = 8 * j + lane_index() % 4 * 2 + e, key = key0 + n;
      if (key < first_[h] || key > position_[h] || !(there >> n & 1)) s[mi][j][2 * h + e] = -INFINITY;
    });
  }
};

}  // namespace attn_ext::cuda
