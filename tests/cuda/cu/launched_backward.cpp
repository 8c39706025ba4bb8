// torch.ops.attn_ext_launched_backward.*: gradients of CPU tensors by a function of the test, which is called as
// bindings/cuda.cpp calls the kernels.
#include <vector>

#include "bindings/aligned_backward.h"
#include "bindings/launch_memory.h"

namespace attn_ext {
namespace {

struct Memory {
  void* address;
  int64_t bytes;
  int64_t is_result;
};
using Workspace = int64_t (*)(const BackwardParams*);
// Whether they ran.
using Kernels = bool (*)(const BackwardParams*, void* workspace, const Memory*, int64_t count);
Workspace workspace_of = nullptr;
Kernels kernels = nullptr;

}  // namespace

// The test knows which kernels it launches.
const char* cuda::unsupported(const BackwardParams&, const Device&) { return nullptr; }
int64_t cuda::backward_workspace(const BackwardParams& params, const Device&) { return workspace_of(&params); }

namespace bindings {
namespace {

struct Launched {
  static constexpr Contents kContents = Contents::unchecked;

  static void check_query(const Tensor& query) { check_cpu(query, "query"); }
  static void run(Inputs& inputs, BackwardParams& params, BackwardTensors& tensors) {
    run_aligned(inputs, params, tensors, {}, [&](const BackwardParams& aligned, const BackwardTensors& to, const Tensor& workspace) {
      std::vector<Memory> memory;
      for_launch_memory(inputs, to, workspace, [&](void* address, int64_t bytes, bool is_result) {
        memory.push_back({address, bytes, is_result});
      });
      const auto count = static_cast<int64_t>(memory.size());
      STD_TORCH_CHECK(kernels(&aligned, workspace.data(), memory.data(), count), "the launch failed");
    });
  }
};

}  // namespace
}  // namespace bindings
}  // namespace attn_ext

extern "C" void attn_ext_launched_backward_by(attn_ext::Workspace workspace, attn_ext::Kernels function) {
  attn_ext::workspace_of = workspace, attn_ext::kernels = function;
}

STABLE_TORCH_LIBRARY(attn_ext_launched_backward, library) { library.def(attn_ext::bindings::kAttentionBackward); }

STABLE_TORCH_LIBRARY_IMPL(attn_ext_launched_backward, CPU, library) {
  attn_ext::bindings::implement_backward<attn_ext::bindings::Launched>(library);
}
