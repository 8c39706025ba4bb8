// torch.ops.attn_ext_launched_decode.*: an operator of CPU tensors that calls a function of the test as bindings/cuda.cpp
// calls the kernels.
#include <vector>

#include "bindings/decode_launch.h"

namespace attn_ext {
namespace {

struct Memory {
  void* address;
  int64_t bytes;
  int64_t use;
};
struct Grid {
  int64_t append, decode, merge;  // blocks
};
// Whether it ran.
using Kernels = bool (*)(const DeviceDecodeParams*, int64_t params_bytes, const Memory*, int64_t count, const Grid*);
Kernels kernels = nullptr;

}  // namespace

// The test knows which kernel it launches.
const char* cuda::unsupported(const DecodeParams&, const Device&) { return nullptr; }

namespace bindings {
namespace {

struct Launched {
  static constexpr Contents kContents = Contents::unchecked;

  static void check_query(const Tensor& query) { check_cpu(query, "query"); }
  static void run_decode(DecodeInputs& inputs, DeviceDecodeParams& params, DecodeResults& results) {
    run_planned(inputs, params, {.processors = 4}, [&](const DeviceDecodeParams& p, const DecodeWorkspace& workspace) {
      std::vector<Memory> memory;
      for_decode_memory(inputs, p, results, workspace, [&](void* address, int64_t bytes, MemoryUse use) {
        memory.push_back({address, bytes, static_cast<int64_t>(use)});
      });
      const AttentionShape& shape = p.shape;
      const Grid grid{.append = shape.batch * shape.kv_heads * shape.kv_len,
                      .decode = shape.batch * shape.kv_heads * cuda::decode_row_blocks(p) * p.blocks,
                      .merge = cuda::ceil_div<int64_t>(shape.batch * shape.heads * shape.query_len, 4)};
      const auto count = static_cast<int64_t>(memory.size());
      STD_TORCH_CHECK(kernels(&p, sizeof p, memory.data(), count, &grid), "the launch failed");
    });
  }
};

}  // namespace
}  // namespace bindings
}  // namespace attn_ext

extern "C" void attn_ext_launched_decode_by(attn_ext::Kernels functions) { attn_ext::kernels = functions; }

STABLE_TORCH_LIBRARY(attn_ext_launched_decode, library) { library.def(attn_ext::bindings::kAttentionDecode); }

STABLE_TORCH_LIBRARY_IMPL(attn_ext_launched_decode, CPU, library) {
  library.impl("attention_decode", attn_ext::bindings::attention_decode<attn_ext::bindings::Launched>);
}
