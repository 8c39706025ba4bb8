// Flash attention, backward: the gradients of keys and values (Dao 2023, "FlashAttention-2", algorithm 2).
//
// A block owns N keys of one key head and walks over the tiles of M queries, of all heads that read these keys, that see any
// of them.  Rows of accumulators are keys: P^T and dS^T leave the products that make them as the left operands of the next
// two, so that nothing but the tiles goes through shared memory, and nothing is added to memory that another block adds to.
//   S^T = K Q^T,  P^T = 2^(S^T - normalizer),  dV += P^T dO,  dP^T = V dO^T,  dS^T = P^T (dP^T - D),  dK += dS^T Q
#pragma once
#include "cuda/math.cuh"
#include "cuda/score_gradient.cuh"
#include "cuda/tile_bits.cuh"
#include "cuda/tile_walk.cuh"
#include "cuda/value_guard.cuh"

namespace attn_ext::cuda {

// Modified: as in ForwardTraits.
template <class T_, int KeyColumns, int ValueColumns, int M_, int N_, int Warps, int Stages, KeyOutputs Outputs, bool Modified>
struct KeyGradientTraits {
  using T = T_;
  using Math = TileMath<T>;
  static constexpr int M = M_, N = N_, kThreads = Warps * 32, kStages = Stages;
  static constexpr int MI = N / (16 * Warps), NJ = M / 8;  // of a warp's accumulators of scores
  static constexpr bool kOfKey = Outputs != KeyOutputs::value, kOfValue = Outputs != KeyOutputs::key, kModified = Modified;
  static constexpr bool kAlwaysPrecise = Modified || std::is_same_v<T, float>;
  static_assert(MI == 1 && (Outputs == KeyOutputs::both || KeyColumns == ValueColumns));
  using Query = Tile<T, M, KeyColumns>;
  using GradOut = Tile<T, M, ValueColumns>;
  using Key = Tile<T, N, KeyColumns>;
  using Value = Tile<T, N, ValueColumns>;
  using Bits = TileBits<M, N, kThreads>;
  using Walk = TileWalk<T, M, true, kAlwaysPrecise>;
  // Where tiles lie in shared memory; gradients take the place of keys and values.
  static constexpr uint32_t kKeyTile = 0, kValueTile = kOfKey ? Key::kBytes : 0, kFirstStage = kValueTile + Value::kBytes;
  // From the start of a stage.
  static constexpr uint32_t kQueryTile = 0, kGradOutTile = Query::kBytes, kStageBytes = Query::kBytes + GradOut::kBytes;
  // RowTerms of the queries of each stage.
  static constexpr uint32_t kRows = kFirstStage + Stages * kStageBytes, kRowsBytes = M * RowTerms::kFloats * sizeof(float);
  static constexpr uint32_t kBits = kRows + Stages * kRowsBytes, kWalk = kBits + Bits::kBytes;
  static constexpr uint32_t kSharedBytes = kWalk + sizeof(Walk);
};

template <class F>
__global__ void __launch_bounds__(F::kThreads, 1) flash_key_gradient(const __grid_constant__ BackwardArguments a) {
  using T = typename F::T;
  using Math = typename F::Math;
  using Place = KeyRows<F::MI, F::NJ>;
  constexpr int M = F::M, N = F::N, MI = F::MI, kThreads = F::kThreads;
  constexpr int kKeyColumns = F::Key::kColumns, kValueColumns = F::Value::kColumns;
  DYN_SMEM(shared);
  const uint32_t shared0 = shared_address(shared);
  const BackwardParams& p = a.params;
  const AttentionShape& shape = p.shape;

  // Under a causal mask the first keys are seen most: they start first.
  const BlockTile own = BlockTile::of_block(shape.kv_len, N, shape.kv_heads);
  const int group = static_cast<int>(shape.heads / shape.kv_heads), head0 = own.head * group;
  const int row0 = threadIdx.x / 32 * 16 * MI;

  const TileCopy<typename F::Query, kThreads> query_copy(shape.head_dim);
  const TileCopy<typename F::GradOut, kThreads> grad_copy(query_copy, shape.value_dim);
  UNROLL for (int stage = 0; stage < F::kStages; ++stage) {
    unsigned char* const at = shared + F::kFirstStage + stage * F::kStageBytes;
    query_copy.clear_columns(at + F::kQueryTile);
    grad_copy.clear_columns(at + F::kGradOutTile);
  }

  const MetCopy met_queries(query_copy, p.query);
  const MetCopy met_grads(grad_copy, p.grad_out);
  auto& walk = *reinterpret_cast<typename F::Walk*>(shared + F::kWalk);
  const auto fetch = [&](uint32_t turn, uint32_t stage) {
    const MetTile& from = walk.at(turn);
    if (from.exists()) {
      const uint32_t to = shared0 + F::kFirstStage + stage * F::kStageBytes;
      const int left = static_cast<int>(shape.query_len) - from.tile() * M;
      copy_met(from, left, met_queries, to + F::kQueryTile, met_grads, to + F::kGradOutTile);
      if (threadIdx.x < F::kRowsBytes / 16) {
        cp_async16(shared0 + F::kRows + stage * F::kRowsBytes + threadIdx.x * 16, from.terms + threadIdx.x * 4);
      }
    }
    cp_async_commit();
  };
  walk.start(a, own, 0, head0, group, shape.head_dim == kKeyColumns && shape.value_dim == kValueColumns);
  walk.find(0, a);
  walk.find(1, a);
  const TileCopy<typename F::Key, kThreads> key_copy(shape.head_dim);
  const TileCopy<typename F::Value, kThreads> value_copy(key_copy, shape.value_dim);
  key_copy.clear_columns(shared + F::kKeyTile);
  key_copy.clipped(shared0 + F::kKeyTile, key_copy.rows(head_of<T>(p.key, own.batch, own.head), p.key.stride_row, shape.kv_len),
                   own.tile);
  if constexpr (F::kOfKey) {
    value_copy.clear_columns(shared + F::kValueTile);
    const Rows values = value_copy.rows(head_of<T>(p.value, own.batch, own.head), p.value.stride_row, shape.kv_len);
    value_copy.clipped(shared0 + F::kValueTile, values, own.tile);
  }
  __syncthreads();  // the first tiles are known
  fetch(0, 0);

  const typename Math::template Tiles<kKeyColumns> key_tile(shared, row0);
  const typename Math::template Tiles<kValueColumns> value_tile(key_tile, shared, row0);
  const typename Math::template Rows<kKeyColumns, MI> own_keys(key_tile, F::kKeyTile);
  const typename Math::template Rows<kValueColumns, MI> own_values(value_tile, F::kValueTile);
  const typename F::Bits bits(shared + F::kBits);
  Accumulators<MI, F::kOfKey ? kKeyColumns / 8 : 1> dk;
  Accumulators<MI, F::kOfValue ? kValueColumns / 8 : 1> dv;
  clear(dk);
  clear(dv);
  uint32_t turn = 0;

  const auto visit = [&](auto partial) {
    constexpr bool kIsPartial = decltype(partial)::value;
    cp_async_wait<0>();
    __syncthreads();  // these queries are there; those of the other stage are read
    const uint32_t stage = F::kStages == 1 ? 0 : turn % 2;
    if constexpr (F::kStages == 2) fetch(turn + 1, 1 - stage);
    walk.find(turn + 2, a);
    const bool precise = F::kAlwaysPrecise || (kIsPartial && walk.at(turn).is_precise());
    const int query0 = walk.at(turn).tile() * M;
    // Addresses move to the stage once, or, if there are no registers for that, at every use.
    const uint32_t stage_at = stage * F::kStageBytes, moved_by = F::kModified ? 0 : stage_at;
    const auto moved = [&](const auto& tiles) {
      if constexpr (F::kModified) return tiles;
      else return tiles.moved(moved_by);
    };
    const auto queries = moved(key_tile);
    const auto grads = moved(value_tile);
    const uint32_t query_at = F::kFirstStage + F::kQueryTile + (stage_at - moved_by), grad_at = query_at + F::kGradOutTile;
    const auto* const rows =
        reinterpret_cast<const float*>(shared + F::kRows + stage * F::kRowsBytes) + RowTerms::normalizer(Place::first_query());
    const ValueGuard<typename F::Query, Math, decltype(query_copy), MI> query_guard(query_copy, shared + F::kFirstStage + F::kQueryTile + stage_at);
    ValueGuard<typename F::GradOut, Math, decltype(grad_copy), MI> grad_guard(grad_copy, shared + F::kFirstStage + F::kGradOutTile + stage_at);
    bool finite = true;
    if (kIsPartial || (F::kModified && p.dropout.enabled())) {
      const BlockTile at = walk.own();
      bits.template write<kIsPartial, F::kModified>(p, at.batch, walk.at(turn).head, anew(query0), at.tile * N);
      if constexpr (kIsPartial) finite = !__syncthreads_or(!query_guard.finite() || !grad_guard.finite());
      else __syncthreads();
    }

    ModifiedScores<Place, T> modified(a);
    if constexpr (F::kModified) {
      modified.set_kept([&](int q) { return bits.kept(Place::first_query() + Place::query_offset(q), row0); });
    }
    Accumulators<MI, F::NJ> s;
    clear(s);
    Math::product_abt(s, own_keys, queries, query_at);
    if constexpr (F::kModified) {
      const BlockTile at = walk.own();
      const ScoreTerms<Place> terms(p, a.factors, at.batch, walk.at(turn).head, query0);
      modified.template apply<kIsPartial>(s, terms, at.tile * N + row0);
    } else if (precise) {
      for_pairs<Place>([&](int q, int k) { Place::at(s, q, k) *= a.factors.scale_log2; });
    }
    if constexpr (kIsPartial) {
      hide<Place>(s, [&](int q) { return bits.visible(Place::first_query() + Place::query_offset(q), row0); });
    }
    if (precise) {
      precise_weights<Place, kIsPartial>(s, RowNormalizers(p, walk.own().batch, walk.at(turn).head), query0);
    } else {
      weights<Place, kIsPartial>(s, a.factors.scale_log2,
                                 [&](int q) { return rows[RowTerms::normalizer(q / 2 * 8) + q % 2]; });
    }

    Accumulators<MI, F::NJ> dp;  // less D_i, unless it is modified
    // -D_i, from where the normalizers of the same two queries are
    const float* const deltas = rows + (RowTerms::minus_delta(Place::first_query()) - RowTerms::normalizer(Place::first_query()));
    const auto multiply_dp = [&] {
      if constexpr (F::kModified) {
        clear(dp);
      } else {
        UNROLL for (int j = 0; j < F::NJ; ++j) {
          const float4 quad = *reinterpret_cast<const float4*>(deltas + RowTerms::normalizer(8 * j));
          UNROLL for (int mi = 0; mi < MI; ++mi)
            dp[mi][j][0] = quad.x, dp[mi][j][1] = quad.y, dp[mi][j][2] = quad.z, dp[mi][j][3] = quad.w;
        }
      }
      Math::product_abt(dp, own_values, grads, grad_at);
    };
    const auto clean = [&] {
      if (finite) return;
      __syncthreads();
      query_guard.clean();
      grad_guard.clean();
      __syncthreads();
    };
    Accumulators<MI, F::NJ> left;  // of the weights: what values are summed with
    for_pairs<Place>([&](int q, int k) { Place::at(left, q, k) = Place::at(s, q, k); });
    if constexpr (F::kModified) {
      modified.drop(left);
      modified.through_softcap(s);
    }
    // Tiles that may have to be cleaned are multiplied before: what is not finite has made dS of the keys that are seen 0 or
    // NaN, but is to be felt by dV.
    if constexpr (F::kOfKey && kIsPartial) multiply_dp();
    if constexpr (F::kOfValue) {
      if (!finite) {
        grad_guard.see(left, 0.f);
        grad_guard.add(dv);
      }
      clean();
      Math::product_pb(dv, left, grads, grad_at);
    } else {
      clean();
    }
    if constexpr (F::kOfKey) {
      if constexpr (!kIsPartial) multiply_dp();
      if constexpr (F::kModified) {
        modified.template gradient<kIsPartial>(dp, s, [&](int q) { return deltas[RowTerms::normalizer(q / 2 * 8) + q % 2]; });
      } else {
        score_gradient<kIsPartial>(dp, s);
      }
      Math::product_pb(dk, dp, queries, query_at);
    }
    if constexpr (F::kStages == 1) {
      __syncthreads();  // these queries are read
      fetch(turn + 1, 0);
    }
  };
  walk.for_each(turn, visit);
  cp_async_wait<0>();
  __syncthreads();

  const BlockTile of = walk.own();
  const auto store = [&](auto& gradient, float by, unsigned char* staging, const TensorView& to, auto staged, int64_t columns) {
    constexpr int kBlocks = sizeof(gradient[0]) / sizeof(gradient[0][0]);
    for_elements<MI, kBlocks>([&](int mi, int h, int j, int e) { gradient[mi][j][2 * h + e] *= by; });
    store_rows<Math, decltype(staged)>(gradient, staging, row0,
                                       head_of<T>(to, of.batch, of.head) + of.tile * N * to.stride_row, to.stride_row,
                                       static_cast<int>(shape.kv_len) - of.tile * N, static_cast<int>(columns));
  };
  if constexpr (F::kOfKey) {
    store(dk, a.scale, shared + F::kKeyTile, p.grad_key, typename F::Key(), shape.head_dim);
  }
  if constexpr (F::kOfValue) {
    store(dv, a.inverse_keep, shared + F::kValueTile, p.grad_value, typename F::Value(), shape.value_dim);
  }
}

}  // namespace attn_ext::cuda
