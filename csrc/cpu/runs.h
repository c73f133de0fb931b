// Work on runs of numbers (quantize, split, dequantize, silu, sums, store), written as plain loops that the compiler
// vectorises for the instruction set of the file that includes this. Internal linkage: see numbers.h.
#pragma once

#include "kernels.h"
#include "numbers.h"

#if defined(__F16C__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace qwen3_fp8_ascend::cpu {
namespace {

constexpr std::int64_t kRun = 128;

// The 16-bit number at `index`; a tensor over a buffer (torch.frombuffer) may start at any address.
inline std::uint16_t load_16(const char* x, std::int64_t index) {
  std::uint16_t bits;
  std::memcpy(&bits, x + index * 2, sizeof bits);
  return bits;
}

// Two numbers of 16 bits, the first of them in the lower half.
inline std::uint32_t load_pair(const char* x, std::int64_t pair) {
  std::uint32_t bits;
  std::memcpy(&bits, x + pair * 4, sizeof bits);
  return bits;
}

// Calls body(i) for i in [0, count). A whole run gets a loop of its own, whose length the compiler knows.
template <class Body>
inline void for_each(std::int64_t count, const Body& body) {
  if (count == kRun) {
    for (int i = 0; i < static_cast<int>(kRun); ++i) body(i);
  } else {
    for (int i = 0; i < static_cast<int>(count); ++i) body(i);
  }
}

// `count` <= kRun numbers from x + offset, as fp32.
inline void load_run(const void* x, Dtype dtype, std::int64_t offset, std::int64_t count, float* out) {
  if (dtype == Dtype::fp32) {
    std::memcpy(out, static_cast<const char*>(x) + offset * 4, static_cast<std::size_t>(count) * sizeof(float));
    return;
  }
  const char* first = static_cast<const char*>(x) + offset * 2;
  if (dtype == Dtype::bf16) {
    for_each(count, [=](int i) { out[i] = fp32_of_bf16(load_16(first, i)); });
    return;
  }
  std::int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= count; i += 8) {
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(first + i * 2))));
  }
#elif defined(__aarch64__)
  for (; i + 4 <= count; i += 4) {
    const uint8x8_t half = vld1_u8(reinterpret_cast<const std::uint8_t*>(first + i * 2));
    vst1q_f32(out + i, vcvt_f32_f16(vreinterpret_f16_u8(half)));
  }
#endif
  for (; i < count; ++i) out[i] = fp32_of_fp16(load_16(first, i));
}

// Rounds to dtype; `count` <= kRun.
inline void store_run(const float* values, std::int64_t count, Dtype dtype, void* out, std::int64_t offset) {
  if (dtype == Dtype::fp32) {
    std::memcpy(static_cast<float*>(out) + offset, values, static_cast<std::size_t>(count) * sizeof(float));
    return;
  }
  auto* bits = static_cast<std::uint16_t*>(out) + offset;
  if (dtype == Dtype::bf16) {
    for (std::int64_t i = 0; i < count; ++i) bits[i] = bf16_of_fp32(values[i]);
    return;
  }
  std::int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= count; i += 8) {
    const __m128i half = _mm256_cvtps_ph(_mm256_loadu_ps(values + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(bits + i), half);
  }
#elif defined(__aarch64__)
  for (; i + 4 <= count; i += 4) vst1_u16(bits + i, vreinterpret_u16_f16(vcvt_f16_f32(vld1q_f32(values + i))));
#endif
  for (; i < count; ++i) bits[i] = fp16_of_fp32(values[i]);
}

// Magnitudes compare as integers, and a NaN compares above infinity: the maximum keeps it.
inline float bf16_amax(const char* x, std::int64_t count) {
  std::int16_t largest = 0;
  for (std::int64_t start = 0; start < count; start += kRun) {
    const std::int64_t length = count - start < kRun ? count - start : kRun;
    for_each(length, [&, first = x + start * 2](int i) {
      const auto magnitude = static_cast<std::int16_t>(load_16(first, i) & 0x7fffu);
      largest = magnitude > largest ? magnitude : largest;
    });
  }
  return fp32_of_bf16(static_cast<std::uint16_t>(largest));
}

