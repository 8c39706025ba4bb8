#include "cuda/build.h"

namespace attn_ext::cuda {

const Build kBuild = {__CUDACC_VER_MAJOR__, __CUDACC_VER_MINOR__, {__CUDA_ARCH_LIST__}};

}  // namespace attn_ext::cuda
