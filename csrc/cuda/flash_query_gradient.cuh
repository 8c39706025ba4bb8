// Flash attention, backward: the gradient of queries (Dao 2023, "FlashAttention-2", algorithm 2, in a pass of its own).
//
// A block owns M queries of one head and walks over the tiles of N keys and values that they see, as the forward pass does.
// S and dP are computed again: that costs less than adding to dQ from every block of keys would, and sums always in the same
// order.
//   S = Q K^T,  P = 2^(S - normalizer),  dP = dO V^T,  dS = P (dP - D),  dQ += dS K
#pragma once
#include "cuda/math.cuh"
#include "cuda/meetings.cuh"
#include "cuda/score_gradient.cuh"
#include "cuda/value_guard.cuh"

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
  // Where tiles lie in shared memory; the gradient takes the place of the queries.
  static constexpr uint32_t kQueryTile = 0, kGradOutTile = Query::kBytes, kFirstStage = kGradOutTile + GradOut::kBytes;
  // From the start of a stage.
  static constexpr uint32_t kKeyTile = 0, kValueTile = Key::kBytes, kStageBytes = Key::kBytes + Value::kBytes;
  static constexpr uint32_t kSharedBytes = kFirstStage + Stages * kStageBytes;
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
  const int query_tiles = static_cast<int>((shape.query_len + M - 1) / M), heads = static_cast<int>(shape.heads);
  const int tile = query_tiles - 1 - blockIdx.x % query_tiles, head = blockIdx.x / query_tiles % heads;
  const int batch = blockIdx.x / query_tiles / heads, kv_head = head / (heads / static_cast<int>(shape.kv_heads));
  const int row0 = threadIdx.x / 32 * 16 * MI, query0 = tile * M;

  const TileCopy<typename F::Key, kThreads> key_copy(shape.head_dim);
  const TileCopy<typename F::Value, kThreads> value_copy(key_copy, shape.value_dim);
  const Rows keys = key_copy.rows(head_of<T>(p.key, batch, kv_head), p.key.stride_row, shape.kv_len);
  const Rows values = value_copy.rows(head_of<T>(p.value, batch, kv_head), p.value.stride_row, shape.kv_len);
  UNROLL for (int stage = 0; stage < F::kStages; ++stage) {
    unsigned char* const at = shared + F::kFirstStage + stage * F::kStageBytes;
    key_copy.clear_columns(at + F::kKeyTile);
    value_copy.clear_columns(at + F::kValueTile);
  }
  const auto fetch = [&](const MetTile& from, int stage) {
    const uint32_t to = shared0 + F::kFirstStage + stage * F::kStageBytes;
    if ((from.tile() + 1) * N <= shape.kv_len) {
      key_copy.whole(to + F::kKeyTile, keys, from.tile(), from.exists());
      value_copy.whole(to + F::kValueTile, values, from.tile(), from.exists());
    } else {
      key_copy.clipped(to + F::kKeyTile, keys, from.tile());
      value_copy.clipped(to + F::kValueTile, values, from.tile());
    }
    cp_async_commit();
  };

  TileVisitor visitor(a.of_queries, batch, head, 1, tile);
  MetTile now = visitor.next();
  const TileCopy<typename F::Query, kThreads> query_copy(shape.head_dim);
  const TileCopy<typename F::GradOut, kThreads> grad_copy(query_copy, shape.value_dim);
  query_copy.clear_columns(shared + F::kQueryTile);
  grad_copy.clear_columns(shared + F::kGradOutTile);
  query_copy.clipped(shared0 + F::kQueryTile, query_copy.rows(head_of<T>(p.query, batch, head), p.query.stride_row, shape.query_len), tile);
  grad_copy.clipped(shared0 + F::kGradOutTile, grad_copy.rows(head_of<T>(p.grad_out, batch, head), p.grad_out.stride_row, shape.query_len),
                    tile);
  fetch(now, 0);

  float normalizer[Place::kQueries], minus_delta[Place::kQueries];
  const int64_t first_row = (static_cast<int64_t>(batch) * heads + head) * a.rows.padded + query0;
  UNROLL for (int q = 0; q < Place::kQueries; ++q) {
    const int64_t row = first_row + row0 + Place::first_query() + Place::query_offset(q);
    normalizer[q] = a.rows.terms[RowTerms::normalizer(row)];
    minus_delta[q] = a.rows.terms[RowTerms::minus_delta(row)];
  }
  const bool precise = F::kAlwaysPrecise || a.rows.precise[first_row / kRowBlock] != 0;
  const typename Math::template Tiles<kKeyColumns> key_tile(shared, row0);
  const typename Math::template Tiles<kValueColumns> value_tile(key_tile, shared, row0);
  const typename Math::template Rows<kKeyColumns, MI> own_queries(key_tile, F::kQueryTile);
  const typename Math::template Rows<kValueColumns, MI> own_grads(value_tile, F::kGradOutTile);
  const ScoreTerms<Place> terms(p, batch, head, query0 + row0);
  const float factor = static_cast<float>(p.score.scale * kLog2E);
  Accumulators<MI, kKeyColumns / 8> dq;
  clear(dq);
  int stage = 0;

  const auto visit = [&](const MetTile& next, auto partial) {
    constexpr bool kIsPartial = decltype(partial)::value;
    cp_async_wait<0>();
    __syncthreads();  // these keys and values are there; those of the other stage are read
    const int other = F::kStages == 1 ? 0 : 1 - stage;
    if constexpr (F::kStages == 2) fetch(next, other);
    const int key0 = now.tile() * N;
    const uint32_t key_at = F::kFirstStage + stage * F::kStageBytes + F::kKeyTile, value_at = key_at + F::kValueTile;
    const ValueGuard<typename F::Key, Math, decltype(key_copy), MI> guard(key_copy, shared + key_at);
    bool finite = true;
    uint32_t seen[Place::kQueries];
    if constexpr (kIsPartial) {
      find_visible<Place>(seen, p, batch, head, query0 + row0, key0);
      finite = !__syncthreads_or(!guard.finite());
    }

    ModifiedScores<Place> modified(p.dropout);
    if constexpr (F::kModified) {
      modified.set_kept([&](int q) { return kept_keys<N>(p, batch, head, terms.query(q), key0); });
    }

    Accumulators<MI, F::NJ> s, dp;
    clear(s);
    Math::product_abt(s, own_queries, key_tile, key_at);
    if constexpr (F::kModified) {
      modified.template apply<kIsPartial>(s, terms, key0);
    } else if (precise) {
      for_pairs<Place>([&](int q, int k) { Place::at(s, q, k) *= factor; });
    }
    if constexpr (kIsPartial) hide<Place>(s, [&](int q) { return seen[q]; });
    if (precise) precise_weights<Place>(s, RowNormalizers(p, batch, head), query0 + row0);
    else weights<Place>(s, factor, normalizer);
    if constexpr (F::kModified) {
      modified.through_softcap(s);
      clear(dp);
      Math::product_abt(dp, own_grads, value_tile, value_at);
      modified.template gradient<kIsPartial>(dp, s, [&](int q) { return minus_delta[q]; });
    } else {
      for_pairs<Place>([&](int q, int k) { Place::at(dp, q, k) = minus_delta[q]; });
      Math::product_abt(dp, own_grads, value_tile, value_at);
      score_gradient<kIsPartial>(dp, s);
    }
    if (!finite) {  // what is not finite has made dS of the queries that see it 0 or NaN
      __syncthreads();
      guard.clean();
      __syncthreads();
    }
    Math::product_pb(dq, dp, key_tile, key_at);
    if constexpr (F::kStages == 1) {
      __syncthreads();  // these keys and values are read
      fetch(next, other);
    }
    stage = other;
  };
  while (now.exists()) {
    const MetTile next = visitor.next();
    if (now.partial()) visit(next, std::true_type());
    else visit(next, std::false_type());
    now = next;
  }
  cp_async_wait<0>();

  const float scale = static_cast<float>(p.score.scale);
  for_elements<MI, kKeyColumns / 8>([&](int mi, int h, int j, int e) { dq[mi][j][2 * h + e] *= scale; });
  __syncthreads();  // all copies have arrived, and no warp reads them
  store_rows<Math, typename F::Query>(dq, shared + F::kQueryTile, row0, head_of<T>(p.grad_query, batch, head) + query0 * p.grad_query.stride_row,
                                      p.grad_query.stride_row, static_cast<int>(shape.query_len) - query0,
                                      static_cast<int>(shape.head_dim));
}

}  // namespace attn_ext::cuda
