// Activations in groups of 128: scale and quantization, one chunk (16 groups of one row) at a time.
//
// dynamic: scale = max(amax, 1e-10) / 448 and x / scale by true division; rounding to e4m3, nearest even, through
//     fp16: a conversion that rounds to odd keeps enough to round a second time without error.
// dynamic, ue8m0: the same, with the scale rounded up to a power of two.
// none: scale = 2^(floor(log2 amax) - 14), so that x / scale is exact and uses fp16's upper range. The scale of a group
//     with an infinity is that of the largest floats, so that the infinity itself stays one and the others stay finite.
// NaN and infinity go through as the specification says: no clamp is needed, since |x / scale| <= 448 up to rounding.
#pragma once

#include "vector_ops.h"

namespace qwen3_fp8_ascend {

constexpr float kE4m3Max = 448.0f;
constexpr float kAmaxFloor = 1e-10f;
constexpr float kTinyFloor = 1e-30f;  // keeps the exponent of an all-zero group in range
constexpr float kLargestFloat = 3.4028234663852886e38f;
constexpr float kExponentRoom = 1.0f / 16384.0f;
constexpr float kEncodeBias = 1.0f / 256.0f;   // e4m3 exponents in place as fp16 exponents
constexpr int32_t kInfinityBits = 0x7F800000;  // the exponent of an fp32
constexpr int32_t kMantissaBits = 0x7FFFFF;
constexpr int16_t kQuietNan = 0x7E00;  // of fp16; a NaN that a division gives has at least these bits

class ActivationGroups {
 public:
  __aicore__ inline void init(AscendC::TPipe& pipe) {
    pipe.InitBuffer(values_, kChunk * sizeof(float));
    pipe.InitBuffer(scratch_, kChunk * sizeof(float));
    pipe.InitBuffer(bits_, kChunk * sizeof(int16_t));
    pipe.InitBuffer(carry_, kChunk * sizeof(int16_t));
    pipe.InitBuffer(constants_, 4 * kShortLanes * sizeof(int16_t) + kChunkGroups * sizeof(float));
    AscendC::LocalTensor<int16_t> constants = constants_.Get<int16_t>();
    sign_mask_ = constants;
    magnitude_mask_ = constants[kShortLanes];
    kept_mask_ = constants[2 * kShortLanes];
    one_mask_ = constants[3 * kShortLanes];
    largest_ = constants[4 * kShortLanes].ReinterpretCast<float>();
    fill_mask(sign_mask_, 0x8000);
    fill_mask(magnitude_mask_, 0x7FFF);
    fill_mask(kept_mask_, 0x7F80);
    fill_mask(one_mask_, 1);
    AscendC::Duplicate(largest_, kE4m3Max, static_cast<int32_t>(kChunkGroups));
    vector_barrier();
  }

  // x -> x / scale (fp32, kept here) and the scales: one float a group, and one DataBlock a group.
  template <class T>
  __aicore__ inline void scale_groups(const AscendC::LocalTensor<T>& x, const AscendC::LocalTensor<float>& scale,
                                      const AscendC::LocalTensor<float>& scale_blocks, uint32_t activation) {
    using namespace AscendC;
    const LocalTensor<float> f = values_.Get<float>(), a = scratch_.Get<float>();
    widen(f, x);
    vector_barrier();
    Abs(a, f, static_cast<int32_t>(kChunk));
    vector_barrier();
    Max(a, a, a[kFloatLanes], static_cast<uint64_t>(kFloatLanes), static_cast<uint8_t>(kChunkGroups),
        strides(kEverySecondRepeat, kEverySecondRepeat, kEverySecondRepeat));
    vector_barrier();
    WholeReduceMax<float>(scale, a, static_cast<int32_t>(kFloatLanes), static_cast<int32_t>(kChunkGroups), 1, 1, 16,
                          ReduceOrder::ORDER_ONLY_VALUE);
    vector_barrier();
    if (activation != kNone) {
      Maxs(scale, scale, kAmaxFloor, static_cast<int32_t>(kChunkGroups));
      vector_barrier();
      Div(scale, scale, largest_, static_cast<int32_t>(kChunkGroups));
      if (activation == kDynamicUe8m0) {
        vector_barrier();
        round_up_to_power_of_two(scale);
      }
    } else {
      Maxs(scale, scale, kTinyFloor, static_cast<int32_t>(kChunkGroups));
      vector_barrier();
      Mins(scale, scale, kLargestFloat, static_cast<int32_t>(kChunkGroups));
      vector_barrier();
      keep_exponent(scale);
      vector_barrier();
      Muls(scale, scale, kExponentRoom, static_cast<int32_t>(kChunkGroups));
    }
    vector_barrier();
    Brcb(scale_blocks, scale, static_cast<uint8_t>(kChunkGroups / kBroadcast), BrcbRepeatParams(1, 8));
    vector_barrier();
    const BinaryRepeatParams by_group = strides(kEverySecondRepeat, kEverySecondRepeat, kBlockPerRepeat);
    Div(f, f, scale_blocks, static_cast<uint64_t>(kFloatLanes), static_cast<uint8_t>(kChunkGroups), by_group);
    Div(f[kFloatLanes], f[kFloatLanes], scale_blocks, static_cast<uint64_t>(kFloatLanes),
        static_cast<uint8_t>(kChunkGroups), by_group);
    vector_barrier();
  }

