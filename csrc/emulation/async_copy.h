#pragma once
#include "emulation/block.h"

namespace attn_ext::emulation {
#pragma GCC visibility push(hidden)

void finish_copies(Thread& thread);  // that ends

#pragma GCC visibility pop
}  // namespace attn_ext::emulation
