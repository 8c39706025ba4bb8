// torch.ops.attn_ext.attention_decode, and its kernel of the CPU.
#include "bindings/decode.h"

#include "bindings/torch_executor.h"
#include "cpu/kernel_table.h"

namespace attn_ext::bindings {
namespace {

struct CpuDecode {
  static constexpr Contents kContents = Contents::checked;

  static void check_query(const Tensor& query) { check_cpu(query, "query"); }
  static void run_decode(DecodeInputs&, const DeviceDecodeParams& params, DecodeResults&) {
    cpu::kernel_table().decode[static_cast<int>(params.dtype)](params, torch_executor());
  }
};

}  // namespace
}  // namespace attn_ext::bindings

STABLE_TORCH_LIBRARY_FRAGMENT(attn_ext, library) { library.def(attn_ext::bindings::kAttentionDecode); }

STABLE_TORCH_LIBRARY_IMPL(attn_ext, CPU, library) {
  library.impl("attention_decode", attn_ext::bindings::attention_decode<attn_ext::bindings::CpuDecode>);
}
