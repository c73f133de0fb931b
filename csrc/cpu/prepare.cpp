#include "prepare.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "numbers.h"

namespace qwen3_fp8_ascend::cpu {
namespace {

// From this many rows on, AMX reads whole tiles of as many.
constexpr std::int64_t kTileRows = 16;

constexpr std::int64_t round_up(std::int64_t a, std::int64_t b) { return ceil_div(a, b) * b; }

// A group's power of two and the scale that undoes it together with the kernel's own exponent. The power takes the
// largest magnitude far up, where neither products nor their sums leave fp32, and where what bf16 arithmetic flushes to
// zero is less than 2^-130 of the largest. Both are normal numbers.
struct PowerScale {
  float factor;
  float scale;
};

PowerScale power_scale(float amax, int weight_exponent) {
  const int target = weight_exponent == 0 ? 60 : 120;
  const bool scalable = amax != 0.0f && std::isfinite(amax);
  const int exponent = scalable ? std::clamp(target - std::ilogb(amax), -126, 126) : 0;
  return {std::ldexp(1.0f, exponent), std::ldexp(1.0f, -exponent - weight_exponent)};
}

}  // namespace

int terms_of(Dtype dtype, Quantization quantization) {
  if (quantization != Quantization::none || dtype == Dtype::bf16) return 1;
  return dtype == Dtype::fp16 ? 2 : 3;  // bf16 has 8 significant bits, fp16 11, fp32 24
}

std::int64_t capacity_of(std::int64_t rows) { return rows < kTileRows ? rows : round_up(rows, kTileRows); }

std::size_t prepared_bytes(const Depth& depth, std::int64_t capacity) {
  return static_cast<std::size_t>(depth.chunks * capacity) * (kChunk * sizeof(std::uint16_t) + sizeof(float));
}

Prepared prepared_at(void* memory, const Depth& depth, std::int64_t capacity, int terms) {
  auto* values = static_cast<std::uint16_t*>(memory);
  return {values, reinterpret_cast<float*>(values + depth.chunks * capacity * kChunk), capacity, terms};
}

float group_scale(float amax, Quantization quantization) {
  const float floored = amax < kAmaxFloor ? kAmaxFloor : amax;  // keeps NaN
  const float scale = floored / kE4m3Max;
  return quantization == Quantization::power_of_two ? round_up_to_power_of_two(scale) : scale;
}

void prepare_block(const Kernels& kernels, const void* x, Dtype dtype, Quantization quantization, const Depth& depth,
                   std::int64_t block, const Prepared& out, std::int64_t row) {
  const std::int64_t begin = block * depth.block_k;
  const std::int64_t count = std::min(depth.block_k, depth.k - begin);
  const float amax = kernels.amax(x, dtype, count);
  const bool quantize = quantization != Quantization::none;
  const PowerScale power = quantize
                               ? PowerScale{power_of_two(-kernels.weight_exponent), group_scale(amax, quantization)}
                               : power_scale(amax, kernels.weight_exponent);
  std::int64_t chunk = block * depth.chunks_per_block;
  for (std::int64_t start = 0; start < count; start += kChunk, ++chunk) {
    const std::int64_t length = std::min<std::int64_t>(kChunk, count - start);
    const void* source = at(x, dtype, start);
    const std::int64_t place = chunk * out.capacity + row * out.terms;
    std::uint16_t* target = out.values + place * kChunk;
    if (quantize) {
      kernels.quantize_values(source, dtype, length, power.scale, power.factor, target);
    } else {
      kernels.split_values(source, dtype, length, power.factor, std::isfinite(amax), out.terms, target, kChunk);
    }
    const std::int64_t tail = round_up(length, 32) - length;
    for (int term = 0; term < out.terms; ++term) {
      if (tail > 0) std::memset(target + term * kChunk + length, 0, static_cast<std::size_t>(tail) * sizeof *target);
      out.scales[place + term] = power.scale;
    }
  }
}

void prepare_row(const Kernels& kernels, const void* x, Dtype dtype, Quantization quantization, const Depth& depth,
                 const Prepared& out, std::int64_t row) {
  for (std::int64_t block = 0; block < depth.blocks; ++block) {
    prepare_block(kernels, at(x, dtype, block * depth.block_k), dtype, quantization, depth, block, out, row);
  }
}

}  // namespace qwen3_fp8_ascend::cpu
