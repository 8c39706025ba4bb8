// torch.ops.attn_ext.*, and their kernels of the CPU.
#include "bindings/backward.h"
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
};

// dropout_mask(dropout_seed, dropout_p, batch, heads, query_begin, query_end, kv_len) -> bool, true = kept
void dropout_mask(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const Tensor seed = arguments.tensor();
  const DropoutParams dropout = Inputs::checked_dropout(arguments.number(), seed, cpu(), Contents::checked);
  const int64_t batch = arguments.integer(), heads = arguments.integer(), begin = arguments.integer();
  const int64_t end = arguments.integer(), kv_len = arguments.integer();
  STD_TORCH_CHECK(batch >= 0 && heads >= 0 && 0 <= begin && begin <= end && kv_len >= 0, "sizes must not be negative");
  Tensor mask = empty({batch, heads, end - begin, kv_len}, {0, 1, 2, 3}, torch_dtype(DType::boolean), cpu());
  auto* kept = static_cast<uint8_t*>(mask.data());
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t i = begin; i < end; ++i)
        for (int64_t j = 0; j < kv_len; ++j) *kept++ = keeps_weight(dropout, b, h, i, j);
  give(stack, mask);
}

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
  library.impl("dropout_mask", attn_ext::bindings::dropout_mask);
}
