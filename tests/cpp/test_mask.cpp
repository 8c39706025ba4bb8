// Masks as intervals, and tile classes, against a brute-force look at every (query, key) pair.
#include "core/mask.h"

#include <initializer_list>

#include "check.h"

using namespace attn_ext;

namespace {

bool is_visible(const MaskParams& mask, const AttentionShape& shape, int64_t i, int64_t j) {
  if (j >= shape.kv_len) return false;
  if (mask.key_ranges.data && (j < mask.key_ranges.data[0] || j >= mask.key_ranges.data[1])) return false;
  const __int128 difference = static_cast<__int128>(j) - i;  // bands may be any int64
  return difference >= mask.band_lower && difference <= mask.band_upper;
}

void compare(const MaskParams& mask, const AttentionShape& shape) {
  for (int64_t i = 0; i < shape.query_len; i++) {
    const KeyInterval keys = visible_keys(mask, shape, 0, i);
    CHECK(0 <= keys.lo && keys.lo <= keys.hi && keys.hi <= shape.kv_len, "query %ld: [%ld, %ld)", i, keys.lo, keys.hi);
    for (int64_t j = 0; j < shape.kv_len; j++) {
      CHECK(keys.contains(j) == is_visible(mask, shape, i, j), "query %ld key %ld of %ld x %ld", i, j, shape.query_len,
            shape.kv_len);
    }
  }
  for (int64_t first = 0; first < shape.query_len; first += 3) {
    for (int64_t last = first + 1; last <= shape.query_len && last <= first + 6; last++) {
      TileKeys tile = TileKeys::of(visible_keys(mask, shape, 0, first));
      for (int64_t i = first + 1; i < last; i++) tile.add(visible_keys(mask, shape, 0, i));
      for (int64_t begin = 0; begin < shape.kv_len; begin += 2) {
        for (int64_t end = begin + 1; end <= shape.kv_len && end <= begin + 5; end++) {
          bool any = false, all = true;
          for (int64_t i = first; i < last; i++) {
            for (int64_t j = begin; j < end; j++) {
              any |= is_visible(mask, shape, i, j);
              all &= is_visible(mask, shape, i, j);
            }
          }
          // Skipping and taking whole must be right; a tile between two windows may be called partial.
          const TileClass tile_class = tile.classify(begin, end);
          CHECK(tile_class != TileClass::skip || !any, "queries [%ld, %ld) keys [%ld, %ld)", first, last, begin, end);
          CHECK((tile_class == TileClass::full) == all, "queries [%ld, %ld) keys [%ld, %ld)", first, last, begin, end);
        }
      }
    }
  }
}

}  // namespace

int main() {
  const std::initializer_list<int64_t> bounds = {MaskParams::no_lower, MaskParams::no_lower + 1, -20, -7, -3, -1, 0, 1, 4, 11,
                                                 20, MaskParams::no_upper - 1, MaskParams::no_upper};
  for (int64_t query_len : {1, 5, 13}) {
    for (int64_t kv_len : {0, 1, 4, 17}) {
      AttentionShape shape;
      shape.batch = shape.heads = shape.kv_heads = 1;
      shape.query_len = query_len;
      shape.kv_len = kv_len;
      for (int64_t lower : bounds) {
        for (int64_t upper : bounds) {
          MaskParams mask;
          mask.band_lower = lower;
          mask.band_upper = upper;
          compare(mask, shape);
          for (int64_t begin : {int64_t{0}, int64_t{2}}) {
            for (int64_t end : {int64_t{-2}, int64_t{0}, int64_t{3}, kv_len, kv_len + 5}) {
              const int64_t range[2] = {begin, end};
              mask.key_ranges.data = range;
              compare(mask, shape);
            }
          }
        }
      }
    }
  }
  return check::result();
}
