// What the lines of core/variants.def for the backward pass have in common.
#pragma once
#include "cuda/launch.cuh"

namespace attn_ext::cuda {

template <class F>
constexpr bool is_modified() {
  if constexpr (requires { F::kModified; }) return F::kModified;
  else return true;
}
template <class F>
constexpr KeyOutputs outputs_of() {
  if constexpr (requires { F::kOfKey; }) {
    return F::kOfKey && F::kOfValue ? KeyOutputs::both : F::kOfKey ? KeyOutputs::key : KeyOutputs::value;
  } else {
    return KeyOutputs::both;
  }
}

template <class F, auto kKernel>
constexpr BackwardVariant backward_variant_of(const char* name) {
  return {.name = name,
          .dtype = dtype_of<typename F::T>(),
          .key_columns = F::Key::kColumns,
          .value_columns = F::Value::kColumns,
          .queries = F::M,
          .keys = F::N,
          .shared_bytes = F::kSharedBytes,
          .modified = is_modified<F>(),
          .outputs = outputs_of<F>(),
          .launch = [](const BackwardArguments& arguments, int64_t blocks, const Stream& stream, const BackwardVariant& variant) {
            launch<kKernel>(variant.name, blocks, F::kThreads, F::kSharedBytes, stream, arguments);
          }};
}

}  // namespace attn_ext::cuda

#define ATTN_EXT_BACKWARD_VARIANT(kind, name, Traits, ...)                                                        \
  namespace attn_ext::cuda {                                                                                      \
  using Of_##name = Traits<__VA_ARGS__>;                                                                          \
  extern const BackwardVariant kind##_##name;                                                                     \
  constexpr BackwardVariant kind##_##name = backward_variant_of<Of_##name, flash_##kind<Of_##name>>("flash_" #kind "_" #name); \
  }
