// Block-scaled linear and activation quantization over torch's threads.
#pragma once

#include "kernels.h"

namespace qwen3_fp8_ascend::cpu {

// A row-major matrix whose rows need not be adjacent.
struct Rows {
  const void* data;
  Dtype dtype;
  std::int64_t rows;
  std::int64_t stride;  // in elements

  const void* row(std::int64_t index) const {
    const std::int64_t bytes = dtype == Dtype::fp32 ? 4 : 2;
    return static_cast<const char*>(data) + index * stride * bytes;
  }
};

Depth make_depth(std::int64_t k, std::int64_t block_k);

// y = x @ W.T + bias.
void block_linear(const Rows& x, const Weight& weight, Quantization quantization, const Output& output);

// codes (rows, k) and scale (rows, ceil(k / block_k)), both contiguous.
void quantize_activation(const Rows& x, std::int64_t k, std::int64_t block_k, Quantization quantization,
                         std::uint8_t* codes, float* scale);

// out (n, k) of `dtype` = weight (n, k) times the scales (scale rows, ceil(k / block_k)) of each row.
void dequantize_weight(const std::uint8_t* weight, std::int64_t n, std::int64_t k, const float* scales,
                       const std::int32_t* scale_rows, std::int64_t block_k, Dtype dtype, void* out);

}  // namespace qwen3_fp8_ascend::cpu
