// Everything tests/cuda/test_ptxrun.py runs on sm_80, right kernels and wrong ones.
#include <cstdio>

#include "block.cuh"
#include "matrix.cu"
#include "product.cuh"
#include "scalar.cuh"
