// Operands of operators: what they must be, and what the kernels are given of them.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

#include "checks.h"
#include "linear.h"

namespace qwen3_fp8_ascend::cpu {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void require_contiguous(const Tensor& tensor, const char* name, std::int64_t dim, ScalarType dtype,
                               const char* dtype_name) {
  require_cpu(tensor, name, dim);
  require(tensor.scalar_type() == dtype, name, " must be ", dtype_name);
  require(tensor.is_contiguous(), name, " must be contiguous");
  require_memory(tensor, name, tensor.numel());
  const auto address = reinterpret_cast<std::uintptr_t>(tensor.const_data_ptr());
  require(address % tensor.element_size() == 0, name, " must start at a multiple of its elements' size");
}

inline std::optional<Dtype> float_dtype(ScalarType type) {
  switch (type) {
    case ScalarType::BFloat16: return Dtype::bf16;
    case ScalarType::Half: return Dtype::fp16;
    case ScalarType::Float: return Dtype::fp32;
    default: return std::nullopt;
  }
}

inline Dtype require_float(ScalarType type, const char* name) {
  const std::optional<Dtype> dtype = float_dtype(type);
  require(dtype.has_value(), name, " must be bfloat16, float16 or float32");
  return *dtype;
}

// A result of (rows, columns), not yet written. torch::stable::empty would look an operator up by its name in each
// call.
inline Tensor empty_matrix(std::int64_t rows, std::int64_t columns, ScalarType dtype) {
  const std::int64_t sizes[2] = {rows, columns};
  const std::int64_t strides[2] = {columns > 0 ? columns : 1, 1};
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(2, sizes, strides, static_cast<std::int32_t>(dtype),
                                                  aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
}

// e4m3 codes, as such or as bytes.
inline void require_codes(const Tensor& tensor, const char* name, std::int64_t dim) {
  require_cpu(tensor, name, dim);
  const ScalarType type = tensor.scalar_type();
  require(type == ScalarType::Float8_e4m3fn || type == ScalarType::Byte, name, " must be float8_e4m3fn or uint8");
  require(tensor.is_contiguous(), name, " must be contiguous");
  require_memory(tensor, name, tensor.numel());
}

inline Rows rows_of(const Tensor& x) {
  require_cpu(x, "x", 2);
  const Dtype dtype = require_float(x.scalar_type(), "x");
  require(x.size(1) <= 1 || x.stride(1) == 1, "x must be contiguous in its last dimension");
  require_memory(x, "x", x.numel() == 0 ? 0 : (x.size(0) - 1) * x.stride(0) + x.size(1));
  return {x.const_data_ptr(), dtype, x.size(0), x.stride(0)};
}

// The panels cover rows 0..n-1 in order, each within the bounds of the codes and scales that go with it.
inline void require_panels(const Panel* table, std::int64_t count, std::int64_t n, std::int64_t scale_rows) {
  std::int64_t row = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    const Panel& panel = table[i];
    require(panel.first_row == row && panel.rows >= 1 && panel.rows <= kPanelRows, "panel ", i, " is wrong: first row ",
            panel.first_row, " (expected ", row, "), rows ", panel.rows);
    require(panel.scale_row >= 0 && panel.scale_row < scale_rows, "panel ", i, " names scale row ", panel.scale_row,
            " of ", scale_rows);
    row += panel.rows;
  }
  require(row == n, "the panels hold ", row, " rows, expected ", n);
}

// Panels (..., panels, 4) as the kernels see them.
inline const Panel* panels_of(const Tensor& panels, const char* name, std::int64_t dim) {
  static_assert(sizeof(Panel) == 4 * sizeof(std::int32_t));
  require_contiguous(panels, name, dim, ScalarType::Int, "int32");
  require(panels.size(dim - 1) == 4, name, " must have shape (..., panels, 4), got ", panels.size(dim - 1), " columns");
  return reinterpret_cast<const Panel*>(panels.const_data_ptr<std::int32_t>());
}

inline const Panel* require_panels(const Tensor& panels, std::int64_t n, std::int64_t scale_rows) {
  const Panel* table = panels_of(panels, "panels", 2);
  require_panels(table, panels.size(0), n, scale_rows);
  return table;
}

inline void require_packed_shape(const Tensor& codes, std::int64_t panels, const Depth& depth) {
  require_contiguous(codes, "codes", 3, ScalarType::Byte, "uint8");
  require(codes.size(0) == panels && codes.size(1) == depth.padded() && codes.size(2) == kPanelRows,
          "codes must have shape (", panels, ", ", depth.padded(), ", ", kPanelRows, "), got (", codes.size(0), ", ",
          codes.size(1), ", ", codes.size(2), ")");
}

inline void require_columns(std::int64_t k) {
  require(k <= kMostColumns, "a weight has at most ", kMostColumns, " columns, got ", k);
}

inline Quantization require_quantization(std::int64_t number) {
  require(number >= 0 && number <= 2,
          "quantization must be 0 (none), 1 (any scale) or 2 (scales that are powers of two), got ", number);
  return static_cast<Quantization>(number);
}

inline void require_block_k(std::int64_t block_k) {
  require(block_k >= 4 && block_k % 4 == 0, "block_k must be a positive multiple of 4, got ", block_k);
}

}  // namespace qwen3_fp8_ascend::cpu
