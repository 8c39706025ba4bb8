// Makes a line of core/variants.def a kernel.
#pragma once
#include "cuda/backward_instance.cuh"
#include "cuda/flash_query_gradient.cuh"

#define QUERY_GRADIENT(name, ...) ATTN_EXT_BACKWARD_VARIANT(query_gradient, name, QueryGradientTraits, __VA_ARGS__)
