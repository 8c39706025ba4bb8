// Code in core/ compiles for the host and, unchanged, for a GPU.
#pragma once

#if defined(__CUDACC__)
#define ATTN_HD __host__ __device__ __forceinline__
#else
// Always inlined: the vector kernels of every instruction set use these functions, and an out-of-line copy
// would be compiled for whichever instruction set the linker happened to keep.
#define ATTN_HD inline __attribute__((always_inline))
#endif
