// The numbers of core/params.h, ScoreParams, as kernels multiply by them.
#pragma once
#include "core/online_softmax.h"
#include "core/params.h"

namespace attn_ext::cuda {

// What makes scores of products, in units of log2.
struct ScoreFactors {
  float scale_log2, to_cap, cap_log2;

  ATTN_HD static ScoreFactors of(const ScoreParams& score) {
    return {static_cast<float>(score.scale * kLog2E), static_cast<float>(score.softcap > 0 ? score.scale / score.softcap : 0),
            static_cast<float>(score.softcap * kLog2E)};
  }
};

}  // namespace attn_ext::cuda
