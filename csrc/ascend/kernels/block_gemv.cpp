// y = x @ W.T with block scales for one row of x, on the vector cores alone: decoded weights never leave the core, so
// there is no way through L2 and no hand-over between kinds of cores.
//
// Two blocks of 128 x 128 (two k blocks of one tile) are worked on at once, each with an accumulator of its own, so
// that dependent instructions lie further apart. A block is held in strips of 16 columns (NZ); a strip's 128 x 16
// weights meet its 16 activations, repeated down the rows by strides of zero, and are added up in fp32: one accumulator
// holds, for each of 128 rows, 16 sums over the strips. Then x_scale * w_scale of the block multiplies it into the
// tile's sums.
#include "decode.h"
#include "finish.h"
#include "kernel_kind.h"
#include "kernel_operator.h"
#include "prepare.h"
#include "work.h"

namespace qwen3_fp8_ascend {

constexpr uint16_t kGemvPrepared = 0, kGemvDone = 1;
constexpr uint8_t kAllVectorCores = 0;  // mode of cross-core flags
constexpr uint32_t kGemvUnits = 2;

class GemvVector {
 public:
  __aicore__ inline void init(AscendC::TPipe& pipe, GM_ADDR packed, GM_ADDR scale, GM_ADDR workspace,
                              const LinearTiling& tiling) {
    tiling_ = tiling;
    core_ = static_cast<uint32_t>(AscendC::GetBlockIdx());
    const uint64_t units = static_cast<uint64_t>(tiling.tiles) * tiling.k_blocks;
    packed_.SetGlobalBuffer(reinterpret_cast<__gm__ int16_t*>(packed), units * kLanes);
    w_scale_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(scale), units * kBroadcast);
    x_.SetGlobalBuffer(reinterpret_cast<__gm__ half*>(workspace + tiling.activations), tiling.k_blocks * kBlock);
    x_scale_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(workspace + tiling.scales), tiling.k_blocks * kBroadcast);
    results_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(workspace + tiling.results),
                             static_cast<uint64_t>(tiling.tiles) * tiling.parts * kBlock);
    pipe.InitBuffer(input_, 2, kLanes * sizeof(int16_t));
    pipe.InitBuffer(scales_, 2, kGemvUnits * kBroadcast * sizeof(float));
    pipe.InitBuffer(operands_, 1, kMaxGemvColumns * sizeof(half));
    pipe.InitBuffer(x_scales_, 1, kMaxGemvColumns / kBlock * kBroadcast * sizeof(float));
    pipe.InitBuffer(output_, 2, kBlock * sizeof(float));
    pipe.InitBuffer(values_, kGemvUnits * kUnit * sizeof(half));
    pipe.InitBuffer(block_sums_, kGemvUnits * kSums * sizeof(float));
    pipe.InitBuffer(tile_sums_, kSums * sizeof(float));
    pipe.InitBuffer(halves_, 2 * kBlock * sizeof(float));
    pipe.InitBuffer(factors_, kGemvUnits * kBroadcast * sizeof(float));
    pipe.InitBuffer(mask_, kShortLanes * sizeof(int16_t));
    fill_mask(mask_.Get<int16_t>(), kCodeBits);
    vector_barrier();
  }

  __aicore__ inline void process() {
    using namespace AscendC;
    LocalTensor<half> x = operands_.AllocTensor<half>();
    DataCopy(x, x_, tiling_.k_blocks * kBlock);
    operands_.EnQue(x);
    LocalTensor<float> x_scale = x_scales_.AllocTensor<float>();
    DataCopy(x_scale, x_scale_, tiling_.k_blocks * kBroadcast);
    x_scales_.EnQue(x_scale);
    StageWalk walk(tiling_, core_, kGemvUnits), ahead(tiling_, core_, kGemvUnits);
    load_next(ahead);
    load_next(ahead);
    x = operands_.DeQue<half>();
    x_scale = x_scales_.DeQue<float>();
    while (!walk.done()) {
      const Stage stage = walk.next();
      multiply(stage, x, x_scale, ahead);
      if (stage.closes) {
        reduce(stage);
      }
    }
    operands_.FreeTensor(x);
    x_scales_.FreeTensor(x_scale);
  }

 private:
  static constexpr uint32_t kStrip = kBlock * kFractal;
  static constexpr uint32_t kSums = kBlock * kFractal;  // 16 sums for each of 128 rows
  static constexpr uint8_t kSumRepeats = kSums / kFloatLanes;
  static constexpr uint32_t kStrips = kBlock / kFractal;

  __aicore__ inline void load_next(StageWalk& ahead) {
    while (next_in_stage_ >= loading_.units) {
      if (ahead.done()) {
        return;
      }
      loading_ = ahead.next();
      next_in_stage_ = 0;
    }
    AscendC::LocalTensor<int16_t> lanes = input_.AllocTensor<int16_t>();
    const uint64_t unit = static_cast<uint64_t>(loading_.tile) * tiling_.k_blocks + loading_.k_block + next_in_stage_;
    AscendC::DataCopy(lanes, packed_[unit * kLanes], kLanes);
    input_.EnQue(lanes);
    ++next_in_stage_;
  }

  __aicore__ inline void multiply(const Stage& stage, const AscendC::LocalTensor<half>& x,
                                  const AscendC::LocalTensor<float>& x_scale, StageWalk& ahead) {
    using namespace AscendC;
    LocalTensor<float> scales = scales_.AllocTensor<float>();
    DataCopy(scales, w_scale_[(static_cast<uint64_t>(stage.tile) * tiling_.k_blocks + stage.k_block) * kBroadcast],
             stage.units * kBroadcast);
    scales_.EnQue(scales);
    const LocalTensor<half> values = values_.Get<half>();
    const LocalTensor<float> sums = block_sums_.Get<float>(), tile = tile_sums_.Get<float>(),
                             factors = factors_.Get<float>();
    vector_barrier();
    for (uint32_t unit = 0; unit < stage.units; ++unit) {
      LocalTensor<int16_t> lanes = input_.DeQue<int16_t>();
      decode_unit(values[unit * kUnit], lanes, mask_.Get<int16_t>());
      input_.FreeTensor(lanes);
      load_next(ahead);
    }
    Duplicate(sums, 0.0f, static_cast<int32_t>(stage.units * kSums));
    if (stage.opens) {
      Duplicate(tile, 0.0f, static_cast<int32_t>(kSums));
    }
    scales = scales_.DeQue<float>();
    Mul(factors, scales, x_scale[stage.k_block * kBroadcast], static_cast<int32_t>(stage.units * kBroadcast));
    vector_barrier();
    scales_.FreeTensor(scales);
    for (uint32_t strip = 0; strip < kStrips; ++strip) {
      for (uint32_t unit = 0; unit < stage.units; ++unit) {
        MulAddDst(sums[unit * kSums], values[unit * kUnit + strip * kStrip],
                  x[(stage.k_block + unit) * kBlock + strip * kFractal], static_cast<uint64_t>(kFloatLanes),
                  kSumRepeats, strides(kContiguous, {1, 4}, kOneBlock));
      }
      vector_barrier();
    }
    for (uint32_t unit = 0; unit < stage.units; ++unit) {
      MulAddDst(tile, sums[unit * kSums], factors[unit * kBroadcast], static_cast<uint64_t>(kFloatLanes), kSumRepeats,
                strides(kContiguous, kContiguous, kOneBlock));
      vector_barrier();
    }
  }

  // 16 sums a row -> 2 -> 1.
  __aicore__ inline void reduce(const Stage& stage) {
    using namespace AscendC;
    const LocalTensor<float> halves = halves_.Get<float>();
    BlockReduceSum(halves, tile_sums_.Get<float>(), static_cast<int32_t>(kSumRepeats),
                   static_cast<int32_t>(kFloatLanes), 1, 1, 8);
    vector_barrier();
    LocalTensor<float> rows = output_.AllocTensor<float>();
    PairReduceSum(rows, halves, static_cast<int32_t>(2 * kBlock / kFloatLanes), static_cast<int32_t>(kFloatLanes), 1, 1,
                  8);
    output_.EnQue(rows);
    rows = output_.DeQue<float>();
    const uint64_t part = static_cast<uint64_t>(stage.tile) * tiling_.parts + part_of(tiling_, stage.tile, core_);
    DataCopy(results_[part * kBlock], rows, kBlock);
    output_.FreeTensor(rows);
  }

  AscendC::TQue<AscendC::TPosition::VECIN, 2> input_, scales_;
  AscendC::TQue<AscendC::TPosition::VECIN, 1> operands_, x_scales_;
  AscendC::TQue<AscendC::TPosition::VECOUT, 2> output_;
  AscendC::TBuf<AscendC::TPosition::VECCALC> values_, block_sums_, tile_sums_, halves_, factors_, mask_;
  AscendC::GlobalTensor<int16_t> packed_;
  AscendC::GlobalTensor<half> x_;
  AscendC::GlobalTensor<float> w_scale_, x_scale_, results_;
  LinearTiling tiling_;
  Stage loading_{};
  uint32_t next_in_stage_ = 0;
  uint32_t core_ = 0;
};

}  // namespace qwen3_fp8_ascend

