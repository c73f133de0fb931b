// e4m3 to fp16, two weights in every 16-bit lane, in five vector instructions for 256 weights.
//
// A lane holds one code in its high byte and one in its low byte. Shifted so that the sign is on top and exponent and
// mantissa follow fp16's exponent's second bit (seeeemmm -> s0eeeemmm0000000), a code reads as an fp16 of exactly its
// value times 2^-8, subnormals included; NaN codes would read as +-1.875, so packing refuses them. The factor 2^8 is
// part of the packed scales, so that no multiplication is needed here.
#pragma once

#include "vector_ops.h"

namespace qwen3_fp8_ascend {

constexpr uint16_t kCodeBits = 0xBF80;

// lanes (kLanes 16-bit lanes) -> values (2 * kLanes fp16): first the low bytes, then the high ones.
// Not in place. `mask` holds kCodeBits. The result is complete after the next vector barrier or queue step.
__aicore__ inline void decode_unit(const AscendC::LocalTensor<half>& values, const AscendC::LocalTensor<int16_t>& lanes,
                                   const AscendC::LocalTensor<int16_t>& mask) {
  const AscendC::LocalTensor<int16_t> low = values.ReinterpretCast<int16_t>();
  const AscendC::LocalTensor<int16_t> high = low[kLanes];
  // Left on unsigned lanes, where the low byte's sign becomes the lane's; right on signed ones, which keep it.
  AscendC::ShiftLeft(low.ReinterpretCast<uint16_t>(), lanes.ReinterpretCast<uint16_t>(), static_cast<uint16_t>(8),
                     static_cast<int32_t>(kLanes));
  AscendC::ShiftRight(high, lanes, static_cast<int16_t>(1), static_cast<int32_t>(kLanes));
  vector_barrier();
  AscendC::ShiftRight(low, low, static_cast<int16_t>(1), static_cast<int32_t>(kLanes));
  vector_barrier();
  and_with_mask(low, low, mask, 2 * kLanes);
}

}  // namespace qwen3_fp8_ascend