inline float amax(const void* x, Dtype dtype, std::int64_t count) {
  if (dtype == Dtype::bf16) return bf16_amax(static_cast<const char*>(x), count);
  std::int32_t largest = 0;
  float run[kRun];
  for (std::int64_t start = 0; start < count; start += kRun) {
    const std::int64_t length = count - start < kRun ? count - start : kRun;
    load_run(x, dtype, start, length, run);
    for_each(length, [&](int i) {
      const auto magnitude = static_cast<std::int32_t>(bits_of(run[i]) & 0x7fffffffu);
      largest = magnitude > largest ? magnitude : largest;
    });
  }
  return float_of(static_cast<std::uint32_t>(largest));
}

constexpr std::uint32_t kLeastNormal = (127 - 6) << 23;  // bits of the smallest normal e4m3 number, 2^-6

constexpr std::int32_t larger(std::int32_t a, std::int32_t b) { return a > b ? a : b; }

// Nearest e4m3 number (ties to even) of one whose magnitude is below 464, where they end; a NaN stays NaN, and what
// becomes zero loses its sign.
inline float round_to_e4m3(float value) {
  // 1.5 * 2^(e + 20) has the spacing of e4m3 numbers of exponent e in its last bit, so that adding it rounds.
  constexpr std::uint32_t kAbove = (20u << 23) + (1u << 22);
  const auto exponent = static_cast<std::int32_t>((bits_of(value) & kFp32Infinity) + kAbove);
  const float anchor = float_of(static_cast<std::uint32_t>(larger(exponent, kLeastNormal + kAbove)));
  return (value + anchor) - anchor;
}

// How a number is divided by its scale. Where the processor has fused multiply-adds, Newton steps from the product with
// the reciprocal take a fraction of a division's time, and what e4m3 makes of the quotient is the same:
//
// - Two steps give the correctly rounded quotient (Markstein, "Computation of elementary functions on the IBM RISC
//   System/6000 processor", 1990): the first makes it faithful, and the second rounds it, since the reciprocal is
//   rounded to nearest and the remainder is exact.
// - After one it may be an ulp off, where the exact quotient is within 2^-23 of an ulp of the middle of two floats. It
//   matters only where e4m3 rounds up on one side of that middle and down on the other. bf16 numbers are too coarse to
//   get there with the scale of a group of them (tests/backends/test_cpu_backend.py divides all by all).
//
// Remainders underflow only where the quotient is far below what becomes zero. Not so with a scale that is infinite or
// NaN: those divide.
enum class Quotient { divided, one_step, two_steps };

inline Quotient quotient_for(Dtype dtype, float scale) {
#if defined(__FMA__) || defined(__aarch64__)
  if ((bits_of(scale) & kFp32Infinity) == kFp32Infinity) return Quotient::divided;
  return dtype == Dtype::bf16 ? Quotient::one_step : Quotient::two_steps;
#else
  static_cast<void>(dtype);
  static_cast<void>(scale);
  return Quotient::divided;
#endif
}

// Numbers divided by one scale, which is a 448th of the largest of them or more, rounded to the e4m3 grid.
template <Quotient How>
class Quantizer {
 public:
  explicit Quantizer(float scale) : scale_(scale), reciprocal_(1.0f / scale) {}

  float operator()(float value) const {
    return float_of(bits_of(round_to_e4m3(quotient(value))) | (bits_of(value) & 0x80000000u));
  }

 private:
  float quotient(float value) const {
    if constexpr (How == Quotient::divided) {
      return value / scale_;
    } else {
      const float nearer = step(value, value * reciprocal_);
      return How == Quotient::one_step ? nearer : step(value, nearer);
    }
  }