extern "C" QWEN3_FP8_SYNCHRONIZED_VECTOR_KERNEL void qwen3_fp8_block_gemv(GM_ADDR x, GM_ADDR packed, GM_ADDR scale,
                                                                          GM_ADDR spans, GM_ADDR bias, GM_ADDR out,
                                                                          GM_ADDR workspace,
                                                                          qwen3_fp8_ascend::LinearTiling tiling) {
  using namespace qwen3_fp8_ascend;
  QWEN3_FP8_KERNEL_KIND(KERNEL_TYPE_MIX_AIV_1_0);  // vector cores only, with flags between them
  if ASCEND_IS_AIV {
    AscendC::TPipe pipe;
    prepare_activations(pipe, x, workspace, tiling);
    AscendC::CrossCoreSetFlag<kAllVectorCores, PIPE_MTE3>(kGemvPrepared);
    AscendC::CrossCoreWaitFlag(kGemvPrepared);
    GemvVector vector;
    vector.init(pipe, packed, scale, workspace, tiling);
    vector.process();
    pipe.Reset();
    AscendC::CrossCoreSetFlag<kAllVectorCores, PIPE_MTE3>(kGemvDone);
    AscendC::CrossCoreWaitFlag(kGemvDone);
    finish_tiles(pipe, spans, bias, out, workspace, tiling);
  }
}
