// The small kernels of the backward pass, before and after those that multiply.
#include "cuda/backward_rows.cuh"
#include "cuda/launch.cuh"
#include "cuda/meetings.cuh"

namespace attn_ext::cuda {
namespace {

constexpr int kSumThreads = 256;

// The gradient of a head's sink, a block each: threads share the rows out among themselves, always in the same way.
__global__ void __launch_bounds__(kSumThreads) add_sinks(const __grid_constant__ BackwardArguments a) {
  __shared__ double sums[kSumThreads];
  const AttentionShape& shape = a.params.shape;
  double sum = 0;
  for (int64_t batch = 0; batch < shape.batch; ++batch)
    for (int64_t row = threadIdx.x; row < shape.query_len; row += kSumThreads)
      sum += static_cast<double>(a.rows.sink[(batch * shape.heads + blockIdx.x) * shape.query_len + row]);
  sums[threadIdx.x] = sum;
  __syncthreads();
  for (int half = kSumThreads / 2; half; half /= 2) {
    if (static_cast<int>(threadIdx.x) < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    __syncthreads();
  }
  if (threadIdx.x == 0) a.params.grad_sinks[blockIdx.x] = sums[0];
}

// The gradient of a bias from what the splits have, in their order.
__global__ void __launch_bounds__(kSumThreads) add_splits(const __grid_constant__ BackwardArguments a) {
  const int64_t elements = a.params.grad_bias_elements, i = static_cast<int64_t>(blockIdx.x) * kSumThreads + threadIdx.x;
  if (i >= elements) return;
  float sum = 0.f;
  for (int split = 0; split < a.bias.splits; ++split) sum += a.bias.partials[split * elements + i];
  static_cast<float*>(a.params.grad_bias.data)[i] = sum;
}

template <int M, int N>
constexpr MeetingsVariant kMeetings = {M, N, [](const BackwardArguments& a, const Stream& stream) {
  const int64_t tiles = static_cast<int64_t>(a.meetings.batch) * a.meetings.heads * a.meetings.query_tiles;
  launch<find_meetings<M, N>>("find_meetings", (tiles + kMeetingWarps - 1) / kMeetingWarps, kMeetingWarps * 32, 0, stream, a);
}};
constexpr const MeetingsVariant* kMeetingsVariants[] = {&kMeetings<64, 64>, &kMeetings<32, 64>, &kMeetings<16, 64>, &kMeetings<16, 32>};

}  // namespace

const MeetingsVariant* meetings_variant(int queries, int keys) {
  for (const MeetingsVariant* variant : kMeetingsVariants)
    if (variant->queries == queries && variant->keys == keys) return variant;
  return nullptr;
}

void prepare_rows(const BackwardArguments& a, const Stream& stream) {
  const int64_t blocks = a.params.shape.batch * a.params.shape.heads * (a.rows.padded / kRowBlock);
  if (a.params.dtype == DType::float32) launch<backward_rows<float>>("backward_rows_f32", blocks, kRowThreads, 0, stream, a);
  if (a.params.dtype == DType::float16) launch<backward_rows<Float16>>("backward_rows_f16", blocks, kRowThreads, 0, stream, a);
  if (a.params.dtype == DType::bfloat16) launch<backward_rows<BFloat16>>("backward_rows_bf16", blocks, kRowThreads, 0, stream, a);
}

void add_sink_gradients(const BackwardArguments& a, const Stream& stream) {
  launch<add_sinks>("add_sinks", a.params.shape.heads, kSumThreads, 0, stream, a);
}

void add_bias_splits(const BackwardArguments& a, const Stream& stream) {
  launch<add_splits>("add_splits", (a.params.grad_bias_elements + kSumThreads - 1) / kSumThreads, kSumThreads, 0, stream, a);
}

}  // namespace attn_ext::cuda
