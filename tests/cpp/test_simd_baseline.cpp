#include "check.h"
#include "cpu/isa/headers.h"

#define ATTN_EXT_VECTOR_BYTES 16
#include "core/dropout.h"
#include "core/online_softmax.h"
#include "cpu/simd.h"
#include "simd_checks.inl"

int main() { return attn_ext::cpu::check_all(); }
