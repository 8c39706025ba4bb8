// The operators, as torch reads them.
#pragma once

// What the operators that know everything share.
#define ATTN_EXT_OPTIONS                                                                                         \
  "Tensor? bias, Tensor? sinks, Tensor? mask, Tensor? key_ranges, Tensor? query_segments, Tensor? kv_segments, " \
  "Tensor? alibi_slopes, Tensor? alibi_positions, Tensor? dropout_seed, Tensor? block_offsets, "                 \
  "Tensor? block_indices, Tensor? block_tiles, Tensor? block_bits, float scale, float softcap, float dropout_p, " \
  "SymInt? band_lower, SymInt? band_upper"

namespace attn_ext::bindings {

constexpr const char* kAttentionForward = "attention_forward(Tensor query, Tensor key, Tensor value, " ATTN_EXT_OPTIONS
                                          ") -> (Tensor out, Tensor lse, Tensor lse_residual)";

constexpr const char* kAttentionOutput =
    "attention_output(Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? mask, Tensor? key_ranges, "
    "float scale, SymInt? band_lower, SymInt? band_upper) -> Tensor";

// Gradients that are not wanted are tensors without elements.
constexpr const char* kAttentionBackward =
    "attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor out, "
    "Tensor lse, Tensor lse_residual, " ATTN_EXT_OPTIONS
    ", bool wants_grad_bias, bool wants_grad_sinks) -> "
    "(Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_bias, Tensor grad_sinks)";

constexpr const char* kAttentionDecode =
    "attention_decode(Tensor query, Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor cache_seqlens, "
    "Tensor? block_table, Tensor? new_key, Tensor? new_value, Tensor? rotary_cos, Tensor? rotary_sin, Tensor? key_scale, "
    "Tensor? value_scale, Tensor? alibi_slopes, Tensor? sinks, float scale, float softcap, bool rotary_interleaved, "
    "SymInt? window_left, SymInt? num_splits) -> (Tensor out, Tensor lse)";

// Why no kernel of this device does a call, differentiated so many times; empty: one does.  Tensors are on the meta device, with
// the sizes and strides of those of the call.
constexpr const char* kAttentionSupport = "attention_support(Tensor query, Tensor key, Tensor value, " ATTN_EXT_OPTIONS
                                          ", bool wants_grad_bias, bool wants_grad_sinks, int derivatives, int device) -> str";

constexpr const char* kDecodeSupport =
    "decode_support(Tensor query, Tensor key_cache, Tensor value_cache, Tensor cache_seqlens, Tensor? block_table, "
    "Tensor? new_key, Tensor? new_value, Tensor? rotary_cos, Tensor? rotary_sin, Tensor? key_scale, Tensor? value_scale, "
    "Tensor? alibi_slopes, Tensor? sinks, float scale, float softcap, bool rotary_interleaved, SymInt? window_left, "
    "SymInt? num_splits, int device) -> str";

constexpr const char* kDropoutMask =
    "dropout_mask(Tensor dropout_seed, float dropout_p, SymInt batch, SymInt heads, SymInt query_begin, "
    "SymInt query_end, SymInt kv_len) -> Tensor";

}  // namespace attn_ext::bindings
