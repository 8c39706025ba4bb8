// Decoding: a few queries of each sequence over a long cache (flash-decoding, Dao et al. 2023).
//
// Reading the cache is the work, so it is arranged by what it reads: the queries of the heads that share a kv head are the
// rows of one product, up to 16 of them.  A block takes ranges of the keys of a sequence, one after another; within a range
// each warp copies and reads tiles of its own, with no barrier of the block in the loop.  Their states are merged when the
// range ends, those of the ranges by another kernel (decode_merge.cu).
#pragma once
#include "cuda/decode_codes.cuh"
#include "cuda/decode_copy.cuh"
#include "cuda/decode_merge.cuh"
#include "cuda/decode_products.cuh"
#include "cuda/decode_rows.cuh"
#include "cuda/rotary.cuh"
#include "cuda/value_guard.cuh"

namespace attn_ext::cuda {

// Ahead: tiles of keys, and of values, that a warp has room for.  Blocks: of a multiprocessor, for which there are registers.
template <class T_, int Columns, int Warps, int Ahead, int Blocks, bool Quantised>
struct DecodeTraits {
  using T = T_;
  static constexpr int kColumns = Columns, kWarps = Warps, kThreads = Warps * 32, kAhead = Ahead, kBlocks = Blocks;
  static constexpr int NJ = kDecodeTile / 8, DJ = Columns / 8;  // of a warp's accumulators
  static constexpr bool kQuantised = Quantised;
  using Operand = Tile<T, kDecodeTile, Columns>;  // of products: queries, too
  using Cached = Tile<std::conditional_t<Quantised, uint8_t, T>, kDecodeTile, Columns>;
  using Part = Tile<float, kDecodeRows, Columns>;  // a warp's output
  static_assert(kDecodeRows == kDecodeTile);

  // In shared memory: for each warp the tiles of the cache, keys and values by turns, and one to widen them into.  Outputs of
  // the warps take their place.  The queries stay there: in registers they would cost a block.
  static constexpr uint32_t kWidened = 2 * Ahead * Cached::kBytes, kWarpBytes = kWidened + (Quantised ? Operand::kBytes : 0);
  static constexpr uint32_t kTiles = Warps * kWarpBytes, kStates = Warps * Part::kBytes;
  static constexpr uint32_t kStateBytes = Warps * kDecodeRows * sizeof(float2);
  static constexpr uint32_t kQueryTile = kTiles > kStates + kStateBytes ? kTiles : (kStates + kStateBytes + 1023) / 1024 * 1024;
  static constexpr uint32_t kSharedBytes = kQueryTile + Operand::kBytes;
  using Products = std::conditional_t<std::is_same_v<T, float>, FmaDecode<DecodeTraits>, MmaDecode<DecodeTraits>>;
};

// The tile of queries, turned, with zeros where there are none.  A thread takes 16 bytes of a row at once, in whatever pieces.
template <class F>
DEVICE void load_queries(unsigned char* tile, const DeviceDecodeParams& p, const Sequence& sequence, int batch, int kv_head,
                         int row0, int count) {
  using T = typename F::T;
  using Query = typename F::Operand;
  const AttentionShape& shape = p.shape;
#pragma unroll 1
  for (int i = threadIdx.x; i < kDecodeRows * Query::kChunks; i += F::kThreads) {
    const int row = i / Query::kChunks, chunk = i % Query::kChunks;
    const DecodeRow at(shape, kv_head, row0 + min(row, count - 1));
    const T* const query = head_of<T>(p.query, batch, at.head) + at.query * p.query.stride_row;
    T* const to = reinterpret_cast<T*>(tile + Query::at(row, chunk));
    const int existing = row < count ? static_cast<int>(shape.head_dim) - chunk * Query::kPerChunk : 0;
    UNROLL for (int k = 0; k < Query::kPerChunk; ++k) to[k] = k < existing ? query[chunk * Query::kPerChunk + k] : T{};
    if (!p.rotary.cos.data) continue;
#pragma unroll 1
    for (int k = 0; k < min(existing, Query::kPerChunk); ++k) {
      const auto element = [=](int column) { return to_float(query[column]); };
      to[k] = from_float<T>(turned(p.rotary, sequence.position(at.query), chunk * Query::kPerChunk + k, element));
    }
  }
}

// A tile as what a warp has copied, for ValueGuard.
template <class Tile>
struct OwnTile {
  template <class Function>
  DEVICE void for_own_chunks(unsigned char* tile, const Function& f) const {
    for (int i = lane_index(); i < Tile::kRows * Tile::kChunks; i += 32) f(reinterpret_cast<uint4*>(tile + i * 16));
  }
};

// What a warp knows of the tiles that are under way, the next to be used first.
template <class Item, int Count>
struct Queue {
  Item items[Count];

