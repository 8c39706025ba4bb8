// The gradient of a bias: dS, summed over the batch elements, heads, queries and keys that share an element.
//
// A block owns a tile of the bias, computes S and dP for it once for each head and batch element that it is for, and adds dS up
// in registers, always in the same order.  Where a bias is the same for all queries, or keys, it owns all tiles of them too, and
// sums rows, or columns, at the end.  Several blocks share that work where there would be few; add_splits adds what they have.
#pragma once
#include "cuda/backward.h"
#include "cuda/math.cuh"
#include "cuda/score_gradient.cuh"
#include "cuda/visible_keys.cuh"

namespace attn_ext::cuda {

template <class T_, int KeyColumns, int ValueColumns, int M_, int N_, int Warps>
struct BiasGradientTraits {
  using T = T_;
  using Math = TileMath<T>;
  static constexpr int M = M_, N = N_, kWarps = Warps, kThreads = Warps * 32;
  static constexpr int MI = M / (16 * Warps), NJ = N / 8;  // of a warp's accumulators
  using Query = Tile<T, M, KeyColumns>;
  using GradOut = Tile<T, M, ValueColumns>;
  using Key = Tile<T, N, KeyColumns>;
  using Value = Tile<T, N, ValueColumns>;
  // Where tiles lie in shared memory.
  static constexpr uint32_t kQueryTile = 0, kGradOutTile = Query::kBytes, kKeyTile = kGradOutTile + GradOut::kBytes;
  static constexpr uint32_t kValueTile = kKeyTile + Key::kBytes, kColumnSums = kValueTile + Value::kBytes;
  static constexpr uint32_t kSharedBytes = kColumnSums + Warps * N * sizeof(float);
};

template <class F>
__global__ void __launch_bounds__(F::kThreads, 1) flash_bias_gradient(const __grid_constant__ BackwardArguments a) {
  using T = typename F::T;
  using Math = typename F::Math;
  using Place = QueryRows<F::MI, F::NJ>;
  constexpr int M = F::M, N = F::N, MI = F::MI, kThreads = F::kThreads;
  constexpr int kKeyColumns = F::Key::kColumns, kValueColumns = F::Value::kColumns;
  DYN_SMEM(shared);
  const uint32_t shared0 = shared_address(shared);
  const BackwardParams& p = a.params;
  const AttentionShape& shape = p.shape;
  const int row0 = threadIdx.x / 32 * 16 * MI;

  const BiasSpans spans(p, M, N);
  const int split = static_cast<int>(blockIdx.x % a.bias.splits);
  int64_t tile = blockIdx.x / a.bias.splits;
  const auto take = [](int64_t& index, int count) {
    const int taken = static_cast<int>(index % count);
    index /= count;
    return taken;
  };
  const int own_key = take(tile, spans.key.owned), own_query = take(tile, spans.query.owned);
  const int own_head = take(tile, spans.head.owned);
  const int own_batch = static_cast<int>(tile);

  const TileCopy<typename F::Query, kThreads> query_copy(shape.head_dim);
  const TileCopy<typename F::GradOut, kThreads> grad_copy(query_copy, shape.value_dim);
  const TileCopy<typename F::Key, kThreads> key_copy(shape.head_dim);
  const TileCopy<typename F::Value, kThreads> value_copy(key_copy, shape.value_dim);
  query_copy.clear_columns(shared + F::kQueryTile);
  grad_copy.clear_columns(shared + F::kGradOutTile);
  key_copy.clear_columns(shared + F::kKeyTile);
  value_copy.clear_columns(shared + F::kValueTile);
  const typename Math::template Tiles<kKeyColumns> key_tile(shared, row0);
  const typename Math::template Tiles<kValueColumns> value_tile(key_tile, shared, row0);
  const typename Math::template Rows<kKeyColumns, MI> own_queries(key_tile, F::kQueryTile);
  const typename Math::template Rows<kValueColumns, MI> own_grads(value_tile, F::kGradOutTile);
  Accumulators<MI, F::NJ> sum;
  clear(sum);

  const int64_t steps = spans.shared(), end = steps * (split + 1) / a.bias.splits;
#pragma unroll 1
  for (int64_t step = steps * split / a.bias.splits; step < end; ++step) {
    int64_t index = step;
    const int n = own_key + take(index, spans.key.shared), m = own_query + take(index, spans.query.shared);
    const int head = own_head + take(index, spans.head.shared), batch = own_batch + static_cast<int>(index);
    const int kv_head = head / static_cast<int>(shape.heads / shape.kv_heads), query0 = m * M, key0 = n * N;

    uint32_t seen[Place::kQueries], any = 0;
    find_visible<Place>(seen, p, batch, head, query0 + row0, key0);
    UNROLL for (int q = 0; q < Place::kQueries; ++q) any |= seen[q];
    if (!__syncthreads_or(any != 0)) continue;  // and the tiles before are read
    query_copy.clipped(shared0 + F::kQueryTile,
                       query_copy.rows(head_of<T>(p.query, batch, head), p.query.stride_row, shape.query_len), m);
    grad_copy.clipped(shared0 + F::kGradOutTile,
                      grad_copy.rows(head_of<T>(p.grad_out, batch, head), p.grad_out.stride_row, shape.query_len), m);
    key_copy.clipped(shared0 + F::kKeyTile,
                     key_copy.rows(head_of<T>(p.key, batch, kv_head), p.key.stride_row, shape.kv_len), n);
    value_copy.clipped(shared0 + F::kValueTile,
                       value_copy.rows(head_of<T>(p.value, batch, kv_head), p.value.stride_row, shape.kv_len), n);
    cp_async_commit();
    const ScoreTerms<Place> terms(p, a.factors, batch, head, query0 + row0);
    ModifiedScores<Place, T> modified(a);
    modified.set_kept([&](int q) { return kept_keys<N>(p, batch, head, terms.query(q), key0); });
    float minus_delta[Place::kQueries];
    UNROLL for (int q = 0; q < Place::kQueries; ++q) {
      const int64_t row = (static_cast<int64_t>(batch) * shape.heads + head) * a.rows.padded + query0 + row0 + Place::first_query() +
                          Place::query_offset(q);
      minus_delta[q] = a.rows.terms[RowTerms::minus_delta(row)];
    }
    cp_async_wait<0>();
    __syncthreads();

    Accumulators<MI, F::NJ> s, dp;
    clear(s);
    Math::product_abt(s, own_queries, key_tile, F::kKeyTile);
    modified.template apply<true>(s, terms, key0);
    hide<Place>(s, [&](int q) { return seen[q]; });
    precise_weights<Place, true>(s, RowNormalizers(p, batch, head), query0 + row0);
    clear(dp);
    Math::product_abt(dp, own_grads, value_tile, F::kValueTile);
    modified.template gradient<true>(dp, s, [&](int q) { return minus_delta[q]; });
    for_elements<MI, F::NJ>([&](int mi, int h, int j, int e) { sum[mi][j][2 * h + e] += dp[mi][j][2 * h + e]; });
  }

  const TensorView& grad = p.grad_bias;
  float* const to = a.bias.partials + (a.bias.splits > 1 ? split * p.grad_bias_elements : 0) + own_batch * grad.stride_batch +
                    own_head * grad.stride_head;
  const int first_query = own_query * M + row0 + Place::first_query(), first_key = own_key * N + Place::first_key();
  const bool sums_rows = grad.stride_row == 0, sums_columns = grad.stride_column == 0;
  if (sums_columns) {  // into the thread's first
    UNROLL for (int q = 0; q < Place::kQueries; ++q) {
      float total = 0.f;
      UNROLL for (int k = 0; k < Place::kKeys; ++k) total += Place::at(sum, q, k);
      total += __shfl_xor_sync(kAllLanes, total, 1);
      Place::at(sum, q, 0) = total + __shfl_xor_sync(kAllLanes, total, 2);
    }
  }
  if (sums_rows) {
    auto* const column_sums = reinterpret_cast<float*>(shared + F::kColumnSums);  // [warps][N]
    UNROLL for (int k = 0; k < Place::kKeys; ++k) {
      float total = 0.f;
      UNROLL for (int q = 0; q < Place::kQueries; ++q) total += Place::at(sum, q, k);
      UNROLL for (int lanes = 4; lanes < 32; lanes *= 2) total += __shfl_xor_sync(kAllLanes, total, lanes);
      if (lane_index() < 4) column_sums[threadIdx.x / 32 * N + Place::first_key() + Place::key_offset(k)] = total;
    }
    __syncthreads();
    const int keys = sums_columns ? 1 : min(N, static_cast<int>(shape.kv_len) - own_key * N);
    for (int key = threadIdx.x; key < keys; key += kThreads) {
      float total = 0.f;
      UNROLL for (int warp = 0; warp < F::kWarps; ++warp) total += column_sums[warp * N + key];
      to[sums_columns ? 0 : (own_key * N + key) * grad.stride_column] = total;
    }
    return;
  }
  UNROLL for (int q = 0; q < Place::kQueries; ++q) {
    const int query = first_query + Place::query_offset(q);
    if (query >= shape.query_len) continue;
    UNROLL for (int k = 0; k < Place::kKeys; ++k) {
      const int key = first_key + Place::key_offset(k);
      const bool is_stored = sums_columns ? k == 0 && lane_index() % 4 == 0 : key < shape.kv_len;
      if (is_stored) to[query * grad.stride_row + key * grad.stride_column] = Place::at(sum, q, k);
    }
  }
}

}  // namespace attn_ext::cuda
