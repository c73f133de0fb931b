// Registers of fp32 numbers and of 16-bit words, as wide as the instruction set has them for which a file is compiled:
// AVX-512 (F and BW), or AVX2 with FMA and F16C. What is done with them has one name in both.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace qwen3_fp8_ascend::cpu {
namespace {

#if defined(__AVX512F__)

using Numbers = __m512;
using Words = __m512i;

constexpr int kLanes = 16;  // fp32 numbers in a register
constexpr int kSums = 24;   // of 32 registers, what a tile has for its sums; the others are for its operands
constexpr int kSumsBesideConstants = 20;  // what it may have while the decoder's constants stay in registers too

[[gnu::always_inline]] inline Numbers zero() { return _mm512_setzero_ps(); }
[[gnu::always_inline]] inline Numbers all(float x) { return _mm512_set1_ps(x); }
[[gnu::always_inline]] inline Numbers load_numbers(const float* x) { return _mm512_load_ps(x); }
[[gnu::always_inline]] inline void store_numbers(float* out, Numbers x) { _mm512_store_ps(out, x); }
[[gnu::always_inline]] inline Numbers add(Numbers a, Numbers b) { return _mm512_add_ps(a, b); }
[[gnu::always_inline]] inline Numbers multiply(Numbers a, Numbers b) { return _mm512_mul_ps(a, b); }
[[gnu::always_inline]] inline Numbers fused(Numbers a, Numbers b, Numbers sum) { return _mm512_fmadd_ps(a, b, sum); }

// Two consecutive numbers, again and again.
[[gnu::always_inline]] inline Numbers repeat_pair(const float* x) {
  double pair;  // a load through a pointer to double could be moved before the stores of floats
  std::memcpy(&pair, x, sizeof pair);
  return _mm512_castpd_ps(_mm512_set1_pd(pair));
}

// The sum of each pair of a, then of b.
[[gnu::always_inline]] inline Numbers add_pairs(Numbers a, Numbers b) {
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
  return _mm512_add_ps(_mm512_permutex2var_ps(a, even, b), _mm512_permutex2var_ps(a, odd, b));
}

// From memory a conversion is one operation, from a register two or more.
[[gnu::always_inline]] inline Numbers widen_fp16(const std::uint16_t* half) {
  return _mm512_cvtph_ps(_mm256_load_si256(reinterpret_cast<const __m256i*>(half)));
}

[[gnu::always_inline]] inline Words all_words(int x) { return _mm512_set1_epi16(static_cast<short>(x)); }
[[gnu::always_inline]] inline Words all_bits_of(std::uint32_t x) { return _mm512_set1_epi32(static_cast<int>(x)); }
[[gnu::always_inline]] inline Numbers as_numbers(Words x) { return _mm512_castsi512_ps(x); }
[[gnu::always_inline]] inline Words load_bytes(const std::uint8_t* x) { return _mm512_loadu_si512(x); }
[[gnu::always_inline]] inline void store_words(std::uint16_t* out, Words x) { _mm512_store_si512(out, x); }
[[gnu::always_inline]] inline Words and_words(Words a, Words b) { return _mm512_and_si512(a, b); }

// Signed bytes times unsigned factors, the two of each word added.
[[gnu::always_inline]] inline Words multiply_bytes(Words factors, Words x) { return _mm512_maddubs_epi16(factors, x); }

template <int Bits>
[[gnu::always_inline]] inline Words shift_words_left(Words x) {
  return _mm512_slli_epi16(x, Bits);
}
template <int Bits>
[[gnu::always_inline]] inline Words shift_words_right(Words x) {  // signed
  return _mm512_srai_epi16(x, Bits);
}
[[gnu::always_inline]] inline Words upper_halves(Words x) { return _mm512_slli_epi32(x, 16); }  // from the lower
[[gnu::always_inline]] inline Words shuffle_bytes(Words x, Words places) { return _mm512_shuffle_epi8(x, places); }
[[gnu::always_inline]] inline Words in_each_lane(__m128i x) { return _mm512_broadcast_i32x4(x); }

// x, with `bits` set in the words whose place in `compared` holds what `word` does.
[[gnu::always_inline]] inline Words set_where_equal(Words x, Words compared, Words word, int bits) {
  const __mmask32 equal = _mm512_cmpeq_epi16_mask(compared, word);
  return _mm512_or_si512(x, _mm512_maskz_mov_epi16(equal, all_words(bits)));
}

#else

using Numbers = __m256;
using Words = __m256i;

constexpr int kLanes = 8;
constexpr int kSums = 12;  // of 16
constexpr int kSumsBesideConstants = 8;

[[gnu::always_inline]] inline Numbers zero() { return _mm256_setzero_ps(); }
[[gnu::always_inline]] inline Numbers all(float x) { return _mm256_set1_ps(x); }
[[gnu::always_inline]] inline Numbers load_numbers(const float* x) { return _mm256_load_ps(x); }
[[gnu::always_inline]] inline void store_numbers(float* out, Numbers x) { _mm256_store_ps(out, x); }
[[gnu::always_inline]] inline Numbers add(Numbers a, Numbers b) { return _mm256_add_ps(a, b); }
[[gnu::always_inline]] inline Numbers multiply(Numbers a, Numbers b) { return _mm256_mul_ps(a, b); }
[[gnu::always_inline]] inline Numbers fused(Numbers a, Numbers b, Numbers sum) { return _mm256_fmadd_ps(a, b, sum); }

[[gnu::always_inline]] inline Numbers repeat_pair(const float* x) {
  return _mm256_castpd_ps(_mm256_broadcast_sd(reinterpret_cast<const double*>(x)));
}

[[gnu::always_inline]] inline Numbers add_pairs(Numbers a, Numbers b) {
  const __m256 sums = _mm256_hadd_ps(a, b);  // two of a, two of b, two of a, two of b
  return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(sums), _MM_SHUFFLE(3, 1, 2, 0)));
}