  float step(float value, float quotient) const {
    return __builtin_fmaf(__builtin_fmaf(-quotient, scale_, value), reciprocal_, quotient);
  }

  float scale_;
  float reciprocal_;
};

// Code of a number that is on the e4m3 grid, or NaN.
inline std::uint8_t code_of(float value) {
  const std::uint32_t bits = bits_of(value) & 0x7fffffffu;
  const auto comparable = static_cast<std::int32_t>(bits);  // few instruction sets compare unsigned numbers
  const std::uint32_t sign = (bits_of(value) >> 24) & 0x80u;
  const std::uint32_t normal = (bits >> 20) - (120u << 3);
  // 2^14 has the spacing of e4m3 subnormals in its last bit.
  const std::uint32_t subnormal = bits_of(float_of(bits) + 16384.0f) & 7u;
  const std::uint32_t finite = sign | (comparable < static_cast<std::int32_t>(kLeastNormal) ? subnormal : normal);
  return static_cast<std::uint8_t>(comparable > static_cast<std::int32_t>(kFp32Infinity) ? kNanCode : finite);
}

// Calls store(i, x[i] / scale on the e4m3 grid).
template <Quotient How, class Store>
inline void quantize_runs(const void* x, Dtype dtype, std::int64_t count, float scale, const Store& store) {
  const Quantizer<How> quantize(scale);
  float run[kRun];
  for (std::int64_t start = 0; start < count; start += kRun) {
    const std::int64_t length = count - start < kRun ? count - start : kRun;
    load_run(x, dtype, start, length, run);
    for_each(length, [&, start](int i) { store(start + i, quantize(run[i])); });
  }
}

template <class Store>
inline void quantize_each(const void* x, Dtype dtype, std::int64_t count, float scale, const Store& store) {
  switch (quotient_for(dtype, scale)) {
    case Quotient::divided: return quantize_runs<Quotient::divided>(x, dtype, count, scale, store);
    case Quotient::one_step: return quantize_runs<Quotient::one_step>(x, dtype, count, scale, store);
    case Quotient::two_steps: return quantize_runs<Quotient::two_steps>(x, dtype, count, scale, store);
  }
}

// A run of bf16 numbers, two at a time: their halves of a word are fp32 numbers after one operation each.
inline void quantize_bf16_run(const char* x, float scale, float factor, std::uint16_t* values) {
  const Quantizer<Quotient::one_step> quantize(scale);
  for (int pair = 0; pair < static_cast<int>(kRun / 2); ++pair) {
    const std::uint32_t bits = load_pair(x, pair);
    const std::uint32_t first = bits_of(quantize(float_of(bits << 16)) * factor);
    const std::uint32_t second = bits_of(quantize(float_of(bits & 0xffff0000u)) * factor);
    const std::uint32_t both = first >> 16 | (second & 0xffff0000u);
    std::memcpy(values + 2 * pair, &both, sizeof both);
  }
}

inline void quantize_values(const void* x, Dtype dtype, std::int64_t count, float scale, float factor,
                            std::uint16_t* values) {
  if (dtype == Dtype::bf16 && count == kRun && quotient_for(dtype, scale) == Quotient::one_step) {
    quantize_bf16_run(static_cast<const char*>(x), scale, factor, values);
    return;
  }
  quantize_each(x, dtype, count, scale, [=](std::int64_t i, float value) {
    values[i] = static_cast<std::uint16_t>(bits_of(value * factor) >> 16);
  });
}

inline void quantize_codes(const void* x, Dtype dtype, std::int64_t count, float scale, std::uint8_t* codes) {
  quantize_each(x, dtype, count, scale, [=](std::int64_t i, float value) { codes[i] = code_of(value); });
}

