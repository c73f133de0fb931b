// The middle phase of block_linear and block_grouped_linear: vector cores decode weights, cube cores multiply them.
//
// Of one AI core, the two vector cores (AIV) and the cube core (AIC) work as a pipeline over stages of up to four
// blocks of 128 x 128 weights of one tile (128 outputs):
//   AIV  HBM -> UB, decode to fp16, UB -> workspace (L2)                    sets kReady
//   AIC  workspace -> L1 -> L0, product with the activations, one for each block of k, L0C -> workspace   sets kPartial
//   AIV  partial products * x_scale * w_scale, added up in fp32
// The AIVs run up to kStageLag stages ahead of the products they collect: the way of a stage through both kinds of
// cores and L2 takes about three times as long as its decoding (the emulator's estimate), so with fewer the cores would
// wait in turn.
//
// Both scales are applied in fp32 to the product of one block of k, as the specification says, so the only roundings
// are those of fp32. Folding the scales into fp16 operands instead would save the partial products' way through L2 (8
// bytes for each row and 128 weights of a column, which is docs/ascendc.md's table) and cost a relative error of 2e-4.
//
// Order, with S slots: kReady + s % S tells the AIC that slot s % S of the weights is written, and that the AIVs have
// read the partial products of stage s - S from theirs. kPartial(s) tells the AIVs that the products of stage s are
// written, hence that the AIC has read the weights of stage s. Every slot has a flag of its own: an AIV is up to
// kStageLag stages ahead of the other, and its later stages must not be counted as the other's earlier one. Stage s + S
// comes after kPartial(s + 1), which the AIC sets after it has waited for both AIVs' stage s, so no flag is set twice
// before it was waited for.
#pragma once

#include "decode.h"
#include "prepare.h"
#include "work.h"

