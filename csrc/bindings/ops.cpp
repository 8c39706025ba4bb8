// torch.ops.attn_ext.*, and their kernels of the CPU.
#include "bindings/backward.h"
#include "bindings/dropout_mask.h"
#include "bindings/forward.h"
#include "bindings/torch_executor.h"
#include "core/dropout.h"
#include "cpu/kernel_table.h"

namespace attn_ext::bindings {
namespace {

struct Cpu {
  static constexpr Contents kContents = Contents::checked;

  static void check_query(const Tensor& query) { check_cpu(query, "query"); }
  static void run(Inputs& inputs, ForwardParams& params, ForwardResults& results) {
    inputs.set_views(params);
    params.out = view(results.out);
    cpu::kernel_table().forward[static_cast<int>(params.dtype)](params, torch_executor());
  }
  static void run(Inputs& inputs, BackwardParams& params, BackwardTensors& tensors) {
    inputs.set_views(params);
    for (auto [tensor, input] : {std::pair{&tensors.out, &params.out}, std::pair{&tensors.grad_out, &params.grad_out}}) {
      *tensor = with_adjacent_columns(std::move(*tensor));
      *input = const_view(*tensor);
    }
    tensors.set_gradients(params);
    cpu::kernel_table().backward[static_cast<int>(params.dtype)](params, torch_executor());
  }

  static void check_seed(const Tensor& seed) { check_cpu(seed, "dropout_seed"); }
  static void run(const DropoutMaskParams& p, const Tensor&, const Tensor&) {
    uint8_t* kept = p.mask;
    for (int64_t b = 0; b < p.batch; ++b)
      for (int64_t h = 0; h < p.heads; ++h)
        for (int64_t i = p.query_begin; i < p.query_end; ++i)
          for (int64_t j = 0; j < p.kv_len; ++j) *kept++ = keeps_weight(p.dropout, b, h, i, j);
  }
};

}  // namespace
}  // namespace attn_ext::bindings

STABLE_TORCH_LIBRARY(attn_ext, library) {
  library.def(attn_ext::bindings::kAttentionForward);
  library.def(attn_ext::bindings::kAttentionOutput);
  library.def(attn_ext::bindings::kAttentionBackward);
  library.def(attn_ext::bindings::kDropoutMask);
  library.def(attn_ext::bindings::kAttentionSupport);
  library.def(attn_ext::bindings::kDecodeSupport);
}

STABLE_TORCH_LIBRARY_IMPL(attn_ext, CPU, library) {
  attn_ext::bindings::implement_forward<attn_ext::bindings::Cpu>(library);
  attn_ext::bindings::implement_backward<attn_ext::bindings::Cpu>(library);
  attn_ext::bindings::implement_dropout_mask<attn_ext::bindings::Cpu>(library);
}
