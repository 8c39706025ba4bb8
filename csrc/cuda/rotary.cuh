// Numbers whose dtype is known when the kernel runs, and the rotary embedding of rows of them.
#pragma once
#include "core/params.h"
#include "cuda/ptx.cuh"

namespace attn_ext::cuda {

DEVICE float load_number(const void* data, DType dtype, int64_t at) {
  if (dtype == DType::float16) return to_float(static_cast<const Float16*>(data)[at]);
  if (dtype == DType::bfloat16) return to_float(static_cast<const BFloat16*>(data)[at]);
  return static_cast<const float*>(data)[at];
}
DEVICE void store_number(void* data, DType dtype, int64_t at, float x) {
  if (dtype == DType::float16) static_cast<Float16*>(data)[at] = from_float<Float16>(x);
  else if (dtype == DType::bfloat16) static_cast<BFloat16*>(data)[at] = from_float<BFloat16>(x);
  else static_cast<float*>(data)[at] = x;
}

// A column of a row that is turned by the angles of `position`; row(column) reads it as it was.
template <class Row>
DEVICE float turned(const DecodeParams::Rotary& rotary, int position, int column, const Row& row) {
  const int half = static_cast<int>(rotary.half);
  if (!rotary.cos.data || position < 0 || column >= 2 * half) return row(column);
  const bool second = rotary.interleaved ? column % 2 : column >= half;
  const int apart = rotary.interleaved ? 1 : half, first = second ? column - apart : column;
  const int64_t angle = static_cast<int64_t>(position) * half + (rotary.interleaved ? first / 2 : first);
  const float cos = load_number(rotary.cos.data, rotary.dtype, angle), sin = load_number(rotary.sin.data, rotary.dtype, angle);
  const float a = row(first), b = row(first + apart);
  return second ? b * cos + a * sin : a * cos - b * sin;
}

}  // namespace attn_ext::cuda
