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

// fp32 to T, rounded to nearest even, and back. A cast from a type to itself is no instruction.
__aicore__ inline void narrow(const AscendC::LocalTensor<float>& to, const AscendC::LocalTensor<float>& from,
                              int32_t count) {
  AscendC::Muls(to, from, 1.0f, count);
}
template <class Narrow>
__aicore__ inline void narrow(const AscendC::LocalTensor<Narrow>& to, const AscendC::LocalTensor<float>& from,
                              int32_t count) {
  AscendC::Cast(to, from, AscendC::RoundMode::CAST_RINT, static_cast<uint32_t>(count));
}
__aicore__ inline void widen(const AscendC::LocalTensor<float>& to, const AscendC::LocalTensor<float>& from,
                             int32_t count) {
  AscendC::Muls(to, from, 1.0f, count);
}
template <class Narrow>
__aicore__ inline void widen(const AscendC::LocalTensor<float>& to, const AscendC::LocalTensor<Narrow>& from,
                             int32_t count) {
  AscendC::Cast(to, from, AscendC::RoundMode::CAST_NONE, static_cast<uint32_t>(count));
}

// The first `columns` of rows of 128, one below the other on chip, to `columns` of as many rows of a matrix of n
// columns.
template <class T>
__aicore__ inline void store_rows(const AscendC::GlobalTensor<T>& out, const AscendC::LocalTensor<T>& from,
                                  uint32_t rows, uint32_t columns, uint32_t n) {
  constexpr uint32_t pitch = kBlock * sizeof(T) / 32;
  const uint32_t bytes = columns * static_cast<uint32_t>(sizeof(T));
  AscendC::DataCopyPad(out, from,
                       AscendC::DataCopyExtParams(static_cast<uint16_t>(rows), bytes, pitch - (bytes + 31) / 32,
                                                  n * static_cast<uint32_t>(sizeof(T)) - bytes, 0));
}

}  // namespace qwen3_fp8_ascend
