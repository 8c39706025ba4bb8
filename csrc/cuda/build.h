// What nvcc compiled the kernels for.
#pragma once

namespace attn_ext::cuda {

struct Build {
  static constexpr int kMaxArchs = 16;
  int major, minor;      // of CUDA
  int archs[kMaxArchs];  // 10 * compute capability, then 0
};

// In extensions without CUDA its address is null.
[[gnu::weak, gnu::visibility("hidden")]] extern const Build kBuild;

}  // namespace attn_ext::cuda
