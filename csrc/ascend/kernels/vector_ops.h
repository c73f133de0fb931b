// Small named steps of the vector unit that several kernels share.
#pragma once

#include "../tiling.h"
#include "kernel_operator.h"

namespace qwen3_fp8_ascend {

constexpr uint32_t kFloatLanes = 64;  // of a repeat
constexpr uint32_t kShortLanes = 128;

// How an operand moves, in DataBlocks of 32 bytes: from one of a repeat's 8 blocks to the next, and to the next repeat.
struct Stride {
  uint8_t block;
  uint8_t repeat;
};
constexpr Stride kContiguous = {1, 8};
constexpr Stride kEverySecondRepeat = {1, 16};  // one half of rows of two repeats
constexpr Stride kSameRepeat = {1, 0};          // used again by every repeat
constexpr Stride kOneBlock = {0, 0};            // 8 floats for everything
constexpr Stride kBlockPerRepeat = {0, 1};      // 8 floats for a repeat, the next 8 for the next

__aicore__ inline AscendC::BinaryRepeatParams strides(Stride dst, Stride left, Stride right) {
  return AscendC::BinaryRepeatParams(dst.block, left.block, right.block, dst.repeat, left.repeat, right.repeat);
}

__aicore__ inline void vector_barrier() { AscendC::PipeBarrier<PIPE_V>(); }

// Lets pipe B wait for everything issued so far on pipe A, where no queue does it.
template <AscendC::HardEvent event>
__aicore__ inline void order(AscendC::TPipe& pipe) {
  const AscendC::TEventID id = pipe.AllocEventID<event>();
  AscendC::SetFlag<event>(id);
  AscendC::WaitFlag<event>(id);
  pipe.ReleaseEventID<event>(id);
}

// dst = src & mask, where `mask` is one repeat (128 lanes) used again and again.
__aicore__ inline void and_with_mask(const AscendC::LocalTensor<int16_t>& dst, const AscendC::LocalTensor<int16_t>& src,
                                     const AscendC::LocalTensor<int16_t>& mask, uint32_t lanes) {
  AscendC::And(dst, src, mask, static_cast<uint64_t>(kShortLanes), static_cast<uint8_t>(lanes / kShortLanes),
               strides(kContiguous, kContiguous, kSameRepeat));
}

// A constant that stands in one repeat of lanes.
__aicore__ inline void fill_mask(const AscendC::LocalTensor<int16_t>& mask, uint16_t bits) {
  AscendC::Duplicate(mask, static_cast<int16_t>(bits), static_cast<int32_t>(kShortLanes));
}

}  // namespace qwen3_fp8_ascend