  // e4m3 codes, one byte each.
  __aicore__ inline void encode(const AscendC::LocalTensor<uint8_t>& codes) {
    using namespace AscendC;
    const LocalTensor<int16_t> bits = round_to_e4m3(), sign = carry_.Get<int16_t>();
    const LocalTensor<int16_t> valid = scratch_.Get<int16_t>();
    const int32_t count = static_cast<int32_t>(kChunk);
    ShiftRight(bits, bits, static_cast<int16_t>(7), count);
    ShiftRight(sign.ReinterpretCast<uint16_t>(), sign.ReinterpretCast<uint16_t>(), static_cast<uint16_t>(8), count);
    vector_barrier();
    Mins(bits, bits, static_cast<int16_t>(0x7F), count);  // only NaN exceeds 0x7E
    vector_barrier();
    Adds(valid, bits, static_cast<int16_t>(-0x7F), count);
    vector_barrier();
    ShiftRight(valid, valid, static_cast<int16_t>(15), count);  // all ones but for NaN, whose sign is dropped
    vector_barrier();
    And(sign, sign, valid, count);
    vector_barrier();
    Or(bits, bits, sign, count);
    vector_barrier();
    const LocalTensor<half> small = carry_.Get<half>();
    Cast(small, bits, RoundMode::CAST_NONE, kChunk);
    vector_barrier();
    Cast(codes, small, RoundMode::CAST_RINT, kChunk);
  }

  // The rounded values themselves, times `kDecodeBias` so that none of them is subnormal.
  __aicore__ inline void quantized(const AscendC::LocalTensor<half>& values) {
    using namespace AscendC;
    const LocalTensor<int16_t> bits = round_to_e4m3(), sign = carry_.Get<int16_t>();
    and_with_mask(bits, bits, kept_mask_, kChunk);
    vector_barrier();
    Or(bits, bits, sign, static_cast<int32_t>(kChunk));
    vector_barrier();
    Muls(values, bits.ReinterpretCast<half>(), static_cast<half>(kDecodeBias), static_cast<int32_t>(kChunk));
  }

  // Unquantized values as fp16.
  __aicore__ inline void narrowed(const AscendC::LocalTensor<half>& values) {
    AscendC::Cast(values, values_.Get<float>(), AscendC::RoundMode::CAST_RINT, kChunk);
  }

 private:
  __aicore__ inline void widen(const AscendC::LocalTensor<float>& f, const AscendC::LocalTensor<float>& x) {
    AscendC::Muls(f, x, 1.0f, static_cast<int32_t>(kChunk));  // keeps the sign of zero, as adding zero would not
  }
  template <class T>
  __aicore__ inline void widen(const AscendC::LocalTensor<float>& f, const AscendC::LocalTensor<T>& x) {
    AscendC::Cast(f, x, AscendC::RoundMode::CAST_NONE, kChunk);
  }

