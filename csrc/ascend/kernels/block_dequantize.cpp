// Packed e4m3 weights back to rows: code * scale, rounded once.
//
// packed (tiles, k_blocks, 128 * 128) -> out (n, k) in fp16, bf16 or fp32. Runs on every vector core; the unit of work
// is a block of 128 x 128, written as 128 pieces of rows. Prefill uses it to fill one scratch that all layers share.
#include "decode.h"
#include "kernel_kind.h"
#include "kernel_operator.h"

namespace qwen3_fp8_ascend {

template <class T>
class BlockDequantize {
 public:
  __aicore__ inline void init(GM_ADDR packed, GM_ADDR scale, GM_ADDR spans, GM_ADDR out,
                              const DequantizeTiling& tiling) {
    tiling_ = tiling;
    const uint64_t units = static_cast<uint64_t>(tiling.tiles) * tiling.k_blocks;
    packed_.SetGlobalBuffer(reinterpret_cast<__gm__ int16_t*>(packed), units * kLanes);
    scale_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(scale), units * kBroadcast);
    spans_.SetGlobalBuffer(reinterpret_cast<__gm__ uint32_t*>(spans),
                           tiling.tiles * (sizeof(TileSpan) / sizeof(uint32_t)));
    out_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(out), static_cast<uint64_t>(tiling.n) * tiling.k);
    pipe_.InitBuffer(input_, 2, kLanes * sizeof(int16_t));
    pipe_.InitBuffer(scales_, 2, kBroadcast * sizeof(float));
    pipe_.InitBuffer(output_, 1, kUnit * sizeof(T));
    pipe_.InitBuffer(values_, kUnit * sizeof(half));
    pipe_.InitBuffer(products_, kPiece * sizeof(float));
    pipe_.InitBuffer(mask_, kShortLanes * sizeof(int16_t));
    fill_mask(mask_.Get<int16_t>(), kCodeBits);
    vector_barrier();
  }

  __aicore__ inline void process() {
    const uint64_t units = static_cast<uint64_t>(tiling_.tiles) * tiling_.k_blocks;
    for (uint64_t unit = AscendC::GetBlockIdx(); unit < units; unit += AscendC::GetBlockNum()) {
      load(unit);
      convert();
      store(static_cast<uint32_t>(unit / tiling_.k_blocks), static_cast<uint32_t>(unit % tiling_.k_blocks));
    }
  }

 private:
  static constexpr uint32_t kStrip = kBlock * kFractal;  // 128 rows of 16 columns, as NZ holds them
  static constexpr uint32_t kPiece = 4 * kStrip;         // what is held as fp32 at once
  static constexpr uint32_t kRowBlocks = kBlock * sizeof(T) / 32;

  __aicore__ inline void load(uint64_t unit) {
    using namespace AscendC;
    LocalTensor<int16_t> lanes = input_.template AllocTensor<int16_t>();
    DataCopy(lanes, packed_[unit * kLanes], kLanes);
    input_.EnQue(lanes);
    LocalTensor<float> scale = scales_.template AllocTensor<float>();
    DataCopy(scale, scale_[unit * kBroadcast], kBroadcast);
    scales_.EnQue(scale);
  }

  __aicore__ inline void convert() {
    using namespace AscendC;
    LocalTensor<int16_t> lanes = input_.template DeQue<int16_t>();
    LocalTensor<float> scale = scales_.template DeQue<float>();
    const LocalTensor<half> values = values_.Get<half>();
    const LocalTensor<float> products = products_.Get<float>();
    decode_unit(values, lanes, mask_.Get<int16_t>());
    input_.FreeTensor(lanes);
    LocalTensor<T> rows = output_.template AllocTensor<T>();
    for (uint32_t piece = 0; piece < kUnit / kPiece; ++piece) {
      vector_barrier();
      Cast(products, values[piece * kPiece], RoundMode::CAST_NONE, kPiece);
      vector_barrier();
      for (uint32_t strip = 0; strip < kPiece / kStrip; ++strip) {
        scale_strip(rows[(piece * (kPiece / kStrip) + strip) * kFractal], products[strip * kStrip], scale);
      }
    }
    scales_.FreeTensor(scale);
    output_.EnQue(rows);
  }

  // 16 columns of 128 rows, contiguous -> the same columns of a row-major block.
  __aicore__ inline void scale_strip(const AscendC::LocalTensor<float>& rows, const AscendC::LocalTensor<float>& strip,
                                     const AscendC::LocalTensor<float>& scale) {
    using namespace AscendC;
    for (uint32_t part = 0; part < 2; ++part) {  // a DataBlock is half a row of the strip; a repeat takes 8 rows
      Mul(rows[part * kBroadcast], strip[part * kBroadcast], scale, static_cast<uint64_t>(kFloatLanes),
          static_cast<uint8_t>(kBlock / 8), strides({kRowBlocks, 8 * kRowBlocks}, {2, 16}, kOneBlock));
    }
  }
  template <class Narrow>
  __aicore__ inline void scale_strip(const AscendC::LocalTensor<Narrow>& rows, const AscendC::LocalTensor<float>& strip,
                                     const AscendC::LocalTensor<float>& scale) {
    using namespace AscendC;
    constexpr uint8_t repeats = kStrip / kFloatLanes;
    Mul(strip, strip, scale, static_cast<uint64_t>(kFloatLanes), repeats, strides(kContiguous, kContiguous, kOneBlock));
    vector_barrier();
    Cast(rows, strip, RoundMode::CAST_RINT, static_cast<uint64_t>(kFloatLanes), repeats,
         UnaryRepeatParams(kRowBlocks, 1, 4 * kRowBlocks, 8));  // a repeat takes 4 rows
  }

  __aicore__ inline void store(uint32_t tile, uint32_t k_block) {
    using namespace AscendC;
    LocalTensor<T> rows = output_.template DeQue<T>();
    const uint32_t start = spans_.GetValue(tile * 8), count = spans_.GetValue(tile * 8 + 1);
    const uint32_t column = k_block * kBlock, rest = tiling_.k - column;
    const uint32_t bytes = (rest < kBlock ? rest : kBlock) * static_cast<uint32_t>(sizeof(T));
    const uint32_t skipped = kRowBlocks - (bytes + 31) / 32;
    DataCopyPad(out_[static_cast<uint64_t>(start) * tiling_.k + column], rows,
                DataCopyExtParams(static_cast<uint16_t>(count), bytes, skipped,
                                  tiling_.k * static_cast<uint32_t>(sizeof(T)) - bytes, 0));
    output_.FreeTensor(rows);
  }

  AscendC::TPipe pipe_;
  AscendC::TQue<AscendC::TPosition::VECIN, 2> input_, scales_;
  AscendC::TQue<AscendC::TPosition::VECOUT, 1> output_;
  AscendC::TBuf<AscendC::TPosition::VECCALC> values_, products_, mask_;
  AscendC::GlobalTensor<int16_t> packed_;
  AscendC::GlobalTensor<float> scale_;
  AscendC::GlobalTensor<uint32_t> spans_;
  AscendC::GlobalTensor<T> out_;
  DequantizeTiling tiling_;
};

template <class T>
__aicore__ inline void run_block_dequantize(GM_ADDR packed, GM_ADDR scale, GM_ADDR spans, GM_ADDR out,
                                            const DequantizeTiling& tiling) {
  BlockDequantize<T> kernel;
  kernel.init(packed, scale, spans, out, tiling);
  kernel.process();
}

}  // namespace qwen3_fp8_ascend

extern "C" QWEN3_FP8_VECTOR_KERNEL void qwen3_fp8_block_dequantize(GM_ADDR packed, GM_ADDR scale, GM_ADDR spans,
                                                                   GM_ADDR out,
                                                                   qwen3_fp8_ascend::DequantizeTiling tiling) {
  using namespace qwen3_fp8_ascend;
  QWEN3_FP8_KERNEL_KIND(KERNEL_TYPE_AIV_ONLY);
  if (tiling.dtype == kFloat16) {
    run_block_dequantize<half>(packed, scale, spans, out, tiling);
  } else if (tiling.dtype == kBfloat16) {
    run_block_dequantize<bfloat16_t>(packed, scale, spans, out, tiling);
  } else {
    run_block_dequantize<float>(packed, scale, spans, out, tiling);
  }
}
