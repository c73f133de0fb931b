// Decoding for AVX2 and F16C.
//
// (code & 0x7f) << 7 with the sign on top is the fp16 number code * 2^-8, subnormals included; F16C makes it fp32. An
// fp32 register then holds a pair of k for each of four weight rows (a group), as the packed codes have them.
#pragma once

#include <immintrin.h>

#include "kernels.h"

namespace qwen3_fp8_ascend::cpu {
namespace {

constexpr float kDecodeFactor = 256.0f;  // undoes the 2^-8 of the decoded numbers
constexpr int kGroupRows = 4;
constexpr int kGroups = kPanelRows / kGroupRows;
constexpr int kGroupBytes = 4 * kGroupRows;  // of a quad

// A chunk of a panel is decoded in strips of two, four or all groups, as fp16 bits or as fp32:
// [pair of k][group of the strip][weight row, k within the pair].
constexpr int kGroupNumbers = 2 * kGroupRows;
constexpr int strip_numbers(int groups) { return kChunk / 2 * groups * kGroupNumbers; }

// Constants of the decoder. Where registers are short they are kept in memory, and read there each time: as constants
// the compiler would hold them in registers, and spill sums for it.
struct DecodeMasks {
  __m256i to_top = _mm256_setr_epi8(-1, 0, -1, 2, -1, 4, -1, 6, -1, 8, -1, 10, -1, 12, -1, 14,  //
                                    -1, 0, -1, 2, -1, 4, -1, 6, -1, 8, -1, 10, -1, 12, -1, 14);
  __m256i number = _mm256_set1_epi16(static_cast<short>(0xbf80));
};

// fp16 numbers of two groups at (k, k + 1) and at (k + 2, k + 3).
struct TwoGroups {
  __m256i pair0;
  __m256i pair1;
};

// The fp16 numbers of all ones (480 * 2^-8) are what NaN codes become.
inline __m256i restore_nan(__m256i half) {
  const __m256i ones = _mm256_set1_epi16(0x3f80);
  const __m256i is_nan = _mm256_cmpeq_epi16(_mm256_and_si256(half, ones), ones);
  return _mm256_or_si256(half, _mm256_and_si256(is_nan, _mm256_set1_epi16(0x7e00)));
}

// 32 codes of a quad.
template <bool HasNan>
[[gnu::always_inline]] inline TwoGroups decode(const std::uint8_t* codes, const DecodeMasks& masks) {
  __m256i code = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
  asm("" : "+x"(code));  // g++ would load it twice
  // An arithmetic shift doubles the sign; the mask clears its copy and what is left of the neighbouring byte. Even
  // bytes are moved by a shuffle, which is done elsewhere than shifts, conversions and multiplications.
  const __m256i even = _mm256_srai_epi16(_mm256_shuffle_epi8(code, masks.to_top), 1);
  const __m256i odd = _mm256_srai_epi16(code, 1);
  TwoGroups half{_mm256_and_si256(even, masks.number), _mm256_and_si256(odd, masks.number)};
  if constexpr (HasNan) half = {restore_nan(half.pair0), restore_nan(half.pair1)};
  return half;
}

// A quad's part of a strip, as two pairs of k.
template <bool HasNan, int Groups>
[[gnu::always_inline]] inline void decode_quad(const std::uint8_t* codes, const DecodeMasks& masks,
                                               std::uint16_t* out) {
#pragma GCC unroll 4
  for (int group = 0; group < Groups; group += 2) {
    const TwoGroups half = decode<HasNan>(codes + group * kGroupBytes, masks);
    _mm256_store_si256(reinterpret_cast<__m256i*>(out + group * kGroupNumbers), half.pair0);
    _mm256_store_si256(reinterpret_cast<__m256i*>(out + (Groups + group) * kGroupNumbers), half.pair1);
  }
}

template <bool HasNan, int Groups>
void decode_quads(const std::uint8_t* codes, std::int64_t quads, std::uint16_t* out) {
  const DecodeMasks masks;
  for (std::int64_t quad = 0; quad < quads; ++quad) {
    decode_quad<HasNan, Groups>(codes + quad * kQuadBytes, masks, out + quad * (2 * Groups * kGroupNumbers));
  }
}

// A whole strip.
template <int Groups>
void decode_strip(const std::uint8_t* codes, std::int64_t quads, bool has_nan, std::uint16_t* out) {
  if (has_nan) {
    decode_quads<true, Groups>(codes, quads, out);
  } else {
    decode_quads<false, Groups>(codes, quads, out);
  }
}

// A group's numbers as fp32. Conversions from memory take one operation where those from registers take two or more.
[[gnu::always_inline]] inline __m256 load_group(const std::uint16_t* half) {
  return _mm256_cvtph_ps(_mm_load_si128(reinterpret_cast<const __m128i*>(half)));
}

}  // namespace
}  // namespace qwen3_fp8_ascend::cpu