namespace qwen3_fp8_ascend {

constexpr uint16_t kAllPrepared = 0;  // among vector cores
constexpr uint16_t kPrepared = 1;     // vector cores -> cube core
constexpr uint16_t kPartial = 2;      // cube core -> vector cores
constexpr uint16_t kAllDone = 3;      // among vector cores
constexpr uint16_t kReady = 4;        // vector cores -> cube core, one for each stage slot
constexpr uint16_t kFlagLimit = 11;   // from here on they belong to SyncAll
static_assert(kReady + kStageSlots <= kFlagLimit, "every stage slot has a cross-core flag");
constexpr uint8_t kAmongAll = 0, kWithinCore = 2;  // modes of cross-core flags

// Rows of x that a vector core scales: the first takes half of them, rounded up to whole DataBlocks of scales.
__aicore__ inline uint32_t rows_of_first(uint32_t m) { return (m + 15) / 16 * 8 < m ? (m + 15) / 16 * 8 : m; }

constexpr uint32_t kMaxShare = kMaxRows / 2;

// Vector cores tell each other that their share of the activations is prepared, and then the cube core that all are.
__aicore__ inline void announce_prepared() { AscendC::CrossCoreSetFlag<kAmongAll, PIPE_MTE3>(kAllPrepared); }
__aicore__ inline void wait_for_prepared() {
  AscendC::CrossCoreWaitFlag(kAllPrepared);
  AscendC::CrossCoreSetFlag<kWithinCore, PIPE_MTE3>(kPrepared);
}

// Decodes, and adds up the products. `Output` keeps a tile's sums and takes them when they are complete: open() gives
// room for kMaxShare rows of 128, close(stage, first, rows, staging) gets that room's first `rows`, which are rows
// stage.row + first on of x; `staging` is a queue from V to MTE3 with a buffer to spare.
template <class Output>
class LinearVector {
 public:
  // most_rows: of x in a stage, not above tiling.pass_rows.
  __aicore__ inline void init(AscendC::TPipe& pipe, GM_ADDR packed, GM_ADDR scale, GM_ADDR workspace,
                              const LinearTiling& tiling, uint32_t most_rows, Output& output) {
    pipe_ = &pipe;
    output_ = &output;
    tiling_ = tiling;
    core_ = static_cast<uint32_t>(AscendC::GetBlockIdx() / kVectorCores);
    sub_ = static_cast<uint32_t>(AscendC::GetSubBlockIdx());
    const uint64_t units = static_cast<uint64_t>(tiling.groups) * tiling.tiles * tiling.k_blocks;
    const uint64_t slots = static_cast<uint64_t>(tiling.cores) * kStageSlots * kStageUnits;
    packed_.SetGlobalBuffer(reinterpret_cast<__gm__ int16_t*>(packed), units * kLanes);
    w_scale_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(scale), units * kBroadcast);
    x_scale_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(workspace + tiling.scales),
                             static_cast<uint64_t>(tiling.k_blocks) * tiling.rows_padded * kBroadcast);
    weights_.SetGlobalBuffer(reinterpret_cast<__gm__ half*>(workspace + tiling.weights), slots * kUnit);
    partials_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(workspace + tiling.partials),
                              slots * tiling.pass_rows * kBlock);
    // A third block on its way hides the latency of HBM; above 32 rows the partial products need its place.
    inputs_ = most_rows <= kMaxShare ? 3 : 2;
    pipe.InitBuffer(input_, inputs_, kLanes * sizeof(int16_t));
    pipe.InitBuffer(decoded_, 2, kUnit * sizeof(half));
    pipe.InitBuffer(products_, 1, kStageUnits * rows_of_first(most_rows ? most_rows : 1) * kBlock * sizeof(float));
    pipe.InitBuffer(scales_, 2, kStageUnits * (kMaxShare + 1) * kBroadcast * sizeof(float));
    pipe.InitBuffer(factors_, kStageUnits * kMaxShare * kBroadcast * sizeof(float));
    pipe.InitBuffer(mask_, kShortLanes * sizeof(int16_t));
    fill_mask(mask_.Get<int16_t>(), kCodeBits);
    vector_barrier();
  }

  __aicore__ inline uint32_t core() const { return core_; }

  template <class Walk>
  __aicore__ inline void process(Walk walk) {
    Walk ahead = walk;
    for (uint8_t i = 0; i < inputs_; ++i) {
      load_next(ahead);
    }
    Stage stages[kStageSlots];
    uint32_t decoded = 0, collected = 0;
    while (collected < decoded || !walk.done()) {
      const bool more = !walk.done();
      const bool collect = decoded - collected == kStageLag || !more;
      const uint32_t oldest = collected % kStageSlots;
      if (collect) {
        fetch(stages[oldest], oldest);
      }
      if (more) {
        const uint32_t slot = decoded % kStageSlots;
        stages[slot] = walk.next();
        decode(stages[slot], slot, ahead);
        AscendC::CrossCoreSetFlag<kWithinCore, PIPE_MTE3>(static_cast<uint16_t>(kReady + slot));
        ++decoded;
      }
      if (collect) {
        accumulate(stages[oldest]);
        ++collected;
      }
    }
  }

 private:
  // Blocks of a stage alternate between the two vector cores. Loads run some blocks ahead, so that they are under way
  // while this core waits for a flag, which stops the issue of further instructions.
  template <class Walk>
  __aicore__ inline void load_next(Walk& ahead) {
    while (next_in_stage_ >= loading_.units) {
      if (ahead.done()) {
        return;
      }
      loading_ = ahead.next();
      next_in_stage_ = sub_;
    }
    AscendC::LocalTensor<int16_t> lanes = input_.AllocTensor<int16_t>();
    const uint64_t unit =
        static_cast<uint64_t>(loading_.weights) * tiling_.k_blocks + loading_.k_block + next_in_stage_;
    AscendC::DataCopy(lanes, packed_[unit * kLanes], kLanes);
    input_.EnQue(lanes);
    next_in_stage_ += kVectorCores;
  }

  __aicore__ inline uint64_t slot_unit(uint32_t slot, uint32_t unit) const {
    return (static_cast<uint64_t>(core_) * kStageSlots + slot) * kStageUnits + unit;
  }

  template <class Walk>
  __aicore__ inline void decode(const Stage& stage, uint32_t slot, Walk& ahead) {
    using namespace AscendC;
    for (uint32_t unit = sub_; unit < stage.units; unit += kVectorCores) {
      LocalTensor<int16_t> lanes = input_.DeQue<int16_t>();
      LocalTensor<half> values = decoded_.AllocTensor<half>();
      decode_unit(values, lanes, mask_.Get<int16_t>());
      input_.FreeTensor(lanes);
      load_next(ahead);
      decoded_.EnQue(values);
      values = decoded_.DeQue<half>();
      DataCopy(weights_[slot_unit(slot, unit) * kUnit], values, kUnit);
      decoded_.FreeTensor(values);
    }
  }

  // The rows of a stage that this core scales.
  struct Share {
    uint32_t first, rows;
    uint32_t scale_rows;  // up to whole DataBlocks of scales
  };
  __aicore__ inline Share share_of(const Stage& stage) const {
    Share share;
    share.first = sub_ == 0 ? 0 : rows_of_first(stage.rows);
    share.rows = sub_ == 0 ? rows_of_first(stage.rows) : stage.rows - share.first;
    share.scale_rows = (share.rows + kBroadcast - 1) / kBroadcast * kBroadcast;
    return share;
  }

  // Starts the transfer of a stage's partial products and scales, so that it runs while the next stage is decoded.
  __aicore__ inline void fetch(const Stage& stage, uint32_t slot) {
    using namespace AscendC;
    CrossCoreWaitFlag(kPartial);
    const Share share = share_of(stage);
    if (share.rows == 0) {
      return;
    }
    LocalTensor<float> scales = scales_.AllocTensor<float>();  // [unit][row][8] of x, then [unit][8] of w
    const uint64_t of_rows = static_cast<uint64_t>(stage.k_block) * tiling_.rows_padded + stage.row + share.first;
    DataCopy(scales, x_scale_[of_rows * kBroadcast],
             DataCopyParams(static_cast<uint16_t>(stage.units), static_cast<uint16_t>(share.scale_rows),
                            static_cast<uint16_t>(tiling_.rows_padded - share.scale_rows), 0));
    DataCopy(scales[stage.units * share.scale_rows * kBroadcast],
             w_scale_[(static_cast<uint64_t>(stage.weights) * tiling_.k_blocks + stage.k_block) * kBroadcast],
             stage.units * kBroadcast);
    scales_.EnQue(scales);
    constexpr uint32_t row_blocks = kBlock * sizeof(float) / 32;
    LocalTensor<float> products = products_.AllocTensor<float>();  // [unit][row][128]
    DataCopy(products, partials_[(slot_unit(slot, 0) * tiling_.pass_rows + share.first) * kBlock],
             DataCopyParams(static_cast<uint16_t>(stage.units), static_cast<uint16_t>(share.rows * row_blocks),
                            static_cast<uint16_t>((stage.rows - share.rows) * row_blocks), 0));
    products_.EnQue(products);
  }

  __aicore__ inline void accumulate(const Stage& stage) {
    using namespace AscendC;
    const Share share = share_of(stage);
    if (share.rows == 0) {
      return;
    }
    multiply_scales(stage, share.scale_rows);
    LocalTensor<float> products = products_.DeQue<float>();
    if (stage.opens) {
      sum_ = output_->open();
    }
    const LocalTensor<float> factors = factors_.Get<float>();
    const uint64_t mask = kFloatLanes;
    const BinaryRepeatParams by_row = strides(kEverySecondRepeat, kEverySecondRepeat, kBlockPerRepeat);
    for (uint32_t unit = 0; unit < stage.units; ++unit) {
      const LocalTensor<float> product = products[unit * share.rows * kBlock];
      const LocalTensor<float> factor = factors[unit * share.scale_rows * kBroadcast];
      for (uint32_t part = 0; part < kBlock; part += kFloatLanes) {
        if (stage.opens && unit == 0) {
          Mul(sum_[part], product[part], factor, mask, static_cast<uint8_t>(share.rows), by_row);
        } else {
          MulAddDst(sum_[part], product[part], factor, mask, static_cast<uint8_t>(share.rows), by_row);
        }
      }
      vector_barrier();
    }
    products_.FreeTensor(products);
    if (stage.closes) {
      output_->close(stage, share.first, share.rows, decoded_);
    }
    // kReady is set on MTE3: it must not overtake the reading of the partial products, even if this core decodes
    // nothing in the next stage.
    order<HardEvent::V_MTE3>(*pipe_);
  }

  __aicore__ inline void multiply_scales(const Stage& stage, uint32_t scale_rows) {
    using namespace AscendC;
    LocalTensor<float> scales = scales_.DeQue<float>();
    const LocalTensor<float> factors = factors_.Get<float>();
    const LocalTensor<float> of_weights = scales[stage.units * scale_rows * kBroadcast];
    for (uint32_t unit = 0; unit < stage.units; ++unit) {
      const uint32_t at = unit * scale_rows * kBroadcast;
      Mul(factors[at], scales[at], of_weights[unit * kBroadcast], static_cast<uint64_t>(kFloatLanes),
          static_cast<uint8_t>(scale_rows / kBroadcast), strides(kContiguous, kContiguous, kOneBlock));
    }
    vector_barrier();
    scales_.FreeTensor(scales);
  }

  AscendC::TPipe* pipe_ = nullptr;
  Output* output_ = nullptr;
  AscendC::TQue<AscendC::TPosition::VECIN, 3> input_;
  AscendC::TQue<AscendC::TPosition::VECIN, 2> scales_;
  AscendC::TQue<AscendC::TPosition::VECIN, 1> products_;
  AscendC::TQue<AscendC::TPosition::VECOUT, 2> decoded_;
  AscendC::TBuf<AscendC::TPosition::VECCALC> factors_, mask_;
  AscendC::LocalTensor<float> sum_;
  AscendC::GlobalTensor<int16_t> packed_;
  AscendC::GlobalTensor<half> weights_;
  AscendC::GlobalTensor<float> w_scale_, x_scale_, partials_;
  LinearTiling tiling_;
  Stage loading_{};
  uint32_t next_in_stage_ = 0;
  uint8_t inputs_ = 2;
  uint32_t core_ = 0, sub_ = 0;
};

