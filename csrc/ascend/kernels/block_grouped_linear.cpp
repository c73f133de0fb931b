// y = x @ W.T with block scales for rows sorted by group (expert), each with the weight of its own group.
//
// The pipeline is block_linear's (pipeline.h), over the tiles of all groups that have rows (groups.h). A tile is one
// core's alone, so its sums are rounded and stored at once: there are no parts to add, and cores do not meet at the
// end.
#include "groups.h"
#include "kernel_kind.h"
#include "kernel_operator.h"
#include "pipeline.h"

namespace qwen3_fp8_ascend {

// Sums of a whole tile go to their rows of the output.
template <class T>
class OutputRows {
 public:
  __aicore__ inline void init(AscendC::TPipe& pipe, GM_ADDR spans, GM_ADDR out, const LinearTiling& tiling) {
    n_ = tiling.n;
    spans_.SetGlobalBuffer(reinterpret_cast<__gm__ uint32_t*>(spans), tiling.tiles * kSpanWords);
    out_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(out), static_cast<uint64_t>(tiling.m) * tiling.n);
    pipe.InitBuffer(sums_, kMaxShare * kBlock * sizeof(float));
  }

  __aicore__ inline AscendC::LocalTensor<float> open() { return sums_.Get<float>(); }

  template <class Queue>
  __aicore__ inline void close(const Stage& stage, uint32_t first, uint32_t rows, Queue& staging) {
    const uint32_t span = stage.tile * kSpanWords;  // the first group's: in all of them tiles lie alike
    const uint32_t start = spans_.GetValue(span), columns = spans_.GetValue(span + 1);
    AscendC::LocalTensor<T> rounded = staging.template AllocTensor<T>();
    narrow(rounded, sums_.Get<float>(), static_cast<int32_t>(rows * kBlock));
    staging.EnQue(rounded);
    rounded = staging.template DeQue<T>();
    store_rows(out_[static_cast<uint64_t>(stage.row + first) * n_ + start], rounded, rows, columns, n_);
    staging.FreeTensor(rounded);
  }

 private:
  static constexpr uint32_t kSpanWords = sizeof(TileSpan) / sizeof(uint32_t);

  AscendC::TBuf<AscendC::TPosition::VECCALC> sums_;
  AscendC::GlobalTensor<uint32_t> spans_;
  AscendC::GlobalTensor<T> out_;
  uint32_t n_ = 0;
};

template <class T>
__aicore__ inline void run_vector(AscendC::TPipe& pipe, GM_ADDR packed, GM_ADDR scale, GM_ADDR spans, GM_ADDR out,
                                  GM_ADDR workspace, const PassWalk& passes, const Survey& seen,
                                  const LinearTiling& tiling) {
  OutputRows<T> output;
  output.init(pipe, spans, out, tiling);
  LinearVector<OutputRows<T>> vector;
  vector.init(pipe, packed, scale, workspace, tiling, seen.most_rows, output);
  vector.process(GroupedWalk(passes, seen.passes, tiling, vector.core(), kStageUnits));
}

}  // namespace qwen3_fp8_ascend

extern "C" QWEN3_FP8_MIXED_KERNEL void qwen3_fp8_block_grouped_linear(GM_ADDR x, GM_ADDR packed, GM_ADDR scale,
                                                                      GM_ADDR spans, GM_ADDR ends, GM_ADDR out,
                                                                      GM_ADDR workspace,
                                                                      qwen3_fp8_ascend::LinearTiling tiling) {
  using namespace qwen3_fp8_ascend;
  QWEN3_FP8_KERNEL_KIND(KERNEL_TYPE_MIX_AIC_1_2);
  AscendC::TPipe pipe;
  const PassWalk passes(ends, tiling);
  if ASCEND_IS_AIV {
    prepare_activations(pipe, x, workspace, tiling);
    announce_prepared();
    const Survey seen = survey(passes);  // while other cores prepare
    wait_for_prepared();
    if (tiling.dtype == kFloat16) {
      run_vector<half>(pipe, packed, scale, spans, out, workspace, passes, seen, tiling);
    } else if (tiling.dtype == kBfloat16) {
      run_vector<bfloat16_t>(pipe, packed, scale, spans, out, workspace, passes, seen, tiling);
    } else {
      run_vector<float>(pipe, packed, scale, spans, out, workspace, passes, seen, tiling);
    }
  }
  if ASCEND_IS_AIC {
    const Survey seen = survey(passes);
    AscendC::CrossCoreWaitFlag(kPrepared);
    LinearCube cube;
    cube.init(pipe, workspace, tiling);
    cube.process(GroupedWalk(passes, seen.passes, tiling, cube.core(), kStageUnits));
  }
}
