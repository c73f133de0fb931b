// Decoding for processors that convert fp16 numbers: AVX2 with F16C, and AVX-512.
//
// (code & 0x7f) << 7 with the sign on top is the fp16 number code * 2^-8, subnormals included; a conversion makes it
// fp32. An fp32 register then holds a pair of k for each of some weight rows (a group), as the packed codes have them.
#pragma once

#include "kernels.h"
#include "registers.h"

namespace qwen3_fp8_ascend::cpu {
namespace {

constexpr float kDecodeFactor = 256.0f;  // undoes the 2^-8 of the decoded numbers
constexpr int kGroupRows = kLanes / 2;
constexpr int kGroups = kPanelRows / kGroupRows;
constexpr int kGroupBytes = 4 * kGroupRows;  // of a quad

// A chunk of a panel is decoded in strips of two, four or all groups, as fp16 bits or as fp32:
// [pair of k][group of the strip][weight row, k within the pair].
constexpr int kGroupNumbers = 2 * kGroupRows;
constexpr int strip_numbers(int groups) { return kChunk / 2 * groups * kGroupNumbers; }

// Constants of the decoder. Where registers are short they are kept in memory, and read there each time: as constants
// the compiler would hold them in registers, and spill sums for it.
struct DecodeMasks {
  Words to_top = in_each_lane(_mm_setr_epi8(-1, 0, -1, 2, -1, 4, -1, 6, -1, 8, -1, 10, -1, 12, -1, 14));
  Words number = all_words(0xbf80);
};

// fp16 numbers of two groups at (k, k + 1) and at (k + 2, k + 3).
struct TwoGroups {
  Words pair0;
  Words pair1;
};

// The fp16 numbers of all ones (480 * 2^-8) are what NaN codes become.
inline Words restore_nan(Words half) {
  const Words ones = all_words(0x3f80);
  return set_where_equal(half, and_words(half, ones), ones, 0x7e00);
}

// The codes that two groups have of a quad.
template <bool HasNan>
[[gnu::always_inline]] inline TwoGroups decode(const std::uint8_t* codes, const DecodeMasks& masks) {
  Words code = load_bytes(codes);
  asm("" : "+v"(code));  // g++ would load it twice
  // An arithmetic shift doubles the sign; the mask clears its copy and what is left of the neighbouring byte. Even
  // bytes are moved by a shuffle, which is done elsewhere than shifts, conversions and multiplications.
  const Words even = shift_words_right<1>(shuffle_bytes(code, masks.to_top));
  const Words odd = shift_words_right<1>(code);
  TwoGroups half{and_words(even, masks.number), and_words(odd, masks.number)};
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
    store_words(out + group * kGroupNumbers, half.pair0);
    store_words(out + (Groups + group) * kGroupNumbers, half.pair1);
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

}  // namespace
}  // namespace qwen3_fp8_ascend::cpu