class LinearCube {
 public:
  __aicore__ inline void init(AscendC::TPipe& pipe, GM_ADDR workspace, const LinearTiling& tiling) {
    tiling_ = tiling;
    core_ = static_cast<uint32_t>(AscendC::GetBlockIdx());
    width_ = tiling.k_blocks * kBlock;
    const uint64_t slots = static_cast<uint64_t>(tiling.cores) * kStageSlots * kStageUnits;
    x_.SetGlobalBuffer(reinterpret_cast<__gm__ half*>(workspace + tiling.activations),
                       static_cast<uint64_t>(tiling.rows_padded) * width_);
    weights_.SetGlobalBuffer(reinterpret_cast<__gm__ half*>(workspace + tiling.weights), slots * kUnit);
    partials_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(workspace + tiling.partials),
                              slots * tiling.pass_rows * kBlock);
    pipe.InitBuffer(x_l1_, 2, kMaxRows * kStageUnits * kBlock * sizeof(half));
    pipe.InitBuffer(w_l1_, kWeightBuffers, kUnit * sizeof(half));
    pipe.InitBuffer(x_l0_, 2, kMaxRows * kBlock * sizeof(half));
    pipe.InitBuffer(w_l0_, 2, kUnit * sizeof(half));
    pipe.InitBuffer(product_, 2, kMaxRows * kBlock * sizeof(float));
  }

  __aicore__ inline uint32_t core() const { return core_; }

  template <class Walk>
  __aicore__ inline void process(Walk walk) {
    for (uint32_t slot = 0; !walk.done(); slot = (slot + 1) % kStageSlots) {
      const Stage stage = walk.next();
      AscendC::CrossCoreWaitFlag(static_cast<uint16_t>(kReady + slot));
      load(stage, slot);
      multiply(stage, slot);
      AscendC::CrossCoreSetFlag<kWithinCore, PIPE_FIX>(kPartial);
    }
  }

 private:
  static constexpr uint32_t kWeightBuffers =
      kStageUnits + 1;  // with two for activations, 7 of the 8 events of this path

  __aicore__ inline uint64_t slot_unit(uint32_t slot, uint32_t unit) const {
    return (static_cast<uint64_t>(core_) * kStageSlots + slot) * kStageUnits + unit;
  }

  __aicore__ inline uint32_t padded_rows(const Stage& stage) const {
    return (stage.rows + kFractal - 1) / kFractal * kFractal;
  }

  // Decoded weights are in NZ order already; activations are rows and become NZ on the way. Behind a stage's own rows,
  // up to a whole fractal, come other ones or zeros: they give rows of the product that nobody reads.
  __aicore__ inline void load(const Stage& stage, uint32_t slot) {
    using namespace AscendC;
    LocalTensor<half> x = x_l1_.AllocTensor<half>();
    Nd2NzParams rows;
    rows.ndNum = 1;
    rows.nValue = static_cast<uint16_t>(padded_rows(stage));
    rows.dValue = static_cast<uint16_t>(stage.units * kBlock);
    rows.srcNdMatrixStride = 0;
    rows.srcDValue = static_cast<uint16_t>(width_);
    rows.dstNzC0Stride = static_cast<uint16_t>(padded_rows(stage));
    rows.dstNzNStride = 1;
    rows.dstNzMatrixStride = 0;
    DataCopy(x, x_[static_cast<uint64_t>(stage.row) * width_ + stage.k_block * kBlock], rows);
    x_l1_.EnQue(x);
    for (uint32_t unit = 0; unit < stage.units; ++unit) {  // one by one, so that the product starts with the first
      LocalTensor<half> w = w_l1_.AllocTensor<half>();
      DataCopy(w, weights_[slot_unit(slot, unit) * kUnit], kUnit);
      w_l1_.EnQue(w);
    }
  }

  __aicore__ inline void multiply(const Stage& stage, uint32_t slot) {
    using namespace AscendC;
    LocalTensor<half> x = x_l1_.DeQue<half>();
    for (uint32_t unit = 0; unit < stage.units; ++unit) {
      LocalTensor<half> w = w_l1_.DeQue<half>();
      load_operands(x, w, unit, padded_rows(stage) / kFractal);
      w_l1_.FreeTensor(w);
      LocalTensor<half> left = x_l0_.DeQue<half>(), right = w_l0_.DeQue<half>();
      LocalTensor<float> product = product_.AllocTensor<float>();
      MmadParams shape;
      shape.m = static_cast<uint16_t>(padded_rows(stage));  // never 1, which would mean the GEMV layout
      shape.n = static_cast<uint16_t>(kBlock);
      shape.k = static_cast<uint16_t>(kBlock);
      shape.cmatrixInitVal = true;
      Mmad(product, left, right, shape);
      x_l0_.FreeTensor(left);
      w_l0_.FreeTensor(right);
      product_.EnQue(product);
      product = product_.DeQue<float>();
      FixpipeParamsV220 out;
      out.nSize = static_cast<uint16_t>(kBlock);
      out.mSize = static_cast<uint16_t>(stage.rows);
      out.srcStride = static_cast<uint16_t>(padded_rows(stage));
      out.dstStride = kBlock;
      out.ndNum = 1;
      out.srcNdStride = 0;
      out.dstNdStride = 0;
      const uint64_t rows_before = slot_unit(slot, 0) * tiling_.pass_rows + unit * stage.rows;
      Fixpipe(partials_[rows_before * kBlock], product, out);
      product_.FreeTensor(product);
    }
    x_l1_.FreeTensor(x);
  }

  __aicore__ inline void load_operands(const AscendC::LocalTensor<half>& x, const AscendC::LocalTensor<half>& w,
                                       uint32_t unit, uint32_t row_fractals) {
    using namespace AscendC;
    constexpr uint32_t strips = kBlock / kFractal;
    LocalTensor<half> left = x_l0_.AllocTensor<half>();
    LoadData2DParams row;
    row.repeatTimes = static_cast<uint8_t>(strips);
    row.srcStride = static_cast<uint16_t>(row_fractals);
    row.ifTranspose = false;
    for (uint32_t i = 0; i < row_fractals; ++i) {
      row.startIndex = static_cast<uint16_t>(unit * strips * row_fractals + i);
      LoadData(left[i * strips * kFractal * kFractal], x, row);
    }
    x_l0_.EnQue(left);
    LocalTensor<half> right = w_l0_.AllocTensor<half>();
    LoadData2DParams block;
    block.startIndex = 0;
    block.repeatTimes = static_cast<uint8_t>(strips * strips);
    block.srcStride = 1;
    block.ifTranspose = false;
    LoadData(right, w, block);
    w_l0_.EnQue(right);
  }

  AscendC::TQue<AscendC::TPosition::A1, 2> x_l1_;
  AscendC::TQue<AscendC::TPosition::B1, kWeightBuffers> w_l1_;
  AscendC::TQue<AscendC::TPosition::A2, 2> x_l0_;
  AscendC::TQue<AscendC::TPosition::B2, 2> w_l0_;
  AscendC::TQue<AscendC::TPosition::CO1, 2> product_;
  AscendC::GlobalTensor<half> x_, weights_;
  AscendC::GlobalTensor<float> partials_;
  LinearTiling tiling_;
  uint32_t core_ = 0, width_ = 0;
};

}  // namespace qwen3_fp8_ascend
