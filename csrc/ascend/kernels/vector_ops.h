// Small named steps of the vector unit that several kernels share.
#pragma once

#include "kernel_operator.h"

#include "../tiling.h"

namespace qwen3_fp8_ascend {

constexpr uint32_t kFloatLanes = 64;   // of a repeat
constexpr uint32_t kShortLanes = 128;

__aicore__ inline void vector_barrier() { AscendC::PipeBarrier<PIPE_V>(); }

// Lets pipe B wait for everything issued so far on pipe A, where no queue does it.
template <AscendC::HardEvent event>
__aicore__ inline void order(AscendC::TPipe &pipe) {
    const AscendC::TEventID id = pipe.AllocEventID<event>();
    AscendC::SetFlag<event>(id);
    AscendC::WaitFlag<event>(id);
    pipe.ReleaseEventID<event>(id);
}

// dst = src & mask, where `mask` is one repeat (128 lanes) used again and again.
__aicore__ inline void and_with_mask(const AscendC::LocalTensor<int16_t> &dst, const AscendC::LocalTensor<int16_t> &src,
                                     const AscendC::LocalTensor<int16_t> &mask, uint32_t lanes) {
    AscendC::And(dst, src, mask, static_cast<uint64_t>(kShortLanes), static_cast<uint8_t>(lanes / kShortLanes),
                 AscendC::BinaryRepeatParams(1, 1, 1, 8, 8, 0));
}

// A constant that stands in one repeat of lanes.
__aicore__ inline void fill_mask(const AscendC::LocalTensor<int16_t> &mask, uint16_t bits) {
    AscendC::Duplicate(mask, static_cast<int16_t>(bits), static_cast<int32_t>(kShortLanes));
}

}  // namespace qwen3_fp8_ascend
