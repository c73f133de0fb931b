// Activations to e4m3: each 128 consecutive channels of a token get one scale.
//
// x (rows, columns) -> codes (rows, columns), one byte each; scale (rows, groups) fp32.
// Runs on every vector core; the unit of work is a chunk of 2048 channels of one row.
#include "activation.h"
#include "kernel_kind.h"
#include "kernel_operator.h"

namespace qwen3_fp8_ascend {

template <class T>
class GroupQuantize {
 public:
  __aicore__ inline void init(GM_ADDR x, GM_ADDR codes, GM_ADDR scale, const QuantizeTiling& tiling) {
    tiling_ = tiling;
    const uint64_t elements = static_cast<uint64_t>(tiling.rows) * tiling.columns;
    x_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(x), elements);
    codes_.SetGlobalBuffer(reinterpret_cast<__gm__ uint8_t*>(codes), elements);
    scale_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(scale), static_cast<uint64_t>(tiling.rows) * tiling.groups);
    pipe_.InitBuffer(input_, 2, kChunk * sizeof(T));
    pipe_.InitBuffer(output_, 2, kChunk);
    pipe_.InitBuffer(scales_, 2, kChunkGroups * sizeof(float));
    pipe_.InitBuffer(blocks_, kChunkGroups * kBroadcast * sizeof(float));
    groups_.init(pipe_);
  }

  __aicore__ inline void process() {
    const uint32_t chunks = (tiling_.columns + kChunk - 1) / kChunk;
    const uint64_t items = static_cast<uint64_t>(tiling_.rows) * chunks;
    for (uint64_t item = AscendC::GetBlockIdx(); item < items; item += AscendC::GetBlockNum()) {
      const uint32_t first = static_cast<uint32_t>(item % chunks) * kChunk;
      const uint32_t rest = tiling_.columns - first;
      quantize(item / chunks, first, rest < kChunk ? rest : kChunk);
    }
  }

 private:
  __aicore__ inline void quantize(uint64_t row, uint32_t first, uint32_t count) {
    using namespace AscendC;
    LocalTensor<T> x = input_.template AllocTensor<T>();
    load_chunk(pipe_, x, x_[row * tiling_.columns + first], count);
    input_.EnQue(x);
    x = input_.template DeQue<T>();
    LocalTensor<float> scale = scales_.AllocTensor<float>();
    groups_.scale_groups(x, scale, blocks_.Get<float>(), tiling_.activation);
    input_.FreeTensor(x);
    LocalTensor<uint8_t> codes = output_.AllocTensor<uint8_t>();
    groups_.encode(codes);
    output_.EnQue(codes);
    scales_.EnQue(scale);
    codes = output_.DeQue<uint8_t>();
    scale = scales_.DeQue<float>();
    DataCopyPad(codes_[row * tiling_.columns + first], codes, DataCopyExtParams(1, count, 0, 0, 0));
    const uint32_t groups = (count + kBlock - 1) / kBlock;
    DataCopyPad(scale_[row * tiling_.groups + first / kBlock], scale,
                DataCopyExtParams(1, groups * static_cast<uint32_t>(sizeof(float)), 0, 0, 0));
    output_.FreeTensor(codes);
    scales_.FreeTensor(scale);
  }

  AscendC::TPipe pipe_;
  AscendC::TQue<AscendC::TPosition::VECIN, 2> input_;
  AscendC::TQue<AscendC::TPosition::VECOUT, 2> output_, scales_;
  AscendC::TBuf<AscendC::TPosition::VECCALC> blocks_;
  AscendC::GlobalTensor<T> x_;
  AscendC::GlobalTensor<uint8_t> codes_;
  AscendC::GlobalTensor<float> scale_;
  ActivationGroups groups_;
  QuantizeTiling tiling_;
};

template <class T>
__aicore__ inline void run_group_quantize(GM_ADDR x, GM_ADDR codes, GM_ADDR scale, const QuantizeTiling& tiling) {
  GroupQuantize<T> kernel;
  kernel.init(x, codes, scale, tiling);
  kernel.process();
}

}  // namespace qwen3_fp8_ascend

extern "C" QWEN3_FP8_VECTOR_KERNEL void qwen3_fp8_group_quantize(GM_ADDR x, GM_ADDR codes, GM_ADDR scale,
                                                                 qwen3_fp8_ascend::QuantizeTiling tiling) {
  using namespace qwen3_fp8_ascend;
  QWEN3_FP8_KERNEL_KIND(KERNEL_TYPE_AIV_ONLY);
  if (tiling.dtype == kFloat16) {
    run_group_quantize<half>(x, codes, scale, tiling);
  } else if (tiling.dtype == kBfloat16) {
    run_group_quantize<bfloat16_t>(x, codes, scale, tiling);
  } else {
    run_group_quantize<float>(x, codes, scale, tiling);
  }
}
