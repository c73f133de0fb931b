// The kernels for NEON as every AArch64 processor has it (Kunpeng 920, Graviton 2): fp32 multiply-adds.
//
// A unit holds a quad of one row as fp32. (code & 0x7f) << 7 with the sign on top is the fp16 number code * 2^-8,
// subnormals included, which the processor converts to fp32 exactly.
#include "linear_neon.h"

namespace qwen3_fp8_ascend::cpu {
namespace {

struct Fp32Arithmetic {
  using Unit = float32x4_t;
  static constexpr int kUnitRows = 1;
  static constexpr float kDecodeFactor = 256.0f;

  template <bool HasNan>
  static void decode(const std::uint8_t* codes, Unit* units) {
    const int8x16_t code = vreinterpretq_s8_u8(vld1q_u8(codes));
    const float16x8_t low = half_of<HasNan>(vshll_n_s8(vget_low_s8(code), 7));
    const float16x8_t high = half_of<HasNan>(vshll_high_n_s8(code, 7));
    units[0] = vcvt_f32_f16(vget_low_f16(low));
    units[1] = vcvt_high_f32_f16(low);
    units[2] = vcvt_f32_f16(vget_low_f16(high));
    units[3] = vcvt_high_f32_f16(high);
  }

  static Unit arrange(const std::uint16_t* const* rows, std::int64_t quad) {
    return vreinterpretq_f32_u32(vshll_n_u16(swap_middle(vld1_u16(rows[0] + quad * 4)), 16));
  }

  static float32x4_t multiply(float32x4_t sum, Unit x, Unit w) { return vfmaq_f32(sum, x, w); }

  static float32x4_t collect(const float32x4_t* sums, int) {
    return vpaddq_f32(vpaddq_f32(sums[0], sums[1]), vpaddq_f32(sums[2], sums[3]));
  }

 private:
  // Widening a code has doubled its sign: the copy goes. The numbers of all ones (480 * 2^-8) are NaN codes.
  template <bool HasNan>
  static float16x8_t half_of(int16x8_t shifted) {
    uint16x8_t half = vandq_u16(vreinterpretq_u16_s16(shifted), vdupq_n_u16(0xbfff));
    if constexpr (HasNan) {
      const uint16x8_t ones = vdupq_n_u16(0x3f80);
      const uint16x8_t is_nan = vceqq_u16(vandq_u16(half, ones), ones);
      half = vorrq_u16(half, vandq_u16(is_nan, vdupq_n_u16(0x7e00)));
    }
    return vreinterpretq_f16_u16(half);
  }
};

}  // namespace

constexpr Kernels kNeonKernels = [] {
  Kernels kernels = run_kernels();
  kernels.linear = linear<Fp32Arithmetic>;
  kernels.scratch_bytes = sizeof(NeonScratch<Fp32Arithmetic>);
  kernels.max_rows = kMaxRows;
  kernels.register_rows = kRegisterRows<Fp32Arithmetic>;
  return kernels;
}();

}  // namespace qwen3_fp8_ascend::cpu
