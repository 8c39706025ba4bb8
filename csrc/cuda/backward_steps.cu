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

template <int M, int N, bool kOfKeys>
constexpr MeetingsVariant finds(const char* name) {
  return {name, M, N, kOfKeys, [](const BackwardArguments& a, const Stream& stream, const MeetingsVariant& variant) {
            const Meetings& meetings = kOfKeys ? a.of_keys : a.of_queries;
            const int64_t tiles = static_cast<int64_t>(meetings.batch) * meetings.heads * (kOfKeys ? meetings.columns : meetings.rows);
            launch<find_meetings<M, N, kOfKeys>>(variant.name, (tiles + kMeetingWarps - 1) / kMeetingWarps, kMeetingWarps * 32, 0,
                                                 stream, a);
          }};
}
#define OF_KEYS(M, N) finds<M, N, true>("find_meetings_of_keys_" #M "x" #N)
#define OF_QUERIES(M, N) finds<M, N, false>("find_meetings_of_queries_" #M "x" #N)
// For the tiles of core/variants.def.
constexpr MeetingsVariant kMeetingsVariants[] = {OF_KEYS(64, 64),     OF_KEYS(32, 64),      OF_KEYS(16, 64),
                                                 OF_KEYS(16, 32),     OF_QUERIES(64, 64),   OF_QUERIES(128, 32),
                                                 OF_QUERIES(64, 32),  OF_QUERIES(64, 16),   OF_QUERIES(32, 16)};
#undef OF_KEYS
#undef OF_QUERIES

}  // namespace

const MeetingsVariant* meetings_variant(const BackwardVariant& of, bool of_keys) {
  for (const MeetingsVariant& variant : kMeetingsVariants)
    if (variant.queries == of.queries && variant.keys == of.keys && variant.of_keys == of_keys) return &variant;
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
