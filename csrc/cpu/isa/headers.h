// Whatever the kernels include, included before any target region opens: inside one, functions of these headers would
// be compiled for an instruction set that not every caller of the same inline function has.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>
#if defined(__x86_64__)
#if defined(__clang__)
#error "on x86-64 attn_ext needs GCC: clang knows no GCC target regions"
#elif __GNUC__ < 12
#error "attn_ext needs GCC 12 or later"
#endif
// GCC's AVX-512 intrinsics leave masked-off lanes undefined on purpose, and GCC 12 warns about it where they are inlined.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "core/dtype.h"
#include "core/mask.h"
#include "core/params.h"
#include "cpu/kernel_table.h"
#include "cpu/parallel.h"
#include "cpu/workspace.h"
