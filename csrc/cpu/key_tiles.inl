// Keys and values of the forward pass, a tile at a time, as its products want them.
namespace attn_ext::cpu {
namespace {

template <class Arith>
struct ForwardTile {
  using Acc = typename Arith::Acc;
  static constexpr int kLaneGroups = 4;                                // of kGroupLanes queries each
  static constexpr int kQueries = kLaneGroups * kGroupLanes<Acc>;
  static constexpr int kMaxKeys = 192 * Arith::kPerWord;               // scores of a group stay in L1, K and V in L2
};

// Tiles of equal length, as a short last one would leave its row blocks half empty; or of whole listed blocks.
INLINE int64_t keys_per_tile(int64_t kv_len, const MaskParams::BlockLists& blocks, int64_t most) {
  if (blocks.offsets && kv_len > blocks.kv_block) return keys_of_blocks(blocks.kv_block, most);
  return round_up(div_up(max_i64(1, kv_len), max_i64(1, div_up(kv_len, most))), kMaxRows);
}

// Whether numbers are finite, as far as anyone has looked.
enum class Finite : uint8_t { unknown, yes, no };

// A tile of keys as the products want it.  Rows from the last key on, up to a multiple of kRowQuantum, are zeros.
template <class Word>
struct KeyTile {
  const Word *k, *v;         // [rows][k_row], [rows / numbers per word][v_row]
  int64_t k_row, v_row;      // in words
  int64_t begin;
  int rows;
  Finite* value_is_finite;   // of the whole tile that these are rows of; shared by threads
};

// The rows [first, last) of a tile; multiples of kRowQuantum.
template <class Arith>
INLINE KeyTile<typename Arith::Word> rows_of(KeyTile<typename Arith::Word> tile, int first, int last) {
  tile.k += first * tile.k_row;
  tile.v += first / Arith::kPerWord * tile.v_row;
  tile.begin += first;
  tile.rows = last - first;
  return tile;
}

// Hands out tiles of keys: from the tensors themselves where their layout allows it, else from packed copies.
template <class Arith, class T>
struct KeyTiles {
  using Word = typename Arith::Word;
  const ForwardParams& p;
  const int64_t k_words = div_up(p.shape.head_dim, Arith::kPerWord);
  const int64_t v_columns = round_up(p.shape.value_dim, kRowQuantum);
  const int64_t keys = keys_per_tile(p.shape.kv_len, p.mask.blocks, ForwardTile<Arith>::kMaxKeys);
  const int64_t tiles = div_up(p.shape.kv_len, keys);
  const bool natural = std::is_same_v<T, Word> && v_columns == p.shape.value_dim;
  const bool checks_finite = may_hide_keys(p);

  struct Store {  // packed tiles
    Word *k, *v;
    Finite* finite;
    void take(Pieces& pieces, const KeyTiles& t, int64_t tiles) {
      k = pieces.take<Word>(tiles * t.keys * t.k_words);
      v = pieces.take<Word>(tiles * t.keys / Arith::kPerWord * t.v_columns);
      finite = pieces.take<Finite>(tiles);
    }
  };

  int valid_keys(int64_t tile) const { return static_cast<int>(min_i64(keys, p.shape.kv_len - tile * keys)); }
  KeyTile<Word> packed(const Store& store, int64_t slot, int64_t tile) const {
    return {store.k + slot * keys * k_words, store.v + slot * keys / Arith::kPerWord * v_columns, k_words, v_columns,
            tile * keys, static_cast<int>(round_up(valid_keys(tile), kRowQuantum)), store.finite + slot};
  }
  void pack(const Store& store, int64_t slot, int64_t batch, int64_t kv_head, int64_t tile) const {
    const int valid = valid_keys(tile), rows = static_cast<int>(round_up(valid, kRowQuantum));
    const T* k = row_pointer<T>(p.key, batch, kv_head, tile * keys);
    const T* v = row_pointer<T>(p.value, batch, kv_head, tile * keys);
    Word* k_out = store.k + slot * keys * k_words;
    for (int r = 0; r < rows; r++) load_row(k_out + r * k_words, k + r * p.key.stride_row, r < valid ? p.shape.head_dim : 0, k_words);
    load_word_rows<Arith::kPerWord>(store.v + slot * keys / Arith::kPerWord * v_columns, v, p.value.stride_row, valid, rows,
                       p.shape.value_dim, v_columns);
    store.finite[slot] = Finite::unknown;
  }
  // Looked at when it first matters.
  bool values_are_finite(const KeyTile<Word>& rows, int64_t batch, int64_t kv_head) const {
    if (!checks_finite) return true;
    Finite known;
    __atomic_load(rows.value_is_finite, &known, __ATOMIC_RELAXED);
    if (known == Finite::unknown) {
      const int64_t tile = rows.begin / keys;
      const T* v = row_pointer<T>(p.value, batch, kv_head, tile * keys);
      known = rows_are_finite(v, p.value.stride_row, valid_keys(tile), p.shape.value_dim) ? Finite::yes : Finite::no;
      __atomic_store(rows.value_is_finite, &known, __ATOMIC_RELAXED);
    }
    return known == Finite::yes;
  }
  // Without packed copies of the whole head: in place, or through slot 0 of a store of one tile.  `finite`: of each tile
  // of the head.
  KeyTile<Word> fetch(const Store& scratch, Finite* finite, int64_t batch, int64_t kv_head, int64_t tile) const {
    const int valid = valid_keys(tile);
    if (natural && valid % kRowQuantum == 0) {
      const T* k = row_pointer<T>(p.key, batch, kv_head, tile * keys);
      const T* v = row_pointer<T>(p.value, batch, kv_head, tile * keys);
      return {reinterpret_cast<const Word*>(k), reinterpret_cast<const Word*>(v), p.key.stride_row, p.value.stride_row,
              tile * keys, valid, finite + tile};
    }
    pack(scratch, 0, batch, kv_head, tile);
    return packed(scratch, 0, tile);
  }
};

}  // namespace
}  // namespace attn_ext::cpu
