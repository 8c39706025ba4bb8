// Dropout of attention weights: a counter-based random number generator, so that forward, backward, every thread count
// and every device drop the same weights, and no mask is ever stored.
//
// Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), its key the seed, its counter
// (column call, query, head, batch).  One call decides over 8 keys with 16 bits each: the columns 2t, 2t + 1 of four
// neighbouring runs of 8, which is what one thread of a tensor-core fragment holds of a row.
#pragma once
#include <cstdint>

#include "core/host_device.h"
#include "core/params.h"

namespace attn_ext {

// Math names Word, at least 32 bits wide with 32 that count, and supplies splat(uint32_t), product(Word, uint32_t) of 64
// bits, high(product) and low(product).
template <class Math>
struct Philox {
  using Word = typename Math::Word;

  ATTN_HD static void generate(Word (&c)[4], uint64_t key) {
    uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
    for (int round = 0; round < 10; round++) {
      const auto a = Math::product(c[0], 0xD2511F53), b = Math::product(c[2], 0xCD9E8D57);
      c[0] = Math::high(b) ^ c[1] ^ Math::splat(k0);
      c[2] = Math::high(a) ^ c[3] ^ Math::splat(k1);
      c[1] = Math::low(b);
      c[3] = Math::low(a);
      k0 += 0x9E3779B9;
      k1 += 0xBB67AE85;
    }
  }
};

struct ScalarPhilox {
  using Word = uint32_t;
  ATTN_HD static uint32_t splat(uint32_t x) { return x; }
  ATTN_HD static uint64_t product(uint32_t a, uint32_t b) { return static_cast<uint64_t>(a) * b; }
  ATTN_HD static uint32_t high(uint64_t p) { return static_cast<uint32_t>(p >> 32); }
  ATTN_HD static uint32_t low(uint64_t p) { return static_cast<uint32_t>(p); }
};

// Where the decision about a key lies: half `half` of word `word` of call `call`.
struct DropoutIndex {
  static constexpr int kBlock = 32, kCalls = 4, kWords = 4;  // keys that `kCalls` calls of `kWords` words cover
  uint32_t call;
  int word, half;

  ATTN_HD static DropoutIndex of(int64_t key) {
    const int column = static_cast<int>(key % kBlock);
    return {static_cast<uint32_t>(key / kBlock * kCalls + column % 8 / 2), column / 8, column % 2};
  }
};

ATTN_HD bool keeps_weight(const DropoutParams& dropout, int64_t batch, int64_t head, int64_t query, int64_t key) {
  const DropoutIndex index = DropoutIndex::of(key);
  uint32_t words[4] = {index.call, static_cast<uint32_t>(query), static_cast<uint32_t>(head), static_cast<uint32_t>(batch)};
  Philox<ScalarPhilox>::generate(words, dropout.key());
  return static_cast<int32_t>(words[index.word] >> 16 * index.half & 0xffff) < dropout.threshold;
}

}  // namespace attn_ext
