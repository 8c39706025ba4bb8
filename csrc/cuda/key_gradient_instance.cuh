// Makes a line of core/variants.def a kernel.
#pragma once
#include "cuda/backward_instance.cuh"
#include "cuda/flash_key_gradient.cuh"

#define KEY_GRADIENT(name, ...) ATTN_EXT_BACKWARD_VARIANT(key_gradient, name, KeyGradientTraits, __VA_ARGS__)
