// ldmatrix and mma.sync: which lane holds which element.  (PTX ISA, "Warp-level matrix instructions")
//
// With g = lane / 4 and t = lane % 4, an accumulator of 16 x 8 has element i at row g + 8 (i / 2), column 2t + i % 2.
// Its factors are exact in fp64, where they are summed: the rounding inside a tensor core is not modelled.
#include <cstring>

#include "emulation/collective.h"
#include "emulation/emulator.h"
#include "emulation/shared_memory.h"

namespace attn_ext::emulation {
namespace {

struct Loaded {
  const unsigned char* row;
  uint32_t* out;
};
struct Product {
  float* d;
  const uint32_t *a, *b;
  const float* c;
};

float element(El type, uint32_t pair, int half) {
  const auto bits = static_cast<uint16_t>(pair >> (16 * half));
  if (type == El::bf16) return narrow<float>(static_cast<uint32_t>(bits) << 16);
  return static_cast<float>(narrow<_Float16>(bits));
}
float tf32(uint32_t bits) { return narrow<float>(bits & ~0x1fffu); }  // 10 bits of mantissa; the others are not read

typedef double Row __attribute__((vector_size(8 * sizeof(double))));

// d = a (16 x K) * b (K x 8) + c of the whole warp.
template <int K, class Unpack>
void multiply(Collective& all, const Unpack& unpack) {
  double a[16][K];
  Row b[K], d[16];
  for (int lane = 0; lane < kLanes; lane++) {
    const auto& p = *static_cast<const Product*>(all.arguments[lane]);
    unpack(p, lane / 4, lane % 4, a, b);
    for (int i = 0; i < 4; i++) d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2] = p.c[i];
  }
  for (int i = 0; i < 16; i++) {
    for (int k = 0; k < K; k++) d[i] += a[i][k] * b[k];
  }
  for (int lane = 0; lane < kLanes; lane++) {
    const auto& p = *static_cast<const Product*>(all.arguments[lane]);
    for (int i = 0; i < 4; i++) p.d[i] = static_cast<float>(d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2]);
  }
}

// 16-bit elements: a register of A is a pair of columns of row g or g + 8, one of B a pair of rows of column g.
template <int K>
void multiply_pairs(Collective& all, El type) {
  multiply<K>(all, [type](const Product& p, int g, int t, double (&a)[16][K], Row(&b)[K]) {
    for (int i = 0; i < K / 2; i++) a[g + i / 2 % 2 * 8][t * 2 + i % 2 + i / 4 * 8] = element(type, p.a[i / 2], i % 2);
    for (int i = 0; i < K / 4; i++) b[t * 2 + i % 2 + i / 2 * 8][g] = element(type, p.b[i / 2], i % 2);
  });
}

void multiply_tf32(Collective& all) {
  multiply<8>(all, [](const Product& p, int g, int t, double (&a)[16][8], Row(&b)[8]) {
    for (int i = 0; i < 4; i++) a[g + i % 2 * 8][t + i / 2 * 4] = tf32(p.a[i]);
    for (int i = 0; i < 2; i++) b[t + i * 4][g] = tf32(p.b[i]);
  });
}

template <class Complete>
void whole_warp(int operation, Site site, void* argument, const Complete& complete) {
  if (warp_of(*current).present != kAllLanes) {
    report("warp mask", site, "the warp of thread %d has fewer than 32 lanes", current->id);
    stop_block();
  }
  collective(operation, kAllLanes, site, argument, complete);
}

}  // namespace

void ldmatrix(int matrices, bool transposed, uint32_t address, uint32_t* out) {
  const Site site = ATTN_EXT_SITE;
  Loaded mine{nullptr, out};
  if (current->lane < matrices * 8) {
    mine.row = shared_pointer(address, 16, site);
    if (address % 16) {
      report("misaligned access", site, "thread %d: ldmatrix of a row at %u", current->id, address);
      stop_block();
    }
    shared_read_for_warp(shared_offset(reinterpret_cast<uintptr_t>(mine.row)), 16, site);
  }
  whole_warp(kLdmatrix + matrices * 2 + transposed, site, &mine, [=](Collective& all) {
    counters.ldmatrix++;
    for (int m = 0; m < matrices; m++) {
      uint16_t matrix[8][8];
      for (int r = 0; r < 8; r++) std::memcpy(matrix[r], static_cast<Loaded*>(all.arguments[m * 8 + r])->row, 16);
      for (int lane = 0; lane < kLanes; lane++) {
        const int r = lane / 4, c = lane % 4 * 2;
        const uint32_t low = transposed ? matrix[c][r] : matrix[r][c];
        const uint32_t high = transposed ? matrix[c + 1][r] : matrix[r][c + 1];
        static_cast<Loaded*>(all.arguments[lane])->out[m] = low | high << 16;
      }
    }
  });
}

void mma_m16n8k16(El ab, float* d, const uint32_t* a, const uint32_t* b, const float* c) {
  Product mine{d, a, b, c};
  whole_warp(kMma + static_cast<int>(ab), ATTN_EXT_SITE, &mine, [ab](Collective& all) {
    counters.mma_m16n8k16++;
    multiply_pairs<16>(all, ab);
  });
}

void mma_m16n8k8(El ab, float* d, const uint32_t* a, const uint32_t* b, const float* c) {
  Product mine{d, a, b, c};
  whole_warp(kMma + 8 + static_cast<int>(ab), ATTN_EXT_SITE, &mine, [ab](Collective& all) {
    counters.mma_m16n8k8++;
    ab == El::tf32 ? multiply_tf32(all) : multiply_pairs<8>(all, ab);
  });
}

}  // namespace attn_ext::emulation
