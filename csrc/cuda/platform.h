// CUDA C++ for nvcc, or for the emulator that runs kernels on the host (emulation/emulator.h).
#pragma once
#ifdef ATTN_EXT_EMULATE
#include "emulation/emulator.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define DYN_SMEM(name) extern __shared__ __align__(1024) unsigned char name[]
#endif

#define DEVICE __device__ __forceinline__
#define UNROLL _Pragma("unroll")
