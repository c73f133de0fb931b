// Scalar conversions between fp32, bf16, fp16 and e4m3, as plain arithmetic that compilers can vectorise.
//
// Everything here has internal linkage on purpose: this header is compiled once per instruction set, and a
// shared symbol could be resolved to the copy that needs AVX-512 on a machine that has none.
#pragma once

#include <cstdint>
#include <cstring>

namespace qwen3_fp8_ascend::cpu {
namespace {

constexpr float kE4m3Max = 448.0f;
constexpr float kAmaxFloor = 1e-10f;
constexpr std::uint32_t kFp32Infinity = 0x7f800000u;
constexpr std::uint8_t kNanCode = 0x7f;

// bf16 bits of an e4m3 code, sign excluded; every finite e4m3 value is exact in bf16.
constexpr std::uint16_t bf16_of_magnitude(unsigned code) {
  const unsigned exponent = (code >> 3) & 15u;
  const unsigned mantissa = code & 7u;
  if ((code & 0x7fu) == kNanCode) return 0x7fc0;
  if (exponent != 0) return static_cast<std::uint16_t>(((exponent + 120u) << 7) | (mantissa << 4));
  if (mantissa == 0) return 0;
  const unsigned top = mantissa >= 4 ? 2u : (mantissa >= 2 ? 1u : 0u);
  return static_cast<std::uint16_t>(((118u + top) << 7) | (((mantissa << (3u - top)) & 7u) << 4));
}

// The two bytes of bf16_of_magnitude for every code, as separate byte tables.
struct DecodeTables {
  alignas(64) std::uint8_t high[128];
  alignas(64) std::uint8_t low[128];
};

// Tables of code * 2^exponent; the exponent must leave all of them normal numbers.
constexpr DecodeTables make_decode_tables(int exponent) {
  DecodeTables tables{};
  for (unsigned code = 0; code < 128; ++code) {
    const bool scalable = code != 0 && code != kNanCode;
    const int bits = bf16_of_magnitude(code) + (scalable ? exponent * 128 : 0);
    tables.high[code] = static_cast<std::uint8_t>(bits >> 8);
    tables.low[code] = static_cast<std::uint8_t>(bits & 0xff);
  }
  return tables;
}

constexpr DecodeTables kDecodeTables = make_decode_tables(0);

inline std::uint32_t bits_of(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float float_of(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// 2^exponent, a normal number.
inline float power_of_two(int exponent) { return float_of(static_cast<std::uint32_t>(exponent + 127) << 23); }

// The smallest power of two that is not below a positive normal number: any bit of the mantissa carries into the
// exponent. Infinity and NaN stay.
inline float round_up_to_power_of_two(float value) {
  const std::uint32_t bits = bits_of(value);
  return bits > kFp32Infinity ? value : float_of((bits + 0x7fffffu) & kFp32Infinity);
}

inline float fp32_of_bf16(std::uint16_t bits) { return float_of(static_cast<std::uint32_t>(bits) << 16); }

// Round to nearest even; a NaN stays a (quiet) NaN.
inline std::uint16_t bf16_of_fp32(float value) {
  const std::uint32_t bits = bits_of(value);
  const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const std::uint32_t quiet = (bits >> 16) | 0x40u;
  const bool is_nan = static_cast<std::int32_t>(bits & 0x7fffffffu) > static_cast<std::int32_t>(kFp32Infinity);
  return static_cast<std::uint16_t>(is_nan ? quiet : rounded);
}

inline float fp32_of_fp16(std::uint16_t half) {
  const std::uint32_t magnitude = half & 0x7fffu;
  const std::uint32_t sign = static_cast<std::uint32_t>(half & 0x8000u) << 16;
  const std::uint32_t finite = bits_of(float_of(magnitude << 13) * 0x1p112f);
  const std::uint32_t special = (magnitude << 13) | kFp32Infinity;
  return float_of(sign | (magnitude >= 0x7c00u ? special : finite));
}

// Round to nearest even; overflow gives infinity, a NaN stays a (quiet) NaN.
inline std::uint16_t fp16_of_fp32(float value) {
  const std::uint32_t sign = (bits_of(value) >> 16) & 0x8000u;
  const std::uint32_t bits = bits_of(value) & 0x7fffffffu;
  const std::uint32_t normal = ((bits + 0xfffu + ((bits >> 13) & 1u)) >> 13) - (112u << 10);
  // 0.5 has the spacing of fp16 subnormals in its last bit, so that the addition rounds to them.
  const std::uint32_t subnormal = bits_of(float_of(bits) + 0.5f) - bits_of(0.5f);
  std::uint32_t out = bits < 0x38800000u ? subnormal : normal;
  out = bits >= 0x477ff000u ? 0x7c00u : out;
  out = bits > kFp32Infinity ? 0x7e00u : out;
  return static_cast<std::uint16_t>(sign | out);
}

}  // namespace
}  // namespace qwen3_fp8_ascend::cpu
