// y = x @ W.T with block scales, for up to 64 rows of x: vector cores decode the weights, cube cores multiply them
// (pipeline.h). Blocks are dealt out in equal shares, so cores may share a tile: each leaves a part, and finish.h adds
// them.
#include "finish.h"
#include "kernel_kind.h"
#include "kernel_operator.h"
#include "pipeline.h"

namespace qwen3_fp8_ascend {

// Sums of this core's part of a tile go to the workspace, [tile][part][row][128].
class TileParts {
 public:
  __aicore__ inline void init(AscendC::TPipe& pipe, GM_ADDR workspace, const LinearTiling& tiling) {
    tiling_ = tiling;
    core_ = static_cast<uint32_t>(AscendC::GetBlockIdx() / kVectorCores);
    results_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(workspace + tiling.results),
                             static_cast<uint64_t>(tiling.tiles) * tiling.parts * tiling.m * kBlock);
    pipe.InitBuffer(sums_, 1, kMaxShare * kBlock * sizeof(float));
  }

  __aicore__ inline AscendC::LocalTensor<float> open() {
    sum_ = sums_.AllocTensor<float>();
    return sum_;
  }

  template <class Queue>
  __aicore__ inline void close(const Stage& stage, uint32_t first, uint32_t rows, Queue&) {
    sums_.EnQue(sum_);
    sum_ = sums_.DeQue<float>();
    const uint64_t part = static_cast<uint64_t>(stage.tile) * tiling_.parts + part_of(tiling_, stage.tile, core_);
    AscendC::DataCopy(results_[(part * tiling_.m + first) * kBlock], sum_, rows * kBlock);
    sums_.FreeTensor(sum_);
  }

 private:
  AscendC::TQue<AscendC::TPosition::VECOUT, 1> sums_;
  AscendC::LocalTensor<float> sum_;
  AscendC::GlobalTensor<float> results_;
  LinearTiling tiling_;
  uint32_t core_ = 0;
};

}  // namespace qwen3_fp8_ascend

extern "C" QWEN3_FP8_MIXED_KERNEL void qwen3_fp8_block_linear(GM_ADDR x, GM_ADDR packed, GM_ADDR scale, GM_ADDR spans,
                                                              GM_ADDR bias, GM_ADDR out, GM_ADDR workspace,
                                                              qwen3_fp8_ascend::LinearTiling tiling) {
  using namespace qwen3_fp8_ascend;
  QWEN3_FP8_KERNEL_KIND(KERNEL_TYPE_MIX_AIC_1_2);
  AscendC::TPipe pipe;
  if ASCEND_IS_AIV {
    prepare_activations(pipe, x, workspace, tiling);
    announce_prepared();
    wait_for_prepared();
    TileParts parts;
    parts.init(pipe, workspace, tiling);
    LinearVector<TileParts> vector;
    vector.init(pipe, packed, scale, workspace, tiling, tiling.m, parts);
    vector.process(StageWalk(tiling, vector.core(), kStageUnits));
    pipe.Reset();
    AscendC::CrossCoreSetFlag<kAmongAll, PIPE_MTE3>(kAllDone);
    AscendC::CrossCoreWaitFlag(kAllDone);
    finish_tiles(pipe, spans, bias, out, workspace, tiling);
  }
  if ASCEND_IS_AIC {
    AscendC::CrossCoreWaitFlag(kPrepared);
    LinearCube cube;
    cube.init(pipe, workspace, tiling);
    cube.process(StageWalk(tiling, cube.core(), kStageUnits));
  }
}
