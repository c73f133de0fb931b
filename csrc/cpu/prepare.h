// Activations in the form that kernels take: quantized, or scaled and split, in chunks.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels.h"

namespace qwen3_fp8_ascend::cpu {

// The memory behind an Activation of any number of rows. From 16 rows on, `capacity` is a multiple of 16.
struct Prepared {
  std::uint16_t* values;  // [chunks][capacity][kChunk]
  float* scales;          // [chunks][capacity]
  std::int64_t capacity;
  int terms;

  // Rows [first, first + rows) of x. From 16 terms on, `first` * terms must be a multiple of 16.
  Activation activation(std::int64_t first, std::int64_t rows) const {
    return {values + first * terms * kChunk, scales + first * terms, rows * terms, capacity, terms};
  }
};

// How many rows of bf16 a row of x becomes.
int terms_of(Dtype dtype, Quantization quantization);

// The capacity for that many rows of bf16.
std::int64_t capacity_of(std::int64_t rows);

// Bytes of a Prepared whose rows of x have `depth`, and one in memory of that size.
std::size_t prepared_bytes(const Depth& depth, std::int64_t capacity);
Prepared prepared_at(void* memory, const Depth& depth, std::int64_t capacity, int terms);

// amax / 448, floored and rounded up as the specification has it.
float group_scale(float amax, Quantization quantization);

// The number at `index` of x.
inline const void* at(const void* x, Dtype dtype, std::int64_t index) {
  return static_cast<const char*>(x) + index * (dtype == Dtype::fp32 ? 4 : 2);
}

// Scale block `block` of row `row`; x starts with that block.
void prepare_block(const Kernels& kernels, const void* x, Dtype dtype, Quantization quantization, const Depth& depth,
                   std::int64_t block, const Prepared& out, std::int64_t row);

// All blocks of a row.
void prepare_row(const Kernels& kernels, const void* x, Dtype dtype, Quantization quantization, const Depth& depth,
                 const Prepared& out, std::int64_t row);

}  // namespace qwen3_fp8_ascend::cpu
