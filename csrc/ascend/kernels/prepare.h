// The first phase of a linear: activations become fp16 operands with one scale for each 128 channels.
//
// dynamic: the operand is the e4m3 value itself, which fp16 holds exactly, and the scale that of the quantization.
// none: the operand is x divided by a power of two, and the scale that power. See activation.h.
// The chunks of all rows are dealt out to all vector cores; rows behind the last one are zero.
#pragma once

#include "activation.h"

namespace qwen3_fp8_ascend {

template <class T>
class PrepareActivations {
 public:
  // operands: [rows_padded][k_blocks * 128]; scales: [k_blocks][rows_padded][8], each repeated to fill a DataBlock.
  __aicore__ inline void init(AscendC::TPipe& pipe, GM_ADDR x, GM_ADDR workspace, const LinearTiling& tiling) {
    pipe_ = &pipe;
    tiling_ = tiling;
    width_ = tiling.k_blocks * kBlock;
    x_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(x), static_cast<uint64_t>(tiling.m) * tiling.k);
    operands_.SetGlobalBuffer(reinterpret_cast<__gm__ half*>(workspace + tiling.activations),
                              static_cast<uint64_t>(tiling.rows_padded) * width_);
    scales_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(workspace + tiling.scales),
                            static_cast<uint64_t>(tiling.k_blocks) * tiling.rows_padded * kBroadcast);
    pipe.InitBuffer(input_, 2, kChunk * sizeof(T));
    pipe.InitBuffer(output_, 2, kChunk * sizeof(half));
    pipe.InitBuffer(blocks_, 2, kChunkGroups * kBroadcast * sizeof(float));
    pipe.InitBuffer(scale_, kChunkGroups * sizeof(float));
    groups_.init(pipe);
  }

  __aicore__ inline void process() {
    const uint32_t chunks = (width_ + kChunk - 1) / kChunk;
    const uint32_t items = tiling_.rows_padded * chunks;
    for (uint32_t item = static_cast<uint32_t>(AscendC::GetBlockIdx()); item < items; item += tiling_.vector_cores) {
      prepare(item / chunks, item % chunks * kChunk);
    }
  }

 private:
  __aicore__ inline void prepare(uint32_t row, uint32_t first) {
    using namespace AscendC;
    LocalTensor<half> operands = output_.template AllocTensor<half>();
    LocalTensor<float> blocks = blocks_.template AllocTensor<float>();
    if (row < tiling_.m) {
      LocalTensor<T> x = input_.template AllocTensor<T>();
      const uint32_t rest = tiling_.k - first;
      load_chunk(*pipe_, x, x_[static_cast<uint64_t>(row) * tiling_.k + first], rest < kChunk ? rest : kChunk);
      input_.EnQue(x);
      x = input_.template DeQue<T>();
      groups_.scale_groups(x, scale_.Get<float>(), blocks, tiling_.activation);
      input_.FreeTensor(x);
      if (tiling_.activation == kNone) {
        groups_.narrowed(operands);
      } else {
        groups_.quantized(operands);
      }
    } else {
      Duplicate(operands, static_cast<half>(0.0f), static_cast<int32_t>(kChunk));
      Duplicate(blocks, 0.0f, static_cast<int32_t>(kChunkGroups * kBroadcast));
    }
    output_.EnQue(operands);
    blocks_.EnQue(blocks);
    operands = output_.template DeQue<half>();
    blocks = blocks_.template DeQue<float>();
    const uint32_t rest = width_ - first, count = rest < kChunk ? rest : kChunk;
    DataCopy(operands_[static_cast<uint64_t>(row) * width_ + first], operands, count);
    DataCopy(
        scales_[(static_cast<uint64_t>(first / kBlock) * tiling_.rows_padded + row) * kBroadcast], blocks,
        DataCopyParams(static_cast<uint16_t>(count / kBlock), 1, 0, static_cast<uint16_t>(tiling_.rows_padded - 1)));
    output_.FreeTensor(operands);
    blocks_.FreeTensor(blocks);
  }

  AscendC::TPipe* pipe_ = nullptr;
  AscendC::TQue<AscendC::TPosition::VECIN, 2> input_;
  AscendC::TQue<AscendC::TPosition::VECOUT, 2> output_, blocks_;
  AscendC::TBuf<AscendC::TPosition::VECCALC> scale_;
  AscendC::GlobalTensor<T> x_;
  AscendC::GlobalTensor<half> operands_;
  AscendC::GlobalTensor<float> scales_;
  ActivationGroups groups_;
  LinearTiling tiling_;
  uint32_t width_ = 0;
};

template <class T>
__aicore__ inline void run_prepare(AscendC::TPipe& pipe, GM_ADDR x, GM_ADDR workspace, const LinearTiling& tiling) {
  PrepareActivations<T> phase;
  phase.init(pipe, x, workspace, tiling);
  phase.process();
  pipe.Reset();
}

__aicore__ inline void prepare_activations(AscendC::TPipe& pipe, GM_ADDR x, GM_ADDR workspace,
                                           const LinearTiling& tiling) {
  if (tiling.dtype == kFloat16) {
    run_prepare<half>(pipe, x, workspace, tiling);
  } else if (tiling.dtype == kBfloat16) {
    run_prepare<bfloat16_t>(pipe, x, workspace, tiling);
  } else {
    run_prepare<float>(pipe, x, workspace, tiling);
  }
}

}  // namespace qwen3_fp8_ascend
