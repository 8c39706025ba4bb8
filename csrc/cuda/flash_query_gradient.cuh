// Flash attention, backward: the gradient of queries (Dao 2023, "FlashAttention-2", algorithm 2, in a pass of its own).
//
// A block owns M queries of one head and walks over the tiles of N keys and values that they see, as the forward pass does.
// S and dP are computed again: that costs less than adding to dQ from every block of keys would, and sums always in the same
// order.
//   S = Q K^T,  P = 2^(S - normalizer),  dP = dO V^T,  dS = P (dP - D),  dQ += dS K
#pragma once
#include "cuda/math.cuh"
#include "cuda/score_gradient.cuh"
#include "cuda/tile_walk.cuh"
#include "cuda/value_guard.cuh"
#include "cuda/visible_keys.cuh"

namespace attn_ext::cuda {

// Modified: as in ForwardTraits.
template <class T_, int KeyColumns, int ValueColumns, int M_, int N_, int Warps, int Stages, bool Modified>
struct QueryGradientTraits {
  using T = T_;
  using Math = TileMath<T>;
  static constexpr int M = M_, N = N_, kThreads = Warps * 32, kStages = Stages;
  static constexpr int MI = M / (16 * Warps), NJ = N / 8;  // of a warp's accumulators of scores
  static constexpr bool kModified = Modified, kAlwaysPrecise = Modified || std::is_same_v<T, float>;
  using Query = Tile<T, M, KeyColumns>;
  using GradOut = Tile<T, M, ValueColumns>;
  using Key = Tile<T, N, KeyColumns>;
  using Value = Tile<T, N, ValueColumns>;
  using Walk = TileWalk<T, N, false, kAlwaysPrecise>;
  // Where tiles lie in shared memory; the gradient takes the place of the queries.
  static constexpr uint32_t kQueryTile = 0, kGradOutTile = Query::kBytes, kFirstStage = kGradOutTile + GradOut::kBytes;
  // From the start of a stage.
  static constexpr uint32_t kKeyTile = 0, kValueTile = Key::kBytes, kStageBytes = Key::kBytes + Value::kBytes;
  // What is known of rows i and i + 8: -D_i of both, twice, as accumulators have them; and their normalizers.
  static constexpr uint32_t kDeltas = kFirstStage + Stages * kStageBytes, kNormalizers = kDeltas + M * 8;
  static constexpr uint32_t kWalk = kNormalizers + M * 4;
  static constexpr uint32_t kSharedBytes = kWalk + sizeof(Walk);
};

template <class F>
__global__ void __launch_bounds__(F::kThreads, 1) flash_query_gradient(const __grid_constant__ BackwardArguments a) {
  using T = typename F::T;
  using Math = typename F::Math;
  using Place = QueryRows<F::MI, F::NJ>;
  constexpr int M = F::M, N = F::N, MI = F::MI, kThreads = F::kThreads;
  constexpr int kKeyColumns = F::Key::kColumns, kValueColumns = F::Value::kColumns;
  DYN_SMEM(shared);
  const uint32_t shared0 = shared_address(shared);
  const BackwardParams& p = a.params;
  const AttentionShape& shape = p.shape;

  // Under a causal mask the last queries have the most to do: they start first.
  const int heads = static_cast<int>(shape.heads);
  BlockTile own = BlockTile::of_block(shape.query_len, M, heads);
  own.tile = (static_cast<int>(shape.query_len) - 1) / M - own.tile;
  const int row0 = threadIdx.x / 32 * 16 * MI, query0 = own.tile * M;

  const TileCopy<typename F::Key, kThreads> key_copy(shape.head_dim);
  const TileCopy<typename F::Value, kThreads> value_copy(key_copy, shape.value_dim);
  UNROLL for (int stage = 0; stage < F::kStages; ++stage) {
    unsigned char* const at = shared + F::kFirstStage + stage * F::kStageBytes;
    key_copy.clear_columns(at + F::kKeyTile);
    value_copy.clear_columns(at + F::kValueTile);
  }
  const MetCopy met_keys(key_copy, p.key);
  const MetCopy met_values(value_copy, p.value);
  auto& walk = *reinterpret_cast<typename F::Walk*>(shared + F::kWalk);
  const auto fetch = [&](uint32_t turn, uint32_t stage) {
    const MetTile& from = walk.at(turn);
    if (from.exists()) {
      const uint32_t to = shared0 + F::kFirstStage + stage * F::kStageBytes;
      const int left = static_cast<int>(shape.kv_len) - from.tile() * N;
      copy_met(from, left, met_keys, to + F::kKeyTile, met_values, to + F::kValueTile);
    }
    cp_async_commit();
  };

  walk.start(a, own, query0, own.head, 1, shape.head_dim == kKeyColumns && shape.value_dim == kValueColumns);
  walk.find(0, a);
  walk.find(1, a);
  const TileCopy<typename F::Query, kThreads> query_copy(shape.head_dim);
  const TileCopy<typename F::GradOut, kThreads> grad_copy(query_copy, shape.value_dim);
  query_copy.clear_columns(shared + F::kQueryTile);
  grad_copy.clear_columns(shared + F::kGradOutTile);
  const Rows queries = query_copy.rows(head_of<T>(p.query, own.batch, own.head), p.query.stride_row, shape.query_len);
  const Rows grads = grad_copy.rows(head_of<T>(p.grad_out, own.batch, own.head), p.grad_out.stride_row, shape.query_len);
  query_copy.clipped(shared0 + F::kQueryTile, queries, own.tile);
  grad_copy.clipped(shared0 + F::kGradOutTile, grads, own.tile);
  __syncthreads();  // the first tiles are known
  fetch(0, 0);

  const int64_t first_row = (static_cast<int64_t>(own.batch) * heads + own.head) * a.rows.padded + query0;
  const int own_pair = (row0 / 16) * 8 + Place::first_query();  // the first of this thread's pairs of rows
  auto* const deltas = reinterpret_cast<float4*>(shared + F::kDeltas);
  auto* const normalizers = reinterpret_cast<float2*>(shared + F::kNormalizers);
  if (lane_index() % 4 == 0) {
    UNROLL for (int mi = 0; mi < MI; ++mi) {
      const int64_t row = first_row + row0 + mi * 16 + Place::first_query();
      const float* const terms = a.rows.terms;
      const float upper = terms[RowTerms::minus_delta(row)], lower = terms[RowTerms::minus_delta(row + 8)];
      deltas[own_pair + mi * 8] = make_float4(upper, upper, lower, lower);
      normalizers[own_pair + mi * 8] = make_float2(terms[RowTerms::normalizer(row)], terms[RowTerms::normalizer(row + 8)]);
    }
  }
  __syncwarp();
  const auto normalizer_of = [&](int q) {
    const float2& pair = normalizers[own_pair + q / 2 * 8];
    return q % 2 ? pair.y : pair.x;
  };
  const auto delta_of = [&](int q) {
    const float4& pair = deltas[own_pair + q / 2 * 8];
    return q % 2 ? pair.z : pair.x;
  };
  const typename Math::template Tiles<kKeyColumns> key_tile(shared, row0);
  const typename Math::template Tiles<kValueColumns> value_tile(key_tile, shared, row0);
  const typename Math::template Rows<kKeyColumns, MI> own_queries(key_tile, F::kQueryTile);
  const typename Math::template Rows<kValueColumns, MI> own_grads(value_tile, F::kGradOutTile);
  Accumulators<MI, kKeyColumns / 8> dq;
  clear(dq);
  uint32_t turn = 0;

  const auto visit = [&](auto partial) {
    constexpr bool kIsPartial = decltype(partial)::value;
    cp_async_wait<0>();
    __syncthreads();  // these keys and values are there; those of the other stage are read
    const uint32_t stage = F::kStages == 1 ? 0 : turn % 2;
    if constexpr (F::kStages == 2) fetch(turn + 1, 1 - stage);
    walk.find(turn + 2, a);
    const bool precise = F::kAlwaysPrecise || (kIsPartial && walk.at(turn).is_precise());
    const BlockTile at = walk.own();
    const int key0 = walk.at(turn).tile() * N, own0 = at.tile * M + row0;
    const ScoreTerms<Place> terms(p, a.factors, at.batch, at.head, own0);
    // Addresses move to the stage once, or, if there are no registers for that, at every use.
    const uint32_t stage_at = stage * F::kStageBytes, moved_by = F::kModified ? 0 : stage_at;
    const auto moved = [&](const auto& tiles) {
      if constexpr (F::kModified) return tiles;
      else return tiles.moved(moved_by);
    };
    const auto keys = moved(key_tile);
    const auto values = moved(value_tile);
    const uint32_t key_at = F::kFirstStage + F::kKeyTile + (stage_at - moved_by), value_at = key_at + F::kValueTile;
    const ValueGuard<typename F::Key, Math, decltype(key_copy), MI> guard(key_copy, shared + F::kFirstStage + F::kKeyTile + stage_at);
    bool finite = true;
    uint32_t seen[Place::kQueries];
    if constexpr (kIsPartial) {
      find_visible<Place>(seen, p, at.batch, at.head, own0, key0);
      finite = !__syncthreads_or(!guard.finite());
    }

    ModifiedScores<Place, T> modified(a);
    if constexpr (F::kModified) {
      modified.set_kept([&](int q) { return kept_keys<N>(p, at.batch, at.head, terms.query(q), key0); });
    }

    Accumulators<MI, F::NJ> s, dp;
    clear(s);
    Math::product_abt(s, own_queries, keys, key_at);
    if constexpr (F::kModified) {
      modified.template apply<kIsPartial>(s, terms, key0);
    } else if (precise) {
      for_pairs<Place>([&](int q, int k) { Place::at(s, q, k) *= a.factors.scale_log2; });
    }
    if constexpr (kIsPartial) hide<Place>(s, [&](int q) { return seen[q]; });
    if (precise) precise_weights<Place, kIsPartial>(s, RowNormalizers(p, at.batch, at.head), own0);
    else weights<Place, kIsPartial>(s, a.factors.scale_log2, normalizer_of);
    if constexpr (F::kModified) {
      modified.through_softcap(s);
      clear(dp);
      Math::product_abt(dp, own_grads, values, value_at);
      modified.template gradient<kIsPartial>(dp, s, delta_of);
    } else {
      UNROLL for (int mi = 0; mi < MI; ++mi) {
        const float4 delta = deltas[own_pair + mi * 8];
        UNROLL for (int j = 0; j < F::NJ; ++j)
          dp[mi][j][0] = delta.x, dp[mi][j][1] = delta.y, dp[mi][j][2] = delta.z, dp[mi][j][3] = delta.w;
      }
      Math::product_abt(dp, own_grads, values, value_at);
      score_gradient<kIsPartial>(dp, s);
    }
    if (!finite) {  // what is not finite has made dS of the queries that see it 0 or NaN
      __syncthreads();
      guard.clean();
      __syncthreads();
    }
    Math::product_pb(dq, dp, keys, key_at);
    if constexpr (F::kStages == 1) {
      __syncthreads();  // these keys and values are read
      fetch(turn + 1, 0);
    }
  };
  walk.for_each(turn, visit);
  cp_async_wait<0>();

  for_elements<MI, kKeyColumns / 8>([&](int mi, int h, int j, int e) { dq[mi][j][2 * h + e] *= a.scale; });
  __syncthreads();  // all copies have arrived, and no warp reads them
  const BlockTile of = walk.own();
  const int first = of.tile * M;
  store_rows<Math, typename F::Query>(dq, shared + F::kQueryTile, row0,
                                      head_of<T>(p.grad_query, of.batch, of.head) + first * p.grad_query.stride_row,
                                      p.grad_query.stride_row, static_cast<int>(shape.query_len) - first,
                                      static_cast<int>(shape.head_dim));
}

}  // namespace attn_ext::cuda
