// The selectors of cuda/ say of each call whether there is a kernel; here that becomes an exception.
#pragma once
#include <stdexcept>
#include <string>

#include "cuda/kernels.h"

namespace attn_ext::bindings {

// Python makes a NotImplementedError of it, which it knows by these words: torch has none that crosses its stable ABI.
struct Unsupported : std::runtime_error {
  explicit Unsupported(const std::string& reason) : std::runtime_error("attention on CUDA: " + reason), reason(reason) {}
  std::string reason;
};

template <class Params>
void check_supported(const Params& params, const cuda::Device& device) {
  if (const char* reason = cuda::unsupported(params, device)) throw Unsupported(reason);
}

}  // namespace attn_ext::bindings
