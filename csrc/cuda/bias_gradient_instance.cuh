// Makes a line of core/variants.def a kernel.
#pragma once
#include "cuda/backward_instance.cuh"
#include "cuda/flash_bias_gradient.cuh"

#define BIAS_GRADIENT(name, ...) ATTN_EXT_BACKWARD_VARIANT(bias_gradient, name, BiasGradientTraits, __VA_ARGS__)
