// One or two rows of activations times codes that become fp32 numbers without a conversion, for cores that multiply
// subnormal numbers as fast as others: AMD's.
//
// code << 20 with the sign on top is the fp32 number code * 2^-120; e4m3's subnormals are fp32's. Activations are taken
// 2^64 times, so that products are ordinary numbers again. A register holds one k of as many weight rows as it has
// lanes, and each output is the same two chains as in tiles_fma.h. They have the same bits as long as no sum of theirs
// is rounded for being subnormal or grows beyond fp32: `take_subnormals` looks whether the activations allow that. What
// is quantized does, and what is not, unless a number is 2^137 times as large as another in its scale block.
#pragma once

#include <algorithm>

#include "registers.h"
#include "tiles_fma.h"

namespace qwen3_fp8_ascend::cpu {
namespace {

constexpr float kRaise = 0x1p64f;                // of activations
constexpr float kSubnormalFactor = 0x1p56f;      // undoes it and the 2^-120 of the decoded numbers
constexpr int kRegisterBytes = 4 * kLanes;       // of a quad: the codes of as many weight rows as a register has lanes
constexpr int kRegisters = kPanelRows / kLanes;  // of a quad
constexpr std::int64_t kSubnormalRows = 2;       // the most that have registers for their sums and their activations

// While this lives, subnormal numbers are what they are: a program may have them taken for zero.
class SubnormalsKept {
 public:
  SubnormalsKept() : before_(_mm_getcsr()) {
    _mm_setcsr(before_ & ~static_cast<unsigned>(_MM_FLUSH_ZERO_MASK | kDenormalsAreZero));
  }
  ~SubnormalsKept() { _mm_setcsr(before_); }
  SubnormalsKept(const SubnormalsKept&) = delete;
  SubnormalsKept& operator=(const SubnormalsKept&) = delete;

 private:
  static constexpr unsigned kDenormalsAreZero = 0x40;  // MXCSR's bit

