// e4m3 to bf16 with AVX-512: 64 codes (four k of 16 rows) to two registers of bf16 pairs.
#pragma once

#include <immintrin.h>

#include "kernels.h"
#include "numbers.h"

namespace qwen3_fp8_ascend::cpu {
namespace {

constexpr int kHalf = 16;  // fp32 numbers in a register: half a panel

// bf16 pairs (k, k + 1) of 16 rows, and pairs (k + 2, k + 3).
struct HalfQuad {
  __m512i pair0;
  __m512i pair1;
};

// Codes that are read once: g++ would read them again for each operation that can take its operand from memory.
inline __m512i load_once(const std::uint8_t* codes) {
  __m512i code = _mm512_loadu_si512(codes);
  asm("" : "+v"(code));
  return code;
}

// By two byte tables: exact for all 256 codes. Cheapest where a two-register byte permutation is one operation (Zen).
class TableDecoder {
 public:
  explicit TableDecoder(const DecodeTables& tables)
      : high0_(_mm512_load_si512(tables.high)),
        high1_(_mm512_load_si512(tables.high + 64)),
        low0_(_mm512_load_si512(tables.low)),
        low1_(_mm512_load_si512(tables.low + 64)),
        sign_(_mm512_set1_epi8(static_cast<char>(0x80))),
        beside_(_mm512_broadcast_i32x4(_mm_setr_epi8(1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14))) {}

  HalfQuad operator()(const std::uint8_t* codes) const { return (*this)(load_once(codes)); }

  HalfQuad operator()(__m512i code) const {
    // The table lookup ignores the sign bit; high | (code & sign) puts it back.
    __m512i high = _mm512_permutex2var_epi8(high0_, code, high1_);
    high = _mm512_ternarylogic_epi32(high, code, sign_, 0xf8);
    const __m512i low = _mm512_permutex2var_epi8(low0_, code, low1_);
    // A number's two bytes are at the place of its code. Each result takes one of them from the byte beside it.
    return {_mm512_mask_shuffle_epi8(low, kOddBytes, high, beside_),
            _mm512_mask_shuffle_epi8(high, ~kOddBytes, low, beside_)};
  }

 private:
  static constexpr __mmask64 kOddBytes = 0xaaaaaaaaaaaaaaaa;

  __m512i high0_, high1_, low0_, low1_, sign_, beside_;
};

// By arithmetic, as code * 2^kExponent: exact for all codes but NaN. Cheapest where byte permutations are slow (Intel).
//
// A normal code's magnitude is exponent and mantissa of a bf16 number, once shifted and offset. Subnormals need another
// offset each, and zero must stay zero: a 16-byte table, whose lookup gives 0 for the indices of normal codes.
class ArithmeticDecoder {
 public:
  static constexpr int kExponent = -105;

  ArithmeticDecoder()
      : magnitude_(_mm512_set1_epi8(0x7f)),
        offset_(_mm512_set1_epi8(0x78)),
        correction_(_mm512_broadcast_i32x4(_mm_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, -120, -17, -10, -7, -4, -3, -2, -1))),
        even_(_mm512_set1_epi16(0x0010)),
        odd_(_mm512_set1_epi16(0x1000)),
        sign_(_mm512_set1_epi16(static_cast<short>(0x8000))) {
    // To be kept in registers: g++ would make some of them anew for every line.
    asm("" : "+v"(magnitude_), "+v"(offset_), "+v"(correction_), "+v"(even_), "+v"(odd_), "+v"(sign_));
  }

  HalfQuad operator()(const std::uint8_t* codes) const { return (*this)(_mm512_loadu_si512(codes)); }

  HalfQuad operator()(__m512i code) const {
    // Index 0x78 + mantissa for subnormals; the highest bit is set for all others, which makes the lookup give 0.
    const __m512i index = _mm512_add_epi8(_mm512_and_si512(code, magnitude_), offset_);
    const __m512i bits = _mm512_add_epi8(index, _mm512_shuffle_epi8(correction_, index));
    // Multiplying one byte by 16 and the other by 0 shifts, widens and selects at once.
    const __m512i even = _mm512_maddubs_epi16(bits, even_);
    const __m512i odd = _mm512_maddubs_epi16(bits, odd_);
    return {_mm512_ternarylogic_epi32(even, _mm512_slli_epi16(code, 8), sign_, 0xf8),
            _mm512_ternarylogic_epi32(odd, code, sign_, 0xf8)};
  }

 private:
  __m512i magnitude_, offset_, correction_, even_, odd_, sign_;
};

constexpr DecodeTables kScaledTables = make_decode_tables(ArithmeticDecoder::kExponent);

inline bool any_nan(const Weight& w, std::int64_t begin, std::int64_t end) {
  bool found = false;
  for (std::int64_t panel = begin; panel < end; ++panel) found |= w.panels[panel].has_nan != 0;
  return found;
}

// Calls body(decoder) with one for the panels [begin, end), on processors where byte permutations are slow: the weights
// are decoded as code * 2^ArithmeticDecoder::kExponent.
template <class Body>
void with_scaled_decoder(const Weight& w, std::int64_t begin, std::int64_t end, const Body& body) {
  if (any_nan(w, begin, end)) {
    body(TableDecoder(kScaledTables));
  } else {
    body(ArithmeticDecoder());
  }
}

}  // namespace
}  // namespace qwen3_fp8_ascend::cpu
