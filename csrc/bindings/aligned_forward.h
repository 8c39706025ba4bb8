// How the forward kernels of cuda/ are called.
#pragma once
#include "bindings/aligned_rows.h"
#include "bindings/forward.h"
#include "cuda/kernels.h"

namespace attn_ext::bindings {

// Enqueues the kernel by `launch(params, results)`.
template <class Launch>
void run_aligned(Inputs& inputs, ForwardParams& params, ForwardResults& results, const cuda::Device& device, Launch&& launch) {
  align_inputs(inputs, params);
  AlignedResult out(results.out, params.shape.value_dim);
  params.out = view(results.out);
  check_supported(params, device);
  launch(params, results);
  results.out = out.dense(std::move(results.out));
}

}  // namespace attn_ext::bindings
