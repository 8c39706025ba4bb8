// Chooses the instruction set once, at the first use; isa_select() changes it for tests and comparisons.
#include <atomic>
#include <cstring>

#include "cpu/kernel_table.h"

namespace attn_ext::cpu {

extern const KernelTable baseline_kernels;
#if defined(__x86_64__)
extern const KernelTable avx2_kernels, avx512_kernels, avx512_bf16_kernels;
#endif

namespace {

struct Entry {
  const char* name;
  const KernelTable* kernels;
};

constexpr Entry entries[kIsaCount] = {
    {"baseline", &baseline_kernels},
#if defined(__x86_64__)
    {"avx2", &avx2_kernels},
    {"avx512", &avx512_kernels},
    {"avx512_bf16", &avx512_bf16_kernels},
#else
    {"avx2", nullptr},
    {"avx512", nullptr},
    {"avx512_bf16", nullptr},
#endif
};

#if defined(__x86_64__)
// __builtin_cpu_supports also asks the operating system whether it saves the wide registers.
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif

std::atomic<int> current{-1};

}  // namespace

const char* isa_name(Isa isa) { return entries[static_cast<int>(isa)].name; }

bool isa_from_name(const char* name, Isa* isa) {
  for (int i = 0; i < kIsaCount; i++) {
    if (std::strcmp(name, entries[i].name) == 0) {
      *isa = static_cast<Isa>(i);
      return true;
    }
  }
  return false;
}

bool isa_compiled(Isa isa) { return entries[static_cast<int>(isa)].kernels != nullptr; }

bool isa_supported(Isa isa) {
  if (!isa_compiled(isa)) return false;
#if defined(__x86_64__)
  __builtin_cpu_init();
  switch (isa) {
    case Isa::baseline: return true;
    case Isa::avx2: return has_avx2();
    case Isa::avx512: return has_avx512();
    case Isa::avx512_bf16: return has_avx512_bf16();
  }
#endif
  return isa == Isa::baseline;
}

Isa isa_best() {
#if defined(__x86_64__)
  // vdpbf16ps does twice the work of an fp32 FMA.  AMD starts one whenever it could start an FMA; Intel needs four
  // times as long (measured on Sapphire Rapids: 110 against 185 GFLOP/s), so that there bf16 is widened to fp32.
  __builtin_cpu_init();
  const Isa widest = __builtin_cpu_is("amd") ? Isa::avx512_bf16 : Isa::avx512;
  for (int i = static_cast<int>(widest); i > 0; i--) {
    if (isa_supported(static_cast<Isa>(i))) return static_cast<Isa>(i);
  }
#endif
  return Isa::baseline;
}

Isa isa_current() {
  int isa = current.load(std::memory_order_relaxed);
  if (isa < 0) {
    isa = static_cast<int>(isa_best());
    current.store(isa, std::memory_order_relaxed);
  }
  return static_cast<Isa>(isa);
}

bool isa_select(Isa isa) {
  if (!isa_supported(isa)) return false;
  current.store(static_cast<int>(isa), std::memory_order_relaxed);
  return true;
}

const KernelTable& kernel_table() {
  struct Tables {
    KernelTable of[kIsaCount] = {};
    Tables() {
      for (int i = 0; i < kIsaCount; i++) {
        if (!entries[i].kernels) continue;
        of[i] = *entries[i].kernels;
        for (int dtype = 0; dtype < kComputeDTypes; dtype++) {
          if (!of[i].forward[dtype]) of[i].forward[dtype] = of[i - 1].forward[dtype];
          if (!of[i].backward[dtype]) of[i].backward[dtype] = of[i - 1].backward[dtype];
          if (!of[i].decode[dtype]) of[i].decode[dtype] = of[i - 1].decode[dtype];
        }
      }
    }
  };
  static const Tables tables;
  return tables.of[static_cast<int>(isa_current())];
}

}  // namespace attn_ext::cpu
