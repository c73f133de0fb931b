// torch.ops.qwen3_fp8_ascend.cpu_*: argument checks and registration, through torch's stable ABI only, so that one
// library serves every Python and every torch since 2.10.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "isa.h"
#include "linear.h"
#include "operands.h"
#include "pack.h"
#include "parallel.h"

namespace qwen3_fp8_ascend::cpu {
namespace {

bool overlap(const Tensor& a, const Tensor& b) {
  const auto bytes = [](const Tensor& t) { return static_cast<std::uintptr_t>(t.numel()) * t.element_size(); };
  const auto first = reinterpret_cast<std::uintptr_t>(a.const_data_ptr());
  const auto second = reinterpret_cast<std::uintptr_t>(b.const_data_ptr());
  return first < second + bytes(b) && second < first + bytes(a);
}

void cpu_pack(Tensor weight, Tensor panels, Tensor codes) {
  require_codes(weight, "weight", 2);
  const std::int64_t k = weight.size(1);
  require_columns(k);
  require_panels(panels, weight.size(0), std::int64_t{1} << 31);
  require_packed_shape(codes, panels.size(0), make_depth(k, kChunk));
  // The panels are read while codes are written.
  require(!overlap(codes, weight) && !overlap(codes, panels) && !overlap(weight, panels),
          "weight, panels and codes must not share memory");
  auto* table = reinterpret_cast<Panel*>(panels.mutable_data_ptr<std::int32_t>());
  pack_weight(static_cast<const std::uint8_t*>(weight.const_data_ptr()), k, table, panels.size(0),
              codes.mutable_data_ptr<std::uint8_t>());
}

Tensor cpu_block_linear(Tensor x, Tensor codes, Tensor scales, Tensor panels, std::optional<Tensor> bias,
                        std::int64_t n, std::int64_t k, std::int64_t block_k, std::int64_t quantization) {
  const Rows rows = rows_of(x);
  require(n >= 0 && k >= 0, "n and k must not be negative, got ", n, " and ", k);
  require(x.size(1) == k, "x must have shape (m, ", k, "), got (", x.size(0), ", ", x.size(1), ")");
  require_columns(k);
  require_block_k(block_k);
  const Depth depth = make_depth(k, block_k);
  require_contiguous(scales, "scales", 2, ScalarType::Float, "float32");
  require(scales.size(1) == depth.blocks, "scales must have ", depth.blocks, " columns, got ", scales.size(1));
  const Panel* table = require_panels(panels, n, scales.size(0));
  require_packed_shape(codes, panels.size(0), depth);
  const void* bias_data = nullptr;
  Dtype bias_dtype = rows.dtype;
  if (bias.has_value()) {
    require_cpu(*bias, "bias", 1);
    bias_dtype = require_float(bias->scalar_type(), "bias");
    require(bias->is_contiguous() && bias->size(0) == n, "bias must be contiguous and have ", n, " elements");
    require_memory(*bias, "bias", n);
    bias_data = bias->const_data_ptr();
  }
  Tensor y = empty_matrix(x.size(0), n, x.scalar_type());
  const Weight weight{codes.const_data_ptr<std::uint8_t>(), scales.const_data_ptr<float>(), table, panels.size(0),
                      depth};
  block_linear(rows, weight, require_quantization(quantization),
               {y.mutable_data_ptr(), bias_data, rows.dtype, bias_dtype, n});
  return y;
}

std::tuple<Tensor, Tensor> cpu_quantize_activation(Tensor x, std::int64_t block_k, std::int64_t quantization) {
  const Rows rows = rows_of(x);
  require(block_k >= 1, "block_k must be positive, got ", block_k);
  const Quantization how = require_quantization(quantization);
  require(how != Quantization::none, "quantization must be 1 or 2 where x is quantized, got ", quantization);
  const std::int64_t k = x.size(1);
  Tensor codes = empty_matrix(rows.rows, k, ScalarType::Float8_e4m3fn);
  Tensor scale = empty_matrix(rows.rows, ceil_div(k, block_k), ScalarType::Float);
  quantize_activation(rows, k, block_k, how, static_cast<std::uint8_t*>(codes.mutable_data_ptr()),
                      scale.mutable_data_ptr<float>());
  return {codes, scale};
}

Tensor cpu_dequantize_weight(Tensor weight, Tensor scales, Tensor scale_rows, std::int64_t block_k, ScalarType dtype) {
  require_codes(weight, "weight", 2);
  const std::int64_t n = weight.size(0);
  const std::int64_t k = weight.size(1);
  require(block_k >= 1, "block_k must be positive, got ", block_k);
  require_contiguous(scales, "scales", 2, ScalarType::Float, "float32");
  const std::int64_t blocks = ceil_div(k, block_k);
  require(scales.size(1) == blocks, "scales must have ", blocks, " columns, got ", scales.size(1));
  require_contiguous(scale_rows, "scale_rows", 1, ScalarType::Int, "int32");
  require(scale_rows.size(0) == n, "scale_rows must have ", n, " elements, got ", scale_rows.size(0));
  const auto* rows = scale_rows.const_data_ptr<std::int32_t>();
  for (std::int64_t i = 0; i < n; ++i) {
    require(rows[i] >= 0 && rows[i] < scales.size(0), "scale_rows[", i, "] is ", rows[i], " of ", scales.size(0));
  }
  const Dtype out_dtype = require_float(dtype, "dtype");
  Tensor out = empty_matrix(n, k, dtype);
  dequantize_weight(static_cast<const std::uint8_t*>(weight.const_data_ptr()), n, k, scales.const_data_ptr<float>(),
                    rows, block_k, out_dtype, out.mutable_data_ptr());
  return out;
}

std::int64_t cpu_best_isa() { return static_cast<std::int64_t>(best_isa()); }
std::int64_t cpu_current_isa() { return static_cast<std::int64_t>(current_isa()); }

void cpu_set_isa(std::int64_t level) {
  require(level >= 0 && level <= cpu_best_isa(), "instruction set ", level, " is not one of 0..", cpu_best_isa());
  set_isa(static_cast<Isa>(level));
}

const Kernels& kernels_of_level(std::int64_t level) {
  require(level >= 0 && level <= static_cast<std::int64_t>(kHighestIsa), "there is no instruction set ", level);
  return kernels_of(static_cast<Isa>(level));
}

std::int64_t cpu_register_rows(std::int64_t level) { return kernels_of_level(level).register_rows; }

bool cpu_threads_lost() { return threads_lost(); }

}  // namespace
}  // namespace qwen3_fp8_ascend::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(qwen3_fp8_ascend, m) {
  m.def("cpu_pack(Tensor weight, Tensor(a!) panels, Tensor(b!) codes) -> ()");
  m.def(
      "cpu_block_linear(Tensor x, Tensor codes, Tensor scales, Tensor panels, Tensor? bias, int n, int k, "
      "int block_k, int quantization) -> Tensor");
  m.def("cpu_quantize_activation(Tensor x, int block_k, int quantization) -> (Tensor, Tensor)");
  m.def(
      "cpu_dequantize_weight(Tensor weight, Tensor scales, Tensor scale_rows, int block_k, ScalarType dtype) "
      "-> Tensor");
  m.def("cpu_best_isa() -> int");
  m.def("cpu_current_isa() -> int");
  m.def("cpu_set_isa(int level) -> ()");
  m.def("cpu_register_rows(int level) -> int");
  m.def("cpu_threads_lost() -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(qwen3_fp8_ascend, CPU, m) {
  m.impl("cpu_pack", TORCH_BOX(&qwen3_fp8_ascend::cpu::cpu_pack));
  m.impl("cpu_block_linear", TORCH_BOX(&qwen3_fp8_ascend::cpu::cpu_block_linear));
  m.impl("cpu_quantize_activation", TORCH_BOX(&qwen3_fp8_ascend::cpu::cpu_quantize_activation));
  m.impl("cpu_dequantize_weight", TORCH_BOX(&qwen3_fp8_ascend::cpu::cpu_dequantize_weight));
}

STABLE_TORCH_LIBRARY_IMPL(qwen3_fp8_ascend, CompositeExplicitAutograd, m) {
  m.impl("cpu_best_isa", TORCH_BOX(&qwen3_fp8_ascend::cpu::cpu_best_isa));
  m.impl("cpu_current_isa", TORCH_BOX(&qwen3_fp8_ascend::cpu::cpu_current_isa));
  m.impl("cpu_set_isa", TORCH_BOX(&qwen3_fp8_ascend::cpu::cpu_set_isa));
  m.impl("cpu_register_rows", TORCH_BOX(&qwen3_fp8_ascend::cpu::cpu_register_rows));
  m.impl("cpu_threads_lost", TORCH_BOX(&qwen3_fp8_ascend::cpu::cpu_threads_lost));
}
