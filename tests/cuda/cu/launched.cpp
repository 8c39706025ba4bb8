// torch.ops.attn_ext_launched.*: operators of CPU tensors that call a function of the test as bindings/cuda.cpp calls a
// kernel.
#include <vector>

#include "bindings/aligned_forward.h"
#include "bindings/launch_memory.h"

namespace attn_ext {
namespace {

struct Memory {
  void* address;
  int64_t bytes;
  int64_t is_result;
};
// Whether it ran.
using Kernel = bool (*)(const ForwardParams*, int64_t params_bytes, const Memory*, int64_t count);
Kernel kernel = nullptr;

}  // namespace

// The test knows which kernel it launches.
const char* cuda::unsupported(const ForwardParams&, const Device&) { return nullptr; }

namespace bindings {
namespace {

struct Launched {
  static constexpr Contents kContents = Contents::unchecked;

  static void check_query(const Tensor& query) { check_cpu(query, "query"); }
  static void run(Inputs& inputs, ForwardParams& params, ForwardResults& results) {
    run_aligned(inputs, params, results, {}, [&](const ForwardParams& aligned, const ForwardResults& to) {
      std::vector<Memory> memory;
      for_launch_memory(inputs, to, [&](void* address, int64_t bytes, bool is_result) {
        memory.push_back({address, bytes, is_result});
      });
      const auto count = static_cast<int64_t>(memory.size());
      STD_TORCH_CHECK(kernel(&aligned, sizeof aligned, memory.data(), count), "the launch failed");
    });
  }
};

}  // namespace
}  // namespace bindings
}  // namespace attn_ext

extern "C" void attn_ext_launched_by(attn_ext::Kernel function) { attn_ext::kernel = function; }

STABLE_TORCH_LIBRARY(attn_ext_launched, library) {
  library.def(attn_ext::bindings::kAttentionForward);
  library.def(attn_ext::bindings::kAttentionOutput);
}

STABLE_TORCH_LIBRARY_IMPL(attn_ext_launched, CPU, library) {
  attn_ext::bindings::implement_forward<attn_ext::bindings::Launched>(library);
}
