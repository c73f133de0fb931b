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

// `Rows` rows times the quads of as many weight rows as `Registers` registers have lanes, scaled and added to the sums.
// Not inlined, and with a copy of what it is given: its loop gets all registers.
template <int Rows, int Registers, class Ahead>
[[gnu::noinline]] void multiply_subnormals(const Operands& o, const std::uint8_t* codes, const Ahead& given_ahead) {
  constexpr int kTogether = std::min(Rows, Registers);  // registers: more would leave none for the codes
  const Ahead ahead = given_ahead;
  const Words number = all_bits_of(0x87f00000u);
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
#pragma GCC unroll 4
    for (int first = 0; first < Registers; first += kTogether) {
      // Words whose upper byte is a code: of k and k + 1 in the halves of a lane, then of k + 2 and k + 3. An
      // arithmetic shift makes copies of the sign; the mask clears them and what is behind the code.
      Words low[kTogether];
      Words high[kTogether];
#pragma GCC unroll 2
      for (int g = 0; g < kTogether; ++g) {
        high[g] = load_bytes(quad + (first + g) * kRegisterBytes);
        low[g] = shift_words_right<4>(shift_words_left<8>(high[g]));
        high[g] = shift_words_right<4>(high[g]);
      }
      const auto multiply_k = [&](int k, const Words(&pair)[kTogether], auto lower_half,
                                  Numbers(&sums)[Rows][Registers]) __attribute__((always_inline)) {
        Numbers w[kTogether];
#pragma GCC unroll 2
        for (int g = 0; g < kTogether; ++g) {
          const Words moved = decltype(lower_half)::value ? upper_halves(pair[g]) : pair[g];
          w[g] = as_numbers(and_words(moved, number));
        }
#pragma GCC unroll 2
        for (int r = 0; r < Rows; ++r) {
          const Numbers value = all(at[r * kChunk + k]);
#pragma GCC unroll 2
          for (int g = 0; g < kTogether; ++g) sums[r][first + g] = fused(w[g], value, sums[r][first + g]);
        }
      };
      multiply_k(0, low, std::true_type(), even);
      multiply_k(1, low, std::false_type(), odd);
      multiply_k(2, high, std::true_type(), even);
      multiply_k(3, high, std::false_type(), odd);
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