  unsigned before_;
};

// bf16 bits of a power of two.
constexpr std::uint16_t bf16_power(int exponent) { return static_cast<std::uint16_t>((exponent + 127) << 7); }

// Whether each of the activations is zero or within [2^-77, 2^62): a product is then a multiple of 2^-149 (x has 8
// significant bits, a code is a multiple of 2^-9), and so is each sum; and no sum of a chunk reaches 2^22.
inline bool take_subnormals(const Activation& x, const Depth& depth) {
  std::uint16_t most = 0;
  std::uint16_t least = 0xffff;  // less one, as 16 bits: zero is the largest
  for (std::int64_t chunk = 0; chunk < depth.chunks; ++chunk) {
    const std::int64_t length = depth.length_of(chunk);
    for (std::int64_t row = 0; row < x.rows; ++row) {
      const std::uint16_t* values = x.values_of(chunk, row);
      for (std::int64_t i = 0; i < length; ++i) {
        const auto magnitude = static_cast<std::uint16_t>(values[i] & 0x7fff);
        most = std::max(most, magnitude);
        least = std::min(least, static_cast<std::uint16_t>(magnitude - 1));
      }
    }
  }
  return most < bf16_power(62) && least >= bf16_power(-77) - 1;
}

// Codes of a quad, shifted: each word has a magnitude in bits 4 to 10, the sign in all bits above, and below anything.
// Those of k and k + 1 are the lower bytes of the words that are packed, those of k + 2 and k + 3 the upper ones.
template <int Rows>
[[gnu::always_inline]] inline Words shifted_lower(const std::uint8_t* codes, Words sixteen) {
  // A product instead of two shifts; but with two rows it is the multipliers that are busy.
  if constexpr (Rows == 1) return multiply_bytes(sixteen, load_bytes(codes));
  return shift_words_right<4>(shift_words_left<8>(load_bytes(codes)));
}

[[gnu::always_inline]] inline Words shifted_upper(const std::uint8_t* codes) {
  return shift_words_right<4>(load_bytes(codes));
}

// Adds the products with one k: that in the upper halves of the lanes.
template <int Rows, int Together, int Registers>
[[gnu::always_inline]] inline void multiply_k(const Words (&shifted)[Together], Words number, const float* x, int first,
                                              Numbers (&sums)[Rows][Registers]) {
  Numbers w[Together];
#pragma GCC unroll 2
  for (int g = 0; g < Together; ++g) w[g] = as_numbers(and_words(shifted[g], number));
#pragma GCC unroll 2
  for (int r = 0; r < Rows; ++r) {
    const Numbers value = all(x[r * kChunk]);
#pragma GCC unroll 2
    for (int g = 0; g < Together; ++g) sums[r][first + g] = fused(w[g], value, sums[r][first + g]);
  }
}

// With both: k is in the lower halves, k + 1 in the upper ones.
template <int Rows, int Together, int Registers>
[[gnu::always_inline]] inline void multiply_both(Words (&shifted)[Together], Words number, const float* x, int first,
                                                 Numbers (&even)[Rows][Registers], Numbers (&odd)[Rows][Registers]) {
  multiply_k(shifted, number, x + 1, first, odd);
#pragma GCC unroll 2
  for (int g = 0; g < Together; ++g) shifted[g] = upper_halves(shifted[g]);
  multiply_k(shifted, number, x, first, even);
}

// `Rows` rows times the quads of as many weight rows as `Registers` registers have lanes, scaled and added to the sums.
// Not inlined, and with a copy of what it is given: its loop gets all registers.
template <int Rows, int Registers, class Ahead>
[[gnu::noinline]] void multiply_subnormals(const Operands& o, const std::uint8_t* codes, const Ahead& given_ahead) {
  constexpr int kTogether = Rows;  // registers: more would leave none for the codes
  const Ahead ahead = given_ahead;
  const Words number = all_bits_of(0x87f00000u);
  const Words sixteen = all_words(16);
  const float* x = o.x[0];
  const std::int64_t end = o.quads * Place::kStepX;
  Numbers even[Rows][Registers];
  Numbers odd[Rows][Registers];
  clear(even);
  clear(odd);
  Place place;
  for (; place.x < end; place.advance<kGroups>(1)) {
    ahead.template beside<kGroups * Registers / kRegisters>(place);
    const float* at = at_byte(x, place.x);
    const std::uint8_t* quad = codes + place.x * (kQuadBytes / Place::kStepX);
    const std::uint8_t* again = quad;
    asm("" : "+r"(again));  // g++ would keep what it has loaded, and sums on the stack for it
#pragma GCC unroll 4
    for (int first = 0; first < Registers; first += kTogether) {
      Words shifted[kTogether];
#pragma GCC unroll 2
      for (int g = 0; g < kTogether; ++g) {
        shifted[g] = shifted_lower<Rows>(quad + (first + g) * kRegisterBytes, sixteen);
      }
      multiply_both(shifted, number, at, first, even, odd);
#pragma GCC unroll 2
      for (int g = 0; g < kTogether; ++g) shifted[g] = shifted_upper(again + (first + g) * kRegisterBytes);
      multiply_both(shifted, number, at + 2, first, even, odd);
    }
  }
  const Numbers w_scale = all(o.w_scale);
  float* sums = o.sums[0];
#pragma GCC unroll 2
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
    for (int g = 0; g < Registers; ++g) {
      const Numbers exact = multiply(add(even[r][g], odd[r][g]), all(kSubnormalFactor));
      const Numbers scaled = multiply(exact, all(o.x_scale[r]));
      float* sum = sums + r * kPanelRows + g * kLanes;
      store_numbers(sum, fused(scaled, w_scale, load_numbers(sum)));
    }
  }
}

}  // namespace
}  // namespace qwen3_fp8_ascend::cpu
