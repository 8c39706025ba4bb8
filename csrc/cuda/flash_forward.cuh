// Flash attention, forward (Dao 2023, "FlashAttention-2", algorithm 1).
//
// A block owns M queries of one head and walks over the tiles of N keys and values that they see, last one first: tiles that
// a mask or the end of the sequence cuts come first where it is causal, whole ones follow in a loop without checks.
#pragma once
#include "cuda/key_visitor.cuh"
#include "cuda/math.cuh"
#include "cuda/scores.cuh"
#include "cuda/softmax.cuh"
#include "cuda/value_guard.cuh"

namespace attn_ext::cuda {

// Modified: scores are more than scale * q.k, scale > 0, or weights are dropped.
template <class T_, int KeyColumns, int ValueColumns, int M_, int N_, int Warps, bool QueryInRegisters, bool Modified>
struct ForwardTraits {
  using T = T_;
  static constexpr int M = M_, N = N_, kThreads = Warps * 32;
  static constexpr int MI = M / (16 * Warps), NJ = N / 8, DJ = ValueColumns / 8;  // of a warp's accumulators
  static constexpr bool kQueryInRegisters = QueryInRegisters, kModified = Modified;
  using Query = Tile<T, M, KeyColumns>;
  using Key = Tile<T, N, KeyColumns>;
  using Value = Tile<T, N, ValueColumns>;
  using Out = Tile<T, M, ValueColumns>;  // in place of Query
  // Where tiles lie in shared memory.
  static constexpr uint32_t kQueryTile = 0, kKeyTile = Query::kBytes > Out::kBytes ? Query::kBytes : Out::kBytes;
  static constexpr uint32_t kValueTile = kKeyTile + Key::kBytes, kSharedBytes = kValueTile + Value::kBytes;
  using Math = TileMath<T>;
};

// At least one block a multiprocessor: left to itself, ptxas spills registers to fit one more.
template <class F>
__global__ void __launch_bounds__(F::kThreads, 1) flash_forward(const __grid_constant__ ForwardParams p) {
  using T = typename F::T;
  using Place = QueryRows<F::MI, F::NJ>;
  constexpr int M = F::M, N = F::N, MI = F::MI, kThreads = F::kThreads;
  DYN_SMEM(shared);
  const uint32_t shared0 = shared_address(shared);
  const AttentionShape& shape = p.shape;

  // Under a causal mask the last queries have the most to do: they start first.
  const int query_tiles = static_cast<int>((shape.query_len + M - 1) / M), heads = static_cast<int>(shape.heads);
  const int tile = query_tiles - 1 - blockIdx.x % query_tiles, head = blockIdx.x / query_tiles % heads;
  const int batch = blockIdx.x / query_tiles / heads, kv_head = head / (heads / static_cast<int>(shape.kv_heads));
  const int row0 = threadIdx.x / 32 * 16 * MI, query0 = tile * M;

  const TileCopy<typename F::Query, kThreads> query_copy(shape.head_dim);
  const TileCopy<typename F::Key, kThreads> key_copy(shape.head_dim);
  const TileCopy<typename F::Value, kThreads> value_copy(key_copy, shape.value_dim);
  const Rows queries = query_copy.rows(head_of<T>(p.query, batch, head), p.query.stride_row, shape.query_len);
  const Rows keys = key_copy.rows(head_of<T>(p.key, batch, kv_head), p.key.stride_row, shape.kv_len);
  const Rows values = value_copy.rows(head_of<T>(p.value, batch, kv_head), p.value.stride_row, shape.kv_len);
  query_copy.clear_columns(shared + F::kQueryTile);
  key_copy.clear_columns(shared + F::kKeyTile);
  value_copy.clear_columns(shared + F::kValueTile);

  query_copy.clipped(shared0 + F::kQueryTile, queries, tile);
  KeyVisitor<M, N> visitor(p, batch, head, query0);
  TileRun run = visitor.next();
  if (!run.empty()) key_copy.clipped(shared0 + F::kKeyTile, keys, run.last);
  cp_async_commit();

  const typename F::Math::template Tiles<F::Key::kColumns> key_tiles(shared, row0);
  const typename F::Math::template Tiles<F::Value::kColumns> value_tiles(key_tiles, shared, row0);
  typename F::Math::template Rows<F::Key::kColumns, MI, F::kQueryInRegisters> own_queries(key_tiles, F::kQueryTile);
  cp_async_wait<0>();
  __syncthreads();
  own_queries.fetch();

  TileSoftmax<T, MI> softmax(F::kModified ? 1.f : static_cast<float>(p.score.scale * kLog2E));
  if (p.score.sinks) softmax.sink(bias_in_log2<float>(p.score.sinks[head]));
  const ScoreFactors factors = ScoreFactors::of(p.score);
  const ScoreTerms<Place> terms(p, factors, batch, head, query0 + row0);
  Accumulators<MI, F::DJ> o;
  clear(o);

  const auto visit = [&](int n, int after, auto partial) {
    constexpr bool kPartial = decltype(partial)::value;
    cp_async_wait<0>();
    __syncthreads();  // these keys are there, the values before them are read
    if constexpr (kPartial) value_copy.clipped(shared0 + F::kValueTile, values, n);
    else value_copy.whole(shared0 + F::kValueTile, values, n);
    cp_async_commit();

    Accumulators<MI, F::NJ> s;
    clear(s);
    F::Math::product_abt(s, own_queries, key_tiles, F::kKeyTile);

    cp_async_wait<0>();
    ValueGuard<typename F::Value, typename F::Math, decltype(value_copy), MI> guard(value_copy, shared + F::kValueTile);
    bool finite = true;
    if constexpr (kPartial) finite = !__syncthreads_or(!guard.finite());
    else __syncthreads();  // these values are there, the keys are read
    key_copy.whole(shared0 + F::kKeyTile, keys, after, after >= 0);
    cp_async_commit();

    if constexpr (F::kModified) terms.template apply<kPartial>(s, n * N);
    if constexpr (kPartial) {
      const VisibleKeys<N> visible(p, batch, head, n * N);
      hide<Place>(s, [&](int q) {  // rows past the end count as the last one: whatever they see is dropped
        const int query = query0 + row0 + Place::first_query() + Place::query_offset(q);
        return visible.of(min(query, static_cast<int>(shape.query_len) - 1));
      });
    }
    if (!finite) guard.see(s);
    softmax.step(s, o);
    if constexpr (F::kModified) {
      if (p.dropout.enabled()) terms.drop(s, n * N);
    }
    if (!finite) {
      guard.add(o);
      __syncthreads();
      guard.clean();
      __syncthreads();
    }
    F::Math::product_pb(o, s, value_tiles, F::kValueTile);
  };
  while (!run.empty()) {
    const TileRun next = visitor.next(run);
    const int after = next.last;
    if (run.partial) {
      for (int n = run.last; n >= run.first; --n) visit(n, n > run.first ? n - 1 : after, std::true_type());
    } else {
      for (int n = run.last; n >= run.first; --n) visit(n, n > run.first ? n - 1 : after, std::false_type());
    }
    run = next;
  }
  cp_async_wait<0>();

  RowStatistics<float> statistics[MI][2];
  softmax.finish(o, static_cast<float>(p.dropout.inverse_keep), statistics);
  const int rows = static_cast<int>(shape.query_len) - query0;
  // Where the warps' rows do not lie where they lay; else their queries were last read before the last barrier.
  if constexpr (F::kQueryInRegisters && F::Out::kPitch != F::Query::kPitch) __syncthreads();
  store_rows<typename F::Math, typename F::Out>(o, shared + F::kQueryTile, row0,
                                                    head_of<T>(p.out, batch, head) + query0 * p.out.stride_row,
                                                    p.out.stride_row, rows, static_cast<int>(shape.value_dim));
  if (!p.lse || lane_index() % 4 != 0) return;
  const int64_t first = (static_cast<int64_t>(batch) * heads + head) * shape.query_len + query0;
  UNROLL for (int mi = 0; mi < MI; ++mi)
    UNROLL for (int h = 0; h < 2; ++h) {
      const int row = row0 + mi * 16 + h * 8 + lane_index() / 4;
      if (row >= rows) continue;
      static_cast<float*>(p.lse)[first + row] = statistics[mi][h].lse;
      static_cast<float*>(p.lse_residual)[first + row] = statistics[mi][h].residual;
    }
}

}  // namespace attn_ext::cuda
