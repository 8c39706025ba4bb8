// Which weights of a group of lanes and a tile of keys dropout keeps (core/dropout.h).
namespace attn_ext::cpu {
namespace {

// The generator for one vector of lanes.  Its words have 64-bit lanes: lanes s, s + kStreams, ... are one of its streams.
template <class Acc>
class DropoutLanes {
  static constexpr int W = kLanes<Acc>, kStreams = 8 / static_cast<int>(sizeof(Acc)), kWide = W / kStreams;
  using Word = Vec<uint64_t>;
  Word query_[kStreams], head_[kStreams];
  const uint32_t batch_;
  const uint64_t seed_;

 public:
  DropoutLanes(const DropoutParams& dropout, const LaneMask<Acc>& lanes, int v)
      : batch_(static_cast<uint32_t>(lanes.batch)), seed_(dropout.seed) {
    for (int s = 0; s < kStreams; s++) {
      alignas(Word) uint64_t query[kWide], head[kWide];
      for (int i = 0; i < kWide; i++) {
        const WorkRow row = lanes.lane_row[v * W + i * kStreams + s];
        query[i] = static_cast<uint64_t>(row.query);
        head[i] = static_cast<uint64_t>(row.head);
      }
      query_[s] = load(query);
      head_[s] = load(head);
    }
  }
  // The four words of a call, lane by lane.
  INLINE void generate(IntVec<Acc> (&words)[4], uint32_t call) const {
    Word streams[kStreams][4];
    UNROLL for (int s = 0; s < kStreams; s++) {
      auto& c = streams[s];
      c[0] = VectorPhilox::splat(call);
      c[1] = query_[s];
      c[2] = head_[s];
      c[3] = VectorPhilox::splat(batch_);
      Philox<VectorPhilox>::generate(c, seed_);
    }
    UNROLL for (int w = 0; w < 4; w++) {
      Word word = streams[0][w] & 0xffffffff;
      if constexpr (kStreams == 2) word |= streams[1][w] << 32;
      words[w] = (IntVec<Acc>)word;
    }
  }
};

// Calls f(n, v, low, high) for pairs of keys n, n + 1 of the tile and every vector of lanes in use: all bits set where
// key n (low), and where key n + 1 (high), keeps its weight.  `tile`, `begin` and `end` are even.
template <class Acc, class F>
INLINE void for_kept_pairs(const DropoutParams& dropout, const LaneMask<Acc>& lanes, int64_t tile, int begin, int end, const F& f) {
  using Index = DropoutIndex;
  const IntVec<Acc> threshold = splat_int<Acc>(dropout.threshold);
  for (int v = 0; v * kLanes<Acc> < lanes.rows; v++) {
    const DropoutLanes<Acc> generator(dropout, lanes, v);
    for (int64_t block = (tile + begin) / Index::kBlock; block * Index::kBlock < tile + end; block++) {
      for (int t = 0; t < Index::kCalls; t++) {
        IntVec<Acc> words[Index::kWords];
        generator.generate(words, static_cast<uint32_t>(block * Index::kCalls + t));
        const int first = static_cast<int>(block * Index::kBlock - tile) + 2 * t;
        UNROLL for (int w = 0; w < Index::kWords; w++) {
          const int n = first + 8 * w;
          if (n >= begin && n < end) f(n, v, (words[w] & 0xffff) < threshold, (words[w] >> 16 & 0xffff) < threshold);
        }
      }
    }
  }
}

}  // namespace
}  // namespace attn_ext::cpu
