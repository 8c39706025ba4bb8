// Flash attention, backward: the gradients of keys and values (Dao 2023, "FlashAttention-2", algorithm 2).
//
// A block owns N keys of one key head and walks over the tiles of M queries, of all heads that read these keys, that see any
// of them.  Rows of accumulators are keys: P^T and dS^T leave the products that make them as the left operands of the next
// two, so that nothing but the tiles goes through shared memory, and nothing is added to memory that another block adds to.
//   S^T = K Q^T,  P^T = 2^(S^T - normalizer),  dV += P^T dO,  dP^T = V dO^T,  dS^T = P^T (dP^T - D),  dK += dS^T Q
#pragma once
#include "cuda/math.cuh"
#include "cuda/meetings.cuh"
#include "cuda/score_gradient.cuh"
#include "cuda/tile_bits.cuh"
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
  // Where tiles lie in shared memory; gradients take the place of keys and values.
  static constexpr uint32_t kKeyTile = 0, kValueTile = kOfKey ? Key::kBytes : 0, kFirstStage = kValueTile + Value::kBytes;
  // From the start of a stage.
  static constexpr uint32_t kQueryTile = 0, kGradOutTile = Query::kBytes, kStageBytes = Query::kBytes + GradOut::kBytes;
  // RowTerms of the queries of each stage.
  static constexpr uint32_t kRows = kFirstStage + Stages * kStageBytes, kRowsBytes = M * RowTerms::kFloats * sizeof(float);
  static constexpr uint32_t kBits = kRows + Stages * kRowsBytes, kSharedBytes = kBits + Bits::kBytes;
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
  const int key_tiles = static_cast<int>((shape.kv_len + N - 1) / N), kv_heads = static_cast<int>(shape.kv_heads);
  const int tile = blockIdx.x % key_tiles, kv_head = blockIdx.x / key_tiles % kv_heads, batch = blockIdx.x / key_tiles / kv_heads;
  const int group = static_cast<int>(shape.heads) / kv_heads, head0 = kv_head * group;
  const int row0 = threadIdx.x / 32 * 16 * MI, key0 = tile * N;

  const TileCopy<typename F::Query, kThreads> query_copy(shape.head_dim);
  const TileCopy<typename F::GradOut, kThreads> grad_copy(query_copy, shape.value_dim);
  const Rows queries = query_copy.rows(head_of<T>(p.query, batch, head0), p.query.stride_row, shape.query_len);
  const Rows grads = grad_copy.rows(head_of<T>(p.grad_out, batch, head0), p.grad_out.stride_row, shape.query_len);
  const int64_t query_head = p.query.stride_head * static_cast<int64_t>(sizeof(T)), grad_head = p.grad_out.stride_head * static_cast<int64_t>(sizeof(T));
  const int64_t first_row = (static_cast<int64_t>(batch) * shape.heads + head0) * a.rows.padded;
  const float* const row_terms = a.rows.terms + first_row * RowTerms::kFloats + threadIdx.x * 4;  // the first threads copy them
  UNROLL for (int stage = 0; stage < F::kStages; ++stage) {
    unsigned char* const at = shared + F::kFirstStage + stage * F::kStageBytes;
    query_copy.clear_columns(at + F::kQueryTile);
    grad_copy.clear_columns(at + F::kGradOutTile);
  }

  const auto fetch = [&](const MetTile& from, int stage) {
    const int head = from.head - head0;
    Rows query = queries, grad = grads;
    query.data += head * query_head, grad.data += head * grad_head;
    const uint32_t to = shared0 + F::kFirstStage + stage * F::kStageBytes;
    if ((from.tile() + 1) * M <= shape.query_len) {
      query_copy.whole(to + F::kQueryTile, query, from.tile(), from.exists());
      grad_copy.whole(to + F::kGradOutTile, grad, from.tile(), from.exists());
    } else {
      query_copy.clipped(to + F::kQueryTile, query, from.tile());
      grad_copy.clipped(to + F::kGradOutTile, grad, from.tile());
    }
    if (from.exists() && threadIdx.x < F::kRowsBytes / 16) {
      cp_async16(shared0 + F::kRows + stage * F::kRowsBytes + threadIdx.x * 16,
                 row_terms + (head * a.rows.padded + from.tile() * M) * RowTerms::kFloats);
    }
    cp_async_commit();
  };
  const auto is_precise = [&](const MetTile& of) {
    if (F::kAlwaysPrecise || !of.exists()) return F::kAlwaysPrecise;
    return a.rows.precise[(first_row + (of.head - head0) * a.rows.padded + of.tile() * M) / kRowBlock] != 0;
  };

  TileVisitor visitor(a.of_keys, batch, head0, group, tile);
  MetTile now = visitor.next();
  bool precise = is_precise(now);
  const TileCopy<typename F::Key, kThreads> key_copy(shape.head_dim);
  const TileCopy<typename F::Value, kThreads> value_copy(key_copy, shape.value_dim);
  key_copy.clear_columns(shared + F::kKeyTile);
  key_copy.clipped(shared0 + F::kKeyTile, key_copy.rows(head_of<T>(p.key, batch, kv_head), p.key.stride_row, shape.kv_len), tile);
  if constexpr (F::kOfKey) {
    value_copy.clear_columns(shared + F::kValueTile);
    value_copy.clipped(shared0 + F::kValueTile, value_copy.rows(head_of<T>(p.value, batch, kv_head), p.value.stride_row, shape.kv_len),
                       tile);
  }
  fetch(now, 0);

  const typename Math::template Tiles<kKeyColumns> key_tile(shared, row0);
  const typename Math::template Tiles<kValueColumns> value_tile(key_tile, shared, row0);
  const typename Math::template Rows<kKeyColumns, MI> own_keys(key_tile, F::kKeyTile);
  const typename Math::template Rows<kValueColumns, MI> own_values(value_tile, F::kValueTile);
  const typename F::Bits bits(shared + F::kBits);
  const float factor = static_cast<float>(p.score.scale * kLog2E);
  Accumulators<MI, F::kOfKey ? kKeyColumns / 8 : 1> dk;
  Accumulators<MI, F::kOfValue ? kValueColumns / 8 : 1> dv;
  clear(dk);
  clear(dv);
  int stage = 0;

  const auto visit = [&](const MetTile& next, auto partial) {
    constexpr bool kIsPartial = decltype(partial)::value;
    cp_async_wait<0>();
    __syncthreads();  // these queries are there; those of the other stage are read
    const int other = F::kStages == 1 ? 0 : 1 - stage;
    const bool next_precise = is_precise(next);
    if constexpr (F::kStages == 2) fetch(next, other);
    const int query0 = now.tile() * M;
    const uint32_t query_at = F::kFirstStage + stage * F::kStageBytes + F::kQueryTile, grad_at = query_at + F::kGradOutTile;
    const auto* const rows = reinterpret_cast<const float*>(shared + F::kRows + stage * F::kRowsBytes) + RowTerms::normalizer(Place::first_query());
    const ValueGuard<typename F::Query, Math, decltype(query_copy), MI> query_guard(query_copy, shared + query_at);
    ValueGuard<typename F::GradOut, Math, decltype(grad_copy), MI> grad_guard(grad_copy, shared + grad_at);
    bool finite = true;
    if (kIsPartial || (F::kModified && p.dropout.enabled())) {
      bits.template write<kIsPartial, F::kModified>(p, batch, now.head, query0, key0);
      if constexpr (kIsPartial) finite = !__syncthreads_or(!query_guard.finite() || !grad_guard.finite());
      else __syncthreads();
    }

    ModifiedScores<Place> modified(p.dropout);
    if constexpr (F::kModified) {
      modified.set_kept([&](int q) { return bits.kept(Place::first_query() + Place::query_offset(q), row0); });
    }
    Accumulators<MI, F::NJ> s;
    clear(s);
    Math::product_abt(s, own_keys, key_tile, query_at);
    if constexpr (F::kModified) {
      modified.template apply<kIsPartial>(s, ScoreTerms<Place>(p, batch, now.head, query0), key0 + row0);
    } else if (precise) {
      for_pairs<Place>([&](int q, int k) { Place::at(s, q, k) *= factor; });
    }
    if constexpr (kIsPartial) hide<Place>(s, [&](int q) { return bits.visible(Place::first_query() + Place::query_offset(q), row0); });
    if (precise) {
      precise_weights<Place>(s, RowNormalizers(p, batch, now.head), query0);
    } else {
      float normalizer[Place::kQueries];
      UNROLL for (int j = 0; j < F::NJ; ++j) {
        const float2 two = *reinterpret_cast<const float2*>(rows + RowTerms::normalizer(8 * j));
        normalizer[2 * j] = two.x, normalizer[2 * j + 1] = two.y;
      }
      weights<Place>(s, factor, normalizer);
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
      Math::product_abt(dp, own_values, value_tile, grad_at);
    };
    const auto clean = [&] {
      if (finite) return;
      __syncthreads();
      query_guard.clean();
      grad_guard.clean();
      __syncthreads();
    };
    // Tiles that may have to be cleaned are multiplied before: what is not finite has made dS of the keys that are seen 0 or NaN,
    // but is to be felt by dV.
    if constexpr (F::kOfKey && kIsPartial) multiply_dp();
    if constexpr (F::kOfValue) {
      Accumulators<MI, F::NJ> left;
      for_pairs<Place>([&](int q, int k) { Place::at(left, q, k) = Place::at(s, q, k); });
      if constexpr (F::kModified) modified.drop(left);
      if (!finite) {
        grad_guard.see(left, 0.f);
        grad_guard.add(dv);
      }
      clean();
      Math::product_pb(dv, left, value_tile, grad_at);
    } else {
      clean();
    }
    if constexpr (F::kOfKey) {
      if constexpr (!kIsPartial) multiply_dp();
      if constexpr (F::kModified) {
        modified.through_softcap(s);
        modified.template gradient<kIsPartial>(dp, s, [&](int q) { return deltas[RowTerms::normalizer(q / 2 * 8) + q % 2]; });
      } else {
        score_gradient<kIsPartial>(dp, s);
      }
      Math::product_pb(dk, dp, key_tile, query_at);
    }
    if constexpr (F::kStages == 1) {
      __syncthreads();  // these queries are read
      fetch(next, other);
    }
    stage = other;
    precise = next_precise;
  };
  while (now.exists()) {
    const MetTile next = visitor.next();
    if (now.partial()) visit(next, std::true_type());
    else visit(next, std::false_type());
    now = next;
  }
  cp_async_wait<0>();
  __syncthreads();

  const int rows = static_cast<int>(shape.kv_len) - key0;
  const auto store = [&](auto& gradient, float by, unsigned char* staging, const TensorView& to, auto staged, int64_t columns) {
    for_elements<MI, sizeof(gradient[0]) / sizeof(gradient[0][0])>([&](int mi, int h, int j, int e) { gradient[mi][j][2 * h + e] *= by; });
    store_rows<Math, decltype(staged)>(gradient, staging, row0, head_of<T>(to, batch, kv_head) + key0 * to.stride_row, to.stride_row,
                                       rows, static_cast<int>(columns));
  };
  if constexpr (F::kOfKey) {
    store(dk, static_cast<float>(p.score.scale), shared + F::kKeyTile, p.grad_key, typename F::Key(), shape.head_dim);
  }
  if constexpr (F::kOfValue) {
    store(dv, static_cast<float>(p.dropout.inverse_keep), shared + F::kValueTile, p.grad_value, typename F::Value(), shape.value_dim);
  }
}

}  // namespace attn_ext::cuda
