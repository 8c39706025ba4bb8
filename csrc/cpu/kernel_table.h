// What an instruction set exports: one function per operation and dtype.
#pragma once
#include "core/params.h"
#include "cpu/executor.h"

namespace attn_ext::cpu {

// A null function stands for that of the next lower instruction set.
struct KernelTable {
  using Forward = void (*)(const ForwardParams&, const Executor&);
  using Backward = void (*)(const BackwardParams&, const Executor&);
  using Decode = void (*)(const DecodeParams&, const Executor&);
  Forward forward[kComputeDTypes];    // indexed by DType
  Backward backward[kComputeDTypes];  // indexed by DType
  Decode decode[kComputeDTypes];      // indexed by DType
};

// In the order of preference: a later one needs everything an earlier one needs.
enum class Isa : int { baseline, avx2, avx512, avx512_bf16 };
constexpr int kIsaCount = 4;

const char* isa_name(Isa isa);
bool isa_compiled(Isa isa);   // was it built into this library (x86-64 only, beyond the baseline)?
bool isa_supported(Isa isa);  // compiled, and this processor and operating system can run it
Isa isa_best();               // the fastest supported one: not always the last, see dispatch.cpp
Isa isa_current();            // what kernel_table() uses
bool isa_select(Isa isa);     // false, and no change, when it is not supported
bool isa_from_name(const char* name, Isa* isa);

const KernelTable& kernel_table();

}  // namespace attn_ext::cpu