[[gnu::always_inline]] inline Numbers widen_fp16(const std::uint16_t* half) {
  return _mm256_cvtph_ps(_mm_load_si128(reinterpret_cast<const __m128i*>(half)));
}

[[gnu::always_inline]] inline Words all_words(int x) { return _mm256_set1_epi16(static_cast<short>(x)); }
[[gnu::always_inline]] inline Words all_bits_of(std::uint32_t x) { return _mm256_set1_epi32(static_cast<int>(x)); }
[[gnu::always_inline]] inline Numbers as_numbers(Words x) { return _mm256_castsi256_ps(x); }

[[gnu::always_inline]] inline Words load_bytes(const std::uint8_t* x) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
}

[[gnu::always_inline]] inline void store_words(std::uint16_t* out, Words x) {
  _mm256_store_si256(reinterpret_cast<__m256i*>(out), x);
}

[[gnu::always_inline]] inline Words and_words(Words a, Words b) { return _mm256_and_si256(a, b); }

// Signed bytes times unsigned factors, the two of each word added.
[[gnu::always_inline]] inline Words multiply_bytes(Words factors, Words x) { return _mm256_maddubs_epi16(factors, x); }

template <int Bits>
[[gnu::always_inline]] inline Words shift_words_left(Words x) {
  return _mm256_slli_epi16(x, Bits);
}
template <int Bits>
[[gnu::always_inline]] inline Words shift_words_right(Words x) {  // signed
  return _mm256_srai_epi16(x, Bits);
}
[[gnu::always_inline]] inline Words upper_halves(Words x) { return _mm256_slli_epi32(x, 16); }  // from the lower
[[gnu::always_inline]] inline Words shuffle_bytes(Words x, Words places) { return _mm256_shuffle_epi8(x, places); }
[[gnu::always_inline]] inline Words in_each_lane(__m128i x) { return _mm256_broadcastsi128_si256(x); }

[[gnu::always_inline]] inline Words set_where_equal(Words x, Words compared, Words word, int bits) {
  return _mm256_or_si256(x, _mm256_and_si256(_mm256_cmpeq_epi16(compared, word), all_words(bits)));
}

#endif

}  // namespace
}  // namespace qwen3_fp8_ascend::cpu
