// The last phase of a linear: the parts of each tile are added in a fixed order, then the bias, all in fp32, and the
// sum is rounded once.
#pragma once

#include "vector_ops.h"
#include "work.h"

namespace qwen3_fp8_ascend {

template <class T>
class FinishTiles {
 public:
  __aicore__ inline void init(AscendC::TPipe& pipe, GM_ADDR spans, GM_ADDR bias, GM_ADDR out, GM_ADDR workspace,
                              const LinearTiling& tiling) {
    pipe_ = &pipe;
    tiling_ = tiling;
    spans_.SetGlobalBuffer(reinterpret_cast<__gm__ uint32_t*>(spans),
                           tiling.tiles * (sizeof(TileSpan) / sizeof(uint32_t)));
    bias_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(bias), tiling.n);
    wide_bias_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(bias), tiling.n);
    out_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(out), static_cast<uint64_t>(tiling.m) * tiling.n);
    results_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(workspace + tiling.results),
                             static_cast<uint64_t>(tiling.tiles) * tiling.parts * tiling.m * kBlock);
    pipe.InitBuffer(parts_, 2, kRows * kBlock * sizeof(float));
    pipe.InitBuffer(output_, 2, kRows * kBlock * sizeof(T));
    pipe.InitBuffer(bias_in_, 1, kBlock * sizeof(float));
    pipe.InitBuffer(sum_, kRows * kBlock * sizeof(float));
    pipe.InitBuffer(bias_row_, kBlock * sizeof(float));
  }

  // Pieces of 32 rows of a tile are dealt out to the vector cores.
  __aicore__ inline void process() {
    const uint32_t pieces = (tiling_.m + kRows - 1) / kRows, items = tiling_.tiles * pieces;
    for (uint32_t item = static_cast<uint32_t>(AscendC::GetBlockIdx()); item < items; item += tiling_.vector_cores) {
      const uint32_t first = item % pieces * kRows, rest = tiling_.m - first;
      finish(item / pieces, first, rest < kRows ? rest : kRows);
    }
  }

 private:
  static constexpr uint32_t kRows = 32;

  __aicore__ inline void finish(uint32_t tile, uint32_t row, uint32_t rows) {
    using namespace AscendC;
    const uint32_t start = spans_.GetValue(tile * 8), columns = spans_.GetValue(tile * 8 + 1);
    const int32_t count = static_cast<int32_t>(rows * kBlock);
    const LocalTensor<float> sum = sum_.Get<float>();
    const uint32_t parts = parts_of(tiling_, tile);
    vector_barrier();
    for (uint32_t part = 0; part < parts; ++part) {
      LocalTensor<float> one = parts_.template AllocTensor<float>();
      DataCopy(one, results_[((static_cast<uint64_t>(tile) * tiling_.parts + part) * tiling_.m + row) * kBlock],
               static_cast<uint32_t>(count));
      parts_.EnQue(one);
      one = parts_.template DeQue<float>();
      if (part == 0) {
        Muls(sum, one, 1.0f, count);
      } else {
        Add(sum, sum, one, count);
      }
      vector_barrier();
      parts_.FreeTensor(one);
    }
    if (tiling_.bias_dtype == tiling_.dtype) {
      add_bias(sum, bias_[start], columns, rows);
    } else if (tiling_.bias_dtype == kFloat32) {
      add_bias(sum, wide_bias_[start], columns, rows);
    }
    LocalTensor<T> out = output_.template AllocTensor<T>();
    narrow(out, sum, count);
    output_.EnQue(out);
    out = output_.template DeQue<T>();
    store_rows(out_[static_cast<uint64_t>(row) * tiling_.n + start], out, rows, columns, tiling_.n);
    output_.FreeTensor(out);
  }

  // Adds the bias of a tile's columns to every row of `sum`.
  template <class Bias>
  __aicore__ inline void add_bias(const AscendC::LocalTensor<float>& sum, const AscendC::GlobalTensor<Bias>& from,
                                  uint32_t columns, uint32_t rows) {
    using namespace AscendC;
    LocalTensor<Bias> bias = bias_in_.template AllocTensor<Bias>();
    Duplicate(bias.template ReinterpretCast<int16_t>(), static_cast<int16_t>(0),
              static_cast<int32_t>(kBlock * sizeof(Bias) / 2));
    order<HardEvent::V_MTE2>(*pipe_);
    constexpr uint32_t block = 32 / sizeof(Bias);
    DataCopyPadExtParams<Bias> padding;
    padding.isPad = true;
    padding.rightPadding = static_cast<uint8_t>((block - columns % block) % block);
    DataCopyPad(bias, from, DataCopyExtParams(1, columns * static_cast<uint32_t>(sizeof(Bias)), 0, 0, 0), padding);
    bias_in_.EnQue(bias);
    bias = bias_in_.template DeQue<Bias>();
    const LocalTensor<float> row = bias_row_.Get<float>();
    widen(row, bias, static_cast<int32_t>(kBlock));
    vector_barrier();
    for (uint32_t part = 0; part < kBlock / kFloatLanes; ++part) {
      Add(sum[part * kFloatLanes], sum[part * kFloatLanes], row[part * kFloatLanes], static_cast<uint64_t>(kFloatLanes),
          static_cast<uint8_t>(rows), strides(kEverySecondRepeat, kEverySecondRepeat, kSameRepeat));
    }
    vector_barrier();
    bias_in_.FreeTensor(bias);
  }

  AscendC::TQue<AscendC::TPosition::VECIN, 2> parts_;
  AscendC::TQue<AscendC::TPosition::VECIN, 1> bias_in_;
  AscendC::TQue<AscendC::TPosition::VECOUT, 2> output_;
  AscendC::TBuf<AscendC::TPosition::VECCALC> sum_, bias_row_;
  AscendC::GlobalTensor<uint32_t> spans_;
  AscendC::GlobalTensor<T> bias_, out_;
  AscendC::GlobalTensor<float> wide_bias_, results_;
  AscendC::TPipe* pipe_ = nullptr;
  LinearTiling tiling_;
};

template <class T>
__aicore__ inline void run_finish(AscendC::TPipe& pipe, GM_ADDR spans, GM_ADDR bias, GM_ADDR out, GM_ADDR workspace,
                                  const LinearTiling& tiling) {
  FinishTiles<T> phase;
  phase.init(pipe, spans, bias, out, workspace, tiling);
  phase.process();
}

__aicore__ inline void finish_tiles(AscendC::TPipe& pipe, GM_ADDR spans, GM_ADDR bias, GM_ADDR out, GM_ADDR workspace,
                                    const LinearTiling& tiling) {
  if (tiling.dtype == kFloat16) {
    run_finish<half>(pipe, spans, bias, out, workspace, tiling);
  } else if (tiling.dtype == kBfloat16) {
    run_finish<bfloat16_t>(pipe, spans, bias, out, workspace, tiling);
  } else {
    run_finish<float>(pipe, spans, bias, out, workspace, tiling);
  }
}

}  // namespace qwen3_fp8_ascend
