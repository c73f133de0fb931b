// The kernels for NEON with bf16 instructions (Armv8.6, optional from Armv8.2 on): Graviton 3, Kunpeng 920B, Grace.
//
// A unit holds a quad of two rows as bf16; bfmmla multiplies two rows of x with two weight rows. It rounds each sum of
// two products, and each addition of one to the running sum, to odd: up to an ulp where other instructions are off by
// half of one. It flushes subnormal numbers, which the powers of two of linear.cpp keep away.
#include "linear_neon.h"

namespace qwen3_fp8_ascend::cpu {
namespace {

// Weights are decoded as code * 2^-105, as for AMX: the four bits of a code's exponent, offset by 15, are the low ones
// of bf16's, and a byte holds them with the mantissa.
constexpr int kExponent = -105;
constexpr std::uint8_t kOffset = 0x78;

// That byte for the codes 0 to 15. Subnormals need an offset each; the normal ones among them are as all others.
struct SmallCodes {
  alignas(16) std::uint8_t bytes[16];
};

constexpr SmallCodes make_small_codes() {
  SmallCodes table{};
  for (unsigned code = 0; code < 16; ++code) {
    const int bits = bf16_of_magnitude(code) + (code != 0 ? kExponent * 128 : 0);
    table.bytes[code] = static_cast<std::uint8_t>(bits >> 4);
  }
  return table;
}

constexpr SmallCodes kSmallCodes = make_small_codes();
static_assert(kSmallCodes.bytes[15] == 15 + kOffset, "normal codes are offset alike");

struct Bf16Arithmetic {
  using Unit = bfloat16x8_t;
  static constexpr int kUnitRows = 2;
  static constexpr float kDecodeFactor = 1.0f;

  template <bool HasNan>
  static void decode(const std::uint8_t* codes, Unit* units) {
    const uint8x16_t code = vld1q_u8(codes);
    const uint8x16_t magnitude = vandq_u8(code, vdupq_n_u8(0x7f));
    // A lookup beyond the table leaves what is there.
    const uint8x16_t bits =
        vqtbx1q_u8(vaddq_u8(magnitude, vdupq_n_u8(kOffset)), vld1q_u8(kSmallCodes.bytes), magnitude);
    uint8x16_t low = vshlq_n_u8(bits, 4);
    uint8x16_t high = vsriq_n_u8(vandq_u8(code, vdupq_n_u8(0x80)), bits, 4);  // the sign, and the byte's upper half
    if constexpr (HasNan) {
      const uint8x16_t is_nan = vceqq_u8(magnitude, vdupq_n_u8(kNanCode));
      low = vorrq_u8(low, is_nan);
      high = vorrq_u8(high, is_nan);
    }
    units[0] = vreinterpretq_bf16_u8(vzip1q_u8(low, high));
    units[1] = vreinterpretq_bf16_u8(vzip2q_u8(low, high));
  }

  static Unit arrange(const std::uint16_t* const* rows, std::int64_t quad) {
    const uint16x4_t first = swap_middle(vld1_u16(rows[0] + quad * 4));
    const uint16x4_t second = swap_middle(vld1_u16(rows[1] + quad * 4));
    return vreinterpretq_bf16_u16(vcombine_u16(first, second));
  }

  static float32x4_t multiply(float32x4_t sum, Unit x, Unit w) { return vbfmmlaq_f32(sum, x, w); }

  // A sum holds two weight rows for the first row of x, and the same two for the second.
  static float32x4_t collect(const float32x4_t* sums, int row) {
    return row == 0 ? vcombine_f32(vget_low_f32(sums[0]), vget_low_f32(sums[1]))
                    : vcombine_f32(vget_high_f32(sums[0]), vget_high_f32(sums[1]));
  }
};

}  // namespace

constexpr Kernels kNeonBf16Kernels = [] {
  Kernels kernels = run_kernels();
  kernels.weight_exponent = kExponent;
  kernels.linear = linear<Bf16Arithmetic>;
  kernels.scratch_bytes = sizeof(NeonScratch<Bf16Arithmetic>);
  kernels.max_rows = kMaxRows;
  kernels.register_rows = kRegisterRows<Bf16Arithmetic>;
  return kernels;
}();

}  // namespace qwen3_fp8_ascend::cpu
