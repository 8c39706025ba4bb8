// Which arithmetic multiplies tiles of a type.
#pragma once
#include "cuda/fma.cuh"
#include "cuda/mma.cuh"

namespace attn_ext::cuda {

template <class T>
using TileMath = std::conditional_t<std::is_same_v<T, float>, FmaMath, MmaMath<T>>;

}  // namespace attn_ext::cuda
