// torch.ops.qwen3_fp8_ascend.cpu_grouped_linear, cpu_glu_product, cpu_block_experts: argument checks, registration.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <string>
#include <vector>

#include "experts.h"
#include "operands.h"

namespace qwen3_fp8_ascend::cpu {
namespace {

// Weights of experts (n, k) in blocks of block_k columns. The table of panels is looked at for those that are used.
ExpertWeights require_experts(const Tensor& codes, const Tensor& scales, const Tensor& panels,
                              const std::string& prefix, std::int64_t k, std::int64_t block_k) {
  require_columns(k);
  require_block_k(block_k);
  const Depth depth = make_depth(k, block_k);
  const std::string codes_name = prefix + "codes";
  const std::string scales_name = prefix + "scales";
  const std::string panels_name = prefix + "panels";
  const Panel* table = panels_of(panels, panels_name.c_str(), 3);
  const std::int64_t experts = panels.size(0);
  const std::int64_t panel_count = panels.size(1);
  require_contiguous(codes, codes_name.c_str(), 4, ScalarType::Byte, "uint8");
  require(codes.size(0) == experts && codes.size(1) == panel_count && codes.size(2) == depth.padded() &&
              codes.size(3) == kPanelRows,
          codes_name, " must have shape (", experts, ", ", panel_count, ", ", depth.padded(), ", ", kPanelRows,
          "), got (", codes.size(0), ", ", codes.size(1), ", ", codes.size(2), ", ", codes.size(3), ")");
  require_contiguous(scales, scales_name.c_str(), 3, ScalarType::Float, "float32");
  require(scales.size(0) == experts && scales.size(2) == depth.blocks, scales_name, " must have shape (", experts,
          ", scale rows, ", depth.blocks, "), got (", scales.size(0), ", ", scales.size(1), ", ", scales.size(2), ")");
  return {codes.const_data_ptr<std::uint8_t>(),
          scales.const_data_ptr<float>(),
          table,
          experts,
          panel_count,
          scales.size(1),
          depth};
}

// Every expert's panels are those of the first, which were looked at; only what they say of NaN may differ.
void require_same_panels(const ExpertWeights& weights, std::int64_t expert, const std::string& prefix) {
  const Panel* first = weights.panels;
  const Panel* other = weights.panels + expert * weights.panel_count;
  for (std::int64_t i = 0; i < weights.panel_count; ++i) {
    require(other[i].first_row == first[i].first_row && other[i].rows == first[i].rows &&
                other[i].scale_row == first[i].scale_row,
            prefix, "panels of expert ", expert, " are not cut as those of expert 0: panel ", i, " differs");
  }
}

Tensor cpu_grouped_linear(Tensor x, Tensor codes, Tensor scales, Tensor panels, Tensor ends, std::int64_t n,
                          std::int64_t k, std::int64_t block_k, std::int64_t quantization) {
  const Rows rows = rows_of(x);
  require(n >= 0 && k >= 0, "n and k must not be negative, got ", n, " and ", k);
  require(x.size(1) == k, "x must have shape (m, ", k, "), got (", x.size(0), ", ", x.size(1), ")");
  const ExpertWeights weights = require_experts(codes, scales, panels, "", k, block_k);
  require_contiguous(ends, "ends", 1, ScalarType::Long, "int64");
  require(ends.size(0) == weights.experts, "ends must have ", weights.experts, " elements, got ", ends.size(0));
  const auto* end_of = ends.const_data_ptr<std::int64_t>();
  if (weights.experts > 0) require_panels(weights.panels, weights.panel_count, n, weights.scale_rows);
  std::int64_t before = 0;
  for (std::int64_t expert = 0; expert < weights.experts; ++expert) {
    require(end_of[expert] >= before && end_of[expert] <= rows.rows, "ends must not decrease or exceed the ", rows.rows,
            " rows of x, but ends[", expert, "] is ", end_of[expert], " behind ", before);
    if (end_of[expert] > before) require_same_panels(weights, expert, "");
    before = end_of[expert];
  }
  Tensor y = empty_matrix(rows.rows, n, x.scalar_type());
  grouped_linear(rows, weights, end_of, require_quantization(quantization), y.mutable_data_ptr(), n);
  return y;
}

// All that an activation is made of; alpha and the limits are positive, cubic is not negative, and none is NaN.
Glu require_glu(double gate_limit, double act_limit, double up_limit, double alpha, double cubic, double beta) {
  require(gate_limit > 0 && act_limit > 0 && up_limit > 0, "the activation's limits must be positive, got ",
          std::to_string(gate_limit), ", ", std::to_string(act_limit), " and ", std::to_string(up_limit));
  require(alpha > 0 && std::isfinite(alpha) && cubic >= 0 && std::isfinite(cubic) && std::isfinite(beta),
          "the activation's alpha must be positive, cubic not negative, and both and beta finite, got ",
          std::to_string(alpha), ", ", std::to_string(cubic), " and ", std::to_string(beta));
  return {static_cast<float>(gate_limit), static_cast<float>(act_limit), static_cast<float>(up_limit),
          static_cast<float>(alpha),      static_cast<float>(cubic),     static_cast<float>(beta)};
}

Tensor cpu_glu_product(Tensor x, double gate_limit, double act_limit, double up_limit, double alpha, double cubic,
                       double beta) {
  const Glu glu = require_glu(gate_limit, act_limit, up_limit, alpha, cubic, beta);
  const Rows rows = rows_of(x);
  require(x.size(1) % 2 == 0, "x must have as many columns of gate as of up, got ", x.size(1), " in all");
  const std::int64_t half = x.size(1) / 2;
  Tensor out = empty_matrix(rows.rows, half, x.scalar_type());
  glu_products(rows, half, glu, out.mutable_data_ptr());
  return out;
}

// The chosen experts as int32, each checked; and that the panels of all that are chosen are good.
template <class Id>
void require_ids(const Id* ids, std::int64_t count, std::int64_t experts, std::vector<std::int32_t>& out) {
  out.resize(static_cast<std::size_t>(count));
  for (std::int64_t i = 0; i < count; ++i) {
    require(ids[i] >= -1 && ids[i] < experts, "topk_ids must be -1 (none) or below ", experts,
            ", the number of experts, but one is ", ids[i]);
    out[static_cast<std::size_t>(i)] = static_cast<std::int32_t>(ids[i]);
  }
}

thread_local std::vector<std::int32_t> chosen;
thread_local std::vector<char> used;

Tensor cpu_block_experts(Tensor x, Tensor w13_codes, Tensor w13_scales, Tensor w13_panels, Tensor w2_codes,
                         Tensor w2_scales, Tensor w2_panels, Tensor topk_weights, Tensor topk_ids,
                         std::int64_t intermediate, std::int64_t block_k, std::int64_t quantization, double gate_limit,
                         double act_limit, double up_limit, double alpha, double cubic, double beta) {
  const Glu glu = require_glu(gate_limit, act_limit, up_limit, alpha, cubic, beta);
  const Rows rows = rows_of(x);
  const std::int64_t hidden = x.size(1);
  require(intermediate >= 0 && intermediate <= kMostColumns, "intermediate must be within 0..", kMostColumns, ", got ",
          intermediate);
  const ExpertWeights w13 = require_experts(w13_codes, w13_scales, w13_panels, "w13_", hidden, block_k);
  const ExpertWeights w2 = require_experts(w2_codes, w2_scales, w2_panels, "w2_", intermediate, block_k);
  require(w13.experts == w2.experts, "w13 has ", w13.experts, " experts and w2 ", w2.experts);
  require(w13.experts <= INT32_MAX, "there can be at most ", INT32_MAX, " experts, got ", w13.experts);
  require_contiguous(topk_weights, "topk_weights", 2, ScalarType::Float, "float32");
  require_cpu(topk_ids, "topk_ids", 2);
  require(topk_weights.size(0) == rows.rows, "topk_weights must have ", rows.rows, " rows, got ", topk_weights.size(0));
  require(topk_ids.size(0) == rows.rows && topk_ids.size(1) == topk_weights.size(1), "topk_ids must have shape (",
          rows.rows, ", ", topk_weights.size(1), "), got (", topk_ids.size(0), ", ", topk_ids.size(1), ")");
  std::vector<std::int32_t>& experts = chosen;
  if (topk_ids.scalar_type() == ScalarType::Long) {
    require_contiguous(topk_ids, "topk_ids", 2, ScalarType::Long, "int64");
    require_ids(topk_ids.const_data_ptr<std::int64_t>(), topk_ids.numel(), w13.experts, experts);
  } else {
    require_contiguous(topk_ids, "topk_ids", 2, ScalarType::Int, "int32 or int64");
    require_ids(topk_ids.const_data_ptr<std::int32_t>(), topk_ids.numel(), w13.experts, experts);
  }
  std::vector<Segment> segments;
  if (w13.experts > 0) {
    require_panels(w13.panels, w13.panel_count, 2 * intermediate, w13.scale_rows);
    require_panels(w2.panels, w2.panel_count, hidden, w2.scale_rows);
    segments = make_segments(w13.panels, w13.panel_count, intermediate, block_k);
  }
  used.assign(static_cast<std::size_t>(w13.experts), 0);
  for (const std::int32_t expert : experts) {
    if (expert < 0 || used[static_cast<std::size_t>(expert)] != 0) continue;
    used[static_cast<std::size_t>(expert)] = 1;
    require_same_panels(w13, expert, "w13_");
    require_same_panels(w2, expert, "w2_");
  }
  Tensor out = empty_matrix(rows.rows, hidden, x.scalar_type());
  const Routing routing{topk_weights.const_data_ptr<float>(), experts.data(), topk_weights.size(1)};
  block_experts(rows, w13, w2, segments, routing, require_quantization(quantization), glu, out.mutable_data_ptr(),
                hidden);
  return out;
}

}  // namespace
}  // namespace qwen3_fp8_ascend::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(qwen3_fp8_ascend, m) {
  m.def(
      "cpu_grouped_linear(Tensor x, Tensor codes, Tensor scales, Tensor panels, Tensor ends, int n, int k, "
      "int block_k, int quantization) -> Tensor");
  m.def(
      "cpu_glu_product(Tensor x, float gate_limit, float act_limit, float up_limit, float alpha, float cubic, "
      "float beta) -> Tensor");
  m.def(
      "cpu_block_experts(Tensor x, Tensor w13_codes, Tensor w13_scales, Tensor w13_panels, Tensor w2_codes, "
      "Tensor w2_scales, Tensor w2_panels, Tensor topk_weights, Tensor topk_ids, int intermediate, int block_k, "
      "int quantization, float gate_limit, float act_limit, float up_limit, float alpha, float cubic, float beta) -> "
      "Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(qwen3_fp8_ascend, CPU, m) {
  m.impl("cpu_grouped_linear", TORCH_BOX(&qwen3_fp8_ascend::cpu::cpu_grouped_linear));
  m.impl("cpu_glu_product", TORCH_BOX(&qwen3_fp8_ascend::cpu::cpu_glu_product));
  m.impl("cpu_block_experts", TORCH_BOX(&qwen3_fp8_ascend::cpu::cpu_block_experts));
}