inline void split_values(const void* x, Dtype dtype, std::int64_t count, float factor, bool finite, int terms,
                         std::uint16_t* values, std::int64_t term_stride) {
  float run[kRun];
  for (std::int64_t start = 0; start < count; start += kRun) {
    const std::int64_t length = count - start < kRun ? count - start : kRun;
    load_run(x, dtype, start, length, run);
    if (finite) {
      for_each(length, [&](int i) { run[i] *= factor; });
    } else {
      for (std::int64_t i = 0; i < length; ++i) {
        run[i] = (bits_of(run[i]) & kFp32Infinity) == kFp32Infinity ? run[i] : 0.0f;
      }
    }
    for (int term = 0; term < terms; ++term) {
      std::uint16_t* out = values + term * term_stride + start;
      for_each(length, [&](int i) {
        out[i] = bf16_of_fp32(run[i]);
        run[i] = finite ? run[i] - fp32_of_bf16(out[i]) : 0.0f;
      });
    }
  }
}

inline void dequantize(const std::uint8_t* codes, std::int64_t count, float scale, Dtype dtype, void* out) {
  float run[kRun];
  for (std::int64_t start = 0; start < count; start += kRun) {
    const std::int64_t length = count - start < kRun ? count - start : kRun;
    for (std::int64_t i = 0; i < length; ++i) {
      const std::uint32_t code = codes[start + i];
      const std::uint32_t magnitude = code & 0x7fu;
      const std::uint32_t normal = (magnitude << 20) + (120u << 23);
      // 2^14 + m * 2^-9 is exact, and so is the difference.
      const std::uint32_t subnormal = bits_of(float_of(bits_of(16384.0f) | magnitude) - 16384.0f);
      const std::uint32_t finite = magnitude < 8 ? subnormal : normal;
      run[i] = float_of((magnitude == kNanCode ? 0x7fc00000u : finite) | (code & 0x80u) << 24) * scale;
    }
    store_run(run, length, dtype, out, start);
  }
}

// e^x to about an ulp, by operations that round alike on every instruction set. Below -80 it is e^-80, which nobody
// sees beside 1; a NaN stays one.
inline float exp_for_sigmoid(float x) {
  constexpr float kLog2E = 1.44269504f;
  constexpr float kLn2High = 0.693359375f;  // 9 bits: its products with the whole numbers below are exact
  constexpr float kLn2Low = -2.12194440e-4f;
  constexpr float kAnchor = 12582912.0f;  // 1.5 * 2^23, whose last bit is 1: adding it rounds to a whole number
  float bounded = x > 89.0f ? 89.0f : x;
  bounded = bounded < -80.0f ? -80.0f : bounded;
  const float anchored = bounded * kLog2E + kAnchor;
  const float exponent = anchored - kAnchor;
  const float rest = (bounded - exponent * kLn2High) - exponent * kLn2Low;  // within +-0.35
  float power = rest * (1.0f / 5040.0f) + (1.0f / 720.0f);  // the Taylor series, which is off by at most 5.2e-9
  power = power * rest + (1.0f / 120.0f);
  power = power * rest + (1.0f / 24.0f);
  power = power * rest + (1.0f / 6.0f);
  power = power * rest + 0.5f;
  power = power * rest + 1.0f;
  power = power * rest + 1.0f;
  // 2^128 is no fp32 number: half of the power of two first, which may be 2^127 at most.
  const std::uint32_t half = (bits_of(anchored) - bits_of(kAnchor)) - 1u;
  return power * float_of((half + 127u) << 23) * 2.0f;
}

// silu(x) = x / (1 + e^-x), and what is near it. A NaN passes every bound.
template <bool kCubic>
inline float glu_of(float gate, float up, const Glu& glu) {
  const float x = gate > glu.gate_limit ? glu.gate_limit : gate;
  // Without a cubic term there is no cube either, which may be infinite.
  const float inner = kCubic ? x + glu.cubic * (x * x * x) : x;
  const float act = x / (1.0f + exp_for_sigmoid(-(glu.alpha * inner)));
  const float bounded = act > glu.act_limit ? glu.act_limit : act;
  const float below = up > glu.up_limit ? glu.up_limit : up;
  const float within = below < -glu.up_limit ? -glu.up_limit : below;
  return bounded * (within + glu.beta);
}