  // To the smallest power of two that is not below a scale: any bit of the mantissa carries into the exponent. Infinity
  // stays, and so does a NaN, which takes part as infinity and comes back by the maximum of both.
  __aicore__ inline void round_up_to_power_of_two(const AscendC::LocalTensor<float>& scale) {
    using namespace AscendC;
    const int32_t count = static_cast<int32_t>(kChunkGroups);
    const LocalTensor<float> up = carry_.Get<float>();
    const LocalTensor<int32_t> bits = up.ReinterpretCast<int32_t>();
    Mins(bits, scale.ReinterpretCast<int32_t>(), kInfinityBits, count);
    vector_barrier();
    Adds(bits, bits, kMantissaBits, count);
    vector_barrier();
    keep_exponent(up);
    vector_barrier();
    Max(scale, up, scale, count);
  }

  // Clears sign and mantissa: only the exponent field stays. The mask of one 32-bit word is {0x0000, 0x7F80}.
  __aicore__ inline void keep_exponent(const AscendC::LocalTensor<float>& scale) {
    using namespace AscendC;
    const LocalTensor<int32_t> mask = bits_.Get<int32_t>();
    Duplicate(mask, kInfinityBits, static_cast<int32_t>(kChunkGroups));
    vector_barrier();
    const LocalTensor<int16_t> halves = scale.ReinterpretCast<int16_t>();
    And(halves, halves, bits_.Get<int16_t>(), static_cast<int32_t>(2 * kChunkGroups));
  }

  // Leaves magnitude bits with the rounding added (the caller drops the last 7) and, in carry_, the signs.
  __aicore__ inline AscendC::LocalTensor<int16_t> round_to_e4m3() {
    using namespace AscendC;
    const LocalTensor<float> f = values_.Get<float>();
    const LocalTensor<int16_t> raw = scratch_.Get<int16_t>(), odd = raw[kChunk];
    const LocalTensor<int16_t> bits = bits_.Get<int16_t>(), sign = carry_.Get<int16_t>();
    const int32_t count = static_cast<int32_t>(kChunk);
    Muls(f, f, kEncodeBias, count);
    vector_barrier();
    Cast(raw.ReinterpretCast<half>(), f, RoundMode::CAST_ODD, kChunk);
    vector_barrier();
    and_with_mask(sign, raw, sign_mask_, kChunk);
    and_with_mask(bits, raw, magnitude_mask_, kChunk);
    vector_barrier();
    Mins(bits, bits, kQuietNan, count);  // a NaN with more bits set would overflow in the additions below
    vector_barrier();
    ShiftRight(odd, bits, static_cast<int16_t>(7), count);
    vector_barrier();
    and_with_mask(odd, odd, one_mask_, kChunk);
    Adds(bits, bits, static_cast<int16_t>(0x3F), count);
    vector_barrier();
    Add(bits, bits, odd, count);
    vector_barrier();
    return bits;
  }

  AscendC::TBuf<AscendC::TPosition::VECCALC> values_, scratch_, bits_, carry_, constants_;
  AscendC::LocalTensor<int16_t> sign_mask_, magnitude_mask_, kept_mask_, one_mask_;
  AscendC::LocalTensor<float> largest_;
};

// Loads `count` activations of a row, zeros behind them up to a whole chunk.
template <class T>
__aicore__ inline void load_chunk(AscendC::TPipe& pipe, const AscendC::LocalTensor<T>& x,
                                  const AscendC::GlobalTensor<T>& from, uint32_t count) {
  using namespace AscendC;
  if (count == kChunk) {
    DataCopy(x, from, kChunk);
    return;
  }
  Duplicate(x.template ReinterpretCast<int16_t>(), static_cast<int16_t>(0),
            static_cast<int32_t>(kChunk * sizeof(T) / sizeof(int16_t)));
  order<HardEvent::V_MTE2>(pipe);
  constexpr uint32_t block = 32 / sizeof(T);
  const DataCopyExtParams burst(1, count * static_cast<uint32_t>(sizeof(T)), 0, 0, 0);
  DataCopyPadExtParams<T> padding;
  padding.isPad = true;
  padding.rightPadding = static_cast<uint8_t>((block - count % block) % block);
  DataCopyPad(x, from, burst, padding);
}

}  // namespace qwen3_fp8_ascend
