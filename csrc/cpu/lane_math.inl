// The arithmetic of core/online_softmax.h, a row in each lane.
namespace attn_ext::cpu {
namespace {

template <class Acc, int Degree>
struct LaneMath {
  using Value = Vec<Acc>;
  static INLINE Value splat(Acc x) { return cpu::splat(x); }
  static INLINE Value max(Value a, Value b) { return cpu::max(a, b); }
  // Exactly 1 where a maximum stays, and precise where it rises: over many tiles of keys the sums must not drift.
  static INLINE Value exp2(Value x) { return x == 0 ? splat(1) : cpu::exp2<5>(x); }
  static INLINE Value weight(Value x) { return cpu::exp2<Degree, kHeadroom>(x); }
};

}  // namespace
}  // namespace attn_ext::cpu