// glu(gate, up), computed in fp32 and rounded once to dtype.
inline void glu_product(const void* gate, const void* up, const Glu& given, Dtype dtype, std::int64_t count,
                        void* out) {
  const Glu glu = given;
  float gates[kRun];
  float ups[kRun];
  for (std::int64_t start = 0; start < count; start += kRun) {
    const std::int64_t length = count - start < kRun ? count - start : kRun;
    load_run(gate, dtype, start, length, gates);
    load_run(up, dtype, start, length, ups);
    if (glu.is_silu()) {
      for_each(length, [&](int i) { ups[i] *= gates[i] / (1.0f + exp_for_sigmoid(-gates[i])); });
    } else if (glu.cubic == 0.0f) {
      for_each(length, [&](int i) { ups[i] = glu_of<false>(gates[i], ups[i], glu); });
    } else {
      for_each(length, [&](int i) { ups[i] = glu_of<true>(gates[i], ups[i], glu); });
    }
    store_run(ups, length, dtype, out, start);
  }
}

// The sum of `count` rows, each times its weight, one after the other in fp32; rounded once to dtype.
inline void weighted_sum(const float* const* rows, const float* weights, std::int64_t count, std::int64_t columns,
                         Dtype dtype, void* out) {
  float sums[kRun];
  for (std::int64_t start = 0; start < columns; start += kRun) {
    const std::int64_t length = columns - start < kRun ? columns - start : kRun;
    for_each(length, [&](int i) { sums[i] = 0.0f; });
    for (std::int64_t row = 0; row < count; ++row) {
      const float* values = rows[row] + start;
      const float weight = weights[row];
      for_each(length, [&](int i) { sums[i] += weight * values[i]; });
    }
    store_run(sums, length, dtype, out, start);
  }
}

// Adds up the terms of each output row and the bias, and rounds once.
// sums: (rows, ld) fp32, the panel's 32 columns first; row_begin counts rows of the activation.
inline void store_panel(const Problem& problem, std::int64_t panel, const float* sums, std::int64_t ld,
                        std::int64_t row_begin, std::int64_t rows) {
  const Panel& target = problem.weight.panels[panel];
  const Output& output = problem.output;
  const int terms = problem.activation.terms;
  float bias[kPanelRows];
  if (output.bias != nullptr) load_run(output.bias, output.bias_dtype, target.first_row, target.rows, bias);
  for (std::int64_t row = 0; row < rows; row += terms) {
    float values[kPanelRows];
    const float* smallest = sums + (row + terms - 1) * ld;
    for (int i = 0; i < kPanelRows; ++i) values[i] = smallest[i];
    for (int term = terms - 2; term >= 0; --term) {
      for (int i = 0; i < kPanelRows; ++i) values[i] += sums[(row + term) * ld + i];
    }
    const std::int64_t offset = (row_begin + row) / terms * output.n + target.first_row - output.first_row;
    if (output.bias != nullptr) {
      for (std::int64_t i = 0; i < target.rows; ++i) values[i] += bias[i];
    }
    if (target.rows == kPanelRows) {
      store_run(values, kPanelRows, output.dtype, output.y, offset);
    } else {
      store_run(values, target.rows, output.dtype, output.y, offset);
    }
  }
}

// What of an instruction set's table is compiled from here.
constexpr Kernels run_kernels() {
  Kernels kernels{};
  kernels.amax = amax;
  kernels.quantize_values = quantize_values;
  kernels.quantize_codes = quantize_codes;
  kernels.split_values = split_values;
  kernels.dequantize = dequantize;
  kernels.glu_product = glu_product;
  kernels.weighted_sum = weighted_sum;
  return kernels;
}

}  // namespace
}  // namespace qwen3_fp8_ascend::cpu