  DEVICE Item push(const Item& item) {  // returns what leaves
    const Item first = items[0];
    UNROLL for (int i = 1; i < Count; ++i) items[i - 1] = items[i];
    items[Count - 1] = item;
    return first;
  }
};

template <class F>
__global__ void __launch_bounds__(F::kThreads, F::kBlocks) flash_decode(const __grid_constant__ DeviceDecodeParams p) {
  using T = typename F::T;
  using Operand = typename F::Operand;
  constexpr int kAhead = F::kAhead, kWarps = F::kWarps, kTile = kDecodeTile;
  DYN_SMEM(shared);
  const uint32_t shared0 = shared_address(shared);
  const AttentionShape& shape = p.shape;

  const int all_rows = group_of(shape) * static_cast<int>(shape.query_len), row_blocks = (all_rows + kDecodeRows - 1) / kDecodeRows;
  const int shares = static_cast<int>(p.blocks), kv_heads = static_cast<int>(shape.kv_heads);
  const int row0 = blockIdx.x % row_blocks * kDecodeRows, share = blockIdx.x / row_blocks % shares;
  const int kv_head = blockIdx.x / row_blocks / shares % kv_heads, batch = blockIdx.x / row_blocks / shares / kv_heads;
  const int count = min(kDecodeRows, all_rows - row0), warp = threadIdx.x / 32;
  const Sequence sequence(p, batch);
  const int ranges = sequence.ranges();
  if (share >= ranges) return;

  using Copy = CacheCopy<typename F::Cached>;
  const uint32_t place = Copy::own_place();
  const Copy key_copy(p.key_cache, kv_head, shape.head_dim, place), value_copy(p.value_cache, kv_head, shape.value_dim, place);
  const DecodeRows rows(p, sequence, batch, kv_head, row0, count);
  const uint32_t own = warp * F::kWarpBytes, widened = own + F::kWidened;
  const auto key_tile = [&](int turn) { return own + 2 * turn * F::Cached::kBytes; };
  const auto value_tile = [&](int turn) { return own + (2 * turn + 1) * F::Cached::kBytes; };
  typename F::Products products(shared, p);

  for (int range = share; range < ranges; range += shares) {
    const int each = sequence.keys_of_range(), key0 = sequence.first_of_all() + range * each;
    const int begin = max(key0, rows.keys_begin()), end = min(min(key0 + each, sequence.total()), rows.keys_end());
    // This warp's tiles are first, first + kWarps, ... below last.
    const int first = max(0, begin - key0) / kTile + warp, last = max(0, end - key0 + kTile - 1) / kTile;

    // The page of this lane's key of a tile; -1 if the key does not count.
    const auto page_in = [&](int tile) {
      const int key = key0 + tile * kTile + lane_index() % kTile;
      return begin <= key && key < end ? sequence.page(key) : -1;
    };
    const auto places_in = [&](int tile, int page) {
      const uint32_t there = __ballot_sync(kAllLanes, page >= 0) & 0xffff;
      const int key = key0 + tile * kTile + lane_index() % kTile;
      return page >= 0 ? TilePlaces{page, sequence.row(key), there} : TilePlaces{0, 0, there};
    };
    const auto scale_at = [&](const CacheView& cache, const TilePlaces& places) {
      return places.there >> lane_index() % kTile & 1 ? cache.scale[static_cast<int64_t>(places.page) * kv_heads + kv_head] : 0.f;
    };
    struct Noted {
      uint32_t there;
      float key_scale, value_scale;
    };
    const auto note = [&](const TilePlaces& places) {
      if constexpr (F::kQuantised) return Noted{places.there, scale_at(p.key_cache, places), scale_at(p.value_cache, places)};
      else return Noted{places.there, 1.f, 1.f};
    };

    Queue<Noted, kAhead> noted = {};
    int page = page_in(first);
#pragma unroll 1
    for (int turn = 0; turn < kAhead; ++turn) {
      const int ahead = first + turn * kWarps;
      const TilePlaces places = places_in(ahead, page);
      page = page_in(ahead + kWarps);
      noted.push(note(places));
      key_copy.clear_columns(shared + key_tile(turn));
      if (ahead < last) key_copy.copy(shared, shared0, key_tile(turn), places);
      cp_async_commit();
      value_copy.clear_columns(shared + value_tile(turn));
      if (ahead < last) value_copy.copy(shared, shared0, value_tile(turn), places);
      cp_async_commit();
    }

    if (range == share) {
      load_queries<F>(shared + F::kQueryTile, p, sequence, batch, kv_head, row0, count);
      __syncthreads();
    }

    TileSoftmax<T, 1> softmax(1.f);
    ValueScales value_scales;
    Accumulators<1, F::DJ> o;
    clear(o);
    int turn = 0;
    for (int tile = first; tile < last; tile += kWarps, turn = turn + 1 < kAhead ? turn + 1 : 0) {
      const int ahead = tile + kAhead * kWarps;
      cp_async_wait<2 * kAhead - 1>();
      __syncwarp();  // these keys are there
      uint32_t keys = key_tile(turn);
      if constexpr (F::kQuantised) {
        widen<typename F::Cached, Operand>(p.format, shared + keys, shared + widened);
        keys = widened;
        __syncwarp();
      }
      Accumulators<1, F::NJ> s;
      clear(s);
      products.scores(s, keys);
      __syncwarp();  // these keys are read
      const TilePlaces places = places_in(ahead, page);
      page = page_in(ahead + kWarps);
      const Noted now = noted.push(note(places));
      if (ahead < last) key_copy.copy(shared, shared0, key_tile(turn), places);
      cp_async_commit();

      if constexpr (F::kQuantised) scale_columns(s, now.key_scale);
      const int tile0 = key0 + tile * kTile;
      rows.apply(s, tile0);
      const bool cut = !rows.all_see(tile0, tile0 + kTile);
      if (cut || now.there != 0xffff) rows.hide(s, tile0, now.there);

      cp_async_wait<2 * kAhead - 1>();
      __syncwarp();  // these values are there
      uint32_t values = value_tile(turn);
      if constexpr (F::kQuantised) {
        widen<typename F::Cached, Operand>(p.format, shared + values, shared + widened);
        values = widened;
        __syncwarp();
      }
      const OwnTile<Operand> whole;
      ValueGuard<Operand, typename F::Products, OwnTile<Operand>, 1> guard(whole, shared + values);
      const bool finite = !cut || __all_sync(kAllLanes, guard.finite());
      if (!finite) guard.see(s);
      softmax.step(s, o);
      if constexpr (F::kQuantised) value_scales.weigh(s, o, now.value_scale);
      if (!finite) {
        guard.add(o);
        __syncwarp();
        guard.clean();
        __syncwarp();
      }
      products.output(o, s, values);
      __syncwarp();  // these values are read
      if (ahead < last) value_copy.copy(shared, shared0, value_tile(turn), places);
      cp_async_commit();
    }
    cp_async_wait<0>();

    RowStatistics<float> statistics[1][2];
    softmax.finish(o, 1.f, statistics);
    if constexpr (F::kQuantised) value_scales.finish(o);
    __syncthreads();  // all tiles are read
    float2* const states = reinterpret_cast<float2*>(shared + F::kStates);
    UNROLL for (int h = 0; h < 2; ++h) {
      const int row = h * 8 + lane_index() / 4;
      UNROLL for (int j = 0; j < F::DJ; ++j) {
        unsigned char* const to = shared + warp * F::Part::kBytes + F::Part::element(row, F::Products::column(j, 0));
        *reinterpret_cast<float2*>(to) = make_float2(o[0][j][2 * h], o[0][j][2 * h + 1]);
      }
      const RowState state(statistics[0][h]);
      if (lane_index() % 4 == 0) states[warp * kDecodeRows + row] = make_float2(state.m, state.l);
    }
    __syncthreads();

    constexpr int kQuads = F::kColumns / 4;
    for (int i = threadIdx.x; i < count * kQuads; i += F::kThreads) {
      const int row = i / kQuads, column = i % kQuads * 4;
      if (column >= p.partial_columns) continue;
      const auto part = [&](int w) { return RowState(states[w * kDecodeRows + row].x, states[w * kDecodeRows + row].y); };
      RowState state;
      UNROLL for (int w = 0; w < kWarps; ++w) state.join(part(w));
      float4 out = make_float4(0.f, 0.f, 0.f, 0.f);
      UNROLL for (int w = 0; w < kWarps; ++w) {
        const unsigned char* const from = shared + w * F::Part::kBytes + F::Part::element(row, column);
        out = add_weighted(out, state.share(part(w)), *reinterpret_cast<const float4*>(from));
      }
      const DecodeRow at(shape, kv_head, row0 + row);
      const int64_t place = ((batch * shape.heads + at.head) * shape.query_len + at.query) * p.ranges + range;
      *reinterpret_cast<float4*>(p.partial_out + place * p.partial_columns + column) = out;
      if (column == 0) *reinterpret_cast<float2*>(p.partial_state + place * 2) = make_float2(state.m, state.l);
    }
    __syncthreads();  // the outputs are read
  }
}

}  // namespace attn_ext::cuda
