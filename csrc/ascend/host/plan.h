// From shapes and core counts to tilings: how many cores, how much workspace, and what does not fit.
// Plain C++, so that the host code and the tests share it.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "../kernels/work.h"
#include "../tiling.h"

namespace qwen3_fp8_ascend {

struct LinearPlan {
  LinearTiling tiling{};
  uint32_t blocks = 0;  // of the launch
  uint64_t workspace_bytes = 0;
};

inline uint64_t ceil_div(uint64_t a, uint64_t b) { return (a + b - 1) / b; }
inline uint64_t round_up(uint64_t a, uint64_t b) { return ceil_div(a, b) * b; }

inline void check_plan(bool holds, const std::string& what, uint64_t got) {
  if (!holds) throw std::invalid_argument(what + ", got " + std::to_string(got));
}

// The operators' number of an activation: which of them a kernel computes.
inline Activation activation_of(int64_t number) {
  check_plan(number == kDynamic || number == kNone || number == kDynamicUe8m0,
             "activation is 0 (w8a8), 1 (w8a16) or 2 (w8a8-ue8m0)", static_cast<uint64_t>(number));
  return static_cast<Activation>(number);
}

inline QuantizeTiling plan_quantize(uint32_t rows, uint32_t columns, Activation activation, Dtype dtype) {
  check_plan(activation != kNone, "activation is 0 (w8a8) or 2 (w8a8-ue8m0) where x is quantized", activation);
  return {rows, columns, static_cast<uint32_t>(ceil_div(columns, kBlock)), activation, dtype};
}

// Vector cores worth launching for the chunks of an activation.
inline uint32_t quantize_blocks(const QuantizeTiling& t, uint32_t vector_cores) {
  const uint64_t items = static_cast<uint64_t>(t.rows) * ceil_div(t.columns, kChunk);
  return static_cast<uint32_t>(items < vector_cores ? (items ? items : 1) : vector_cores);
}

inline DequantizeTiling plan_dequantize(uint32_t n, uint32_t k, uint32_t tiles, Dtype dtype) {
  return {n, k, tiles, static_cast<uint32_t>(ceil_div(k, kBlock)), dtype};
}

inline uint32_t dequantize_blocks(const DequantizeTiling& t, uint32_t vector_cores) {
  const uint64_t units = static_cast<uint64_t>(t.tiles) * t.k_blocks;
  return static_cast<uint32_t>(units < vector_cores ? (units ? units : 1) : vector_cores);
}

namespace plan_detail {

// Hands out consecutive parts of the workspace, each on a 512-byte boundary.
class Layout {
 public:
  uint64_t take(uint64_t bytes) {
    const uint64_t offset = used_;
    used_ += round_up(bytes, 512);
    return offset;
  }
  uint64_t used() const { return used_; }

 private:
  uint64_t used_ = 0;
};

// What all linears have: `cores` is how many there are, `units` how much can be dealt out.
inline LinearTiling common(uint32_t m, uint32_t n, uint32_t k, uint32_t tiles, Activation activation, Dtype dtype,
                           uint32_t bias_dtype, uint32_t cores, uint64_t units) {
  check_plan(n >= 1 && k >= 1 && tiles >= 1, "a weight has at least one row, one column and one tile", n);
  check_plan(bias_dtype == dtype || bias_dtype == kFloat32 || bias_dtype == kNoBias,
             "a bias is in x's dtype or in float32", bias_dtype);
  check_plan(cores >= 1, "a linear takes at least one core", cores);
  LinearTiling t{};
  t.m = m;
  t.n = n;
  t.k = k;
  t.tiles = tiles;
  t.k_blocks = static_cast<uint32_t>(ceil_div(k, kBlock));
  t.activation = activation;
  t.dtype = dtype;
  t.bias_dtype = bias_dtype;
  t.groups = 1;
  t.cores = static_cast<uint32_t>(units < cores ? units : cores);
  return t;
}

// The most cores that share a tile, where units are dealt out without regard to tiles.
inline uint32_t most_parts(const LinearTiling& t) {
  uint32_t most = 0;
  for (uint32_t tile = 0; tile < t.tiles; ++tile) {
    const uint32_t parts = parts_of(t, tile);
    most = parts > most ? parts : most;
  }
  return most;
}

// Results: [tile][part][row][128] floats.
inline uint64_t result_bytes(const LinearTiling& t) {
  return static_cast<uint64_t>(t.tiles) * t.parts * t.m * kBlock * sizeof(float);
}

// The workspace of the pipeline: activations with their scales, and for each core its slots of weights and products.
inline Layout pipeline_layout(LinearTiling& t) {
  const uint64_t slots = static_cast<uint64_t>(t.cores) * kStageSlots * kStageUnits;
  Layout layout;
  t.activations = layout.take(static_cast<uint64_t>(t.rows_padded) * t.k_blocks * kBlock * sizeof(uint16_t));
  t.scales = layout.take(static_cast<uint64_t>(t.k_blocks) * t.rows_padded * kBroadcast * sizeof(float));
  t.weights = layout.take(slots * kUnit * sizeof(uint16_t));
  t.partials = layout.take(slots * t.pass_rows * kBlock * sizeof(float));
  return layout;
}

}  // namespace plan_detail

// block_linear: one cube core and two vector cores an AI core.
inline LinearPlan plan_linear(uint32_t m, uint32_t n, uint32_t k, uint32_t tiles, Activation activation, Dtype dtype,
                              uint32_t bias_dtype, uint32_t cube_cores) {
  check_plan(m >= 1 && m <= kMaxRows, "this kernel takes 1 to " + std::to_string(kMaxRows) + " rows of x", m);
  LinearPlan plan;
  LinearTiling& t = plan.tiling;
  const uint64_t units = tiles * ceil_div(k, kBlock);
  t = plan_detail::common(m, n, k, tiles, activation, dtype, bias_dtype, cube_cores, units);
  check_plan(round_up(k, kBlock) <= kMaxColumns, "k is at most " + std::to_string(kMaxColumns), k);
  t.rows_padded = static_cast<uint32_t>(round_up(m, kFractal));
  t.pass_rows = m;
  t.parts = plan_detail::most_parts(t);
  plan.blocks = t.cores;
  t.vector_cores = t.cores * kVectorCores;
  plan_detail::Layout layout = plan_detail::pipeline_layout(t);
  t.results = layout.take(plan_detail::result_bytes(t));
  plan.workspace_bytes = layout.used();
  return plan;
}

// block_grouped_linear: the same cores. Which group has which of the m rows is on the device, so this is the plan for
// any list of ends; `tiles` are those of one group.
inline LinearPlan plan_grouped_linear(uint32_t m, uint32_t n, uint32_t k, uint32_t tiles, uint32_t groups,
                                      Activation activation, Dtype dtype, uint32_t cube_cores) {
  check_plan(m >= 1 && m <= kMaxGroupedRows,
             "the grouped linear takes 1 to " + std::to_string(kMaxGroupedRows) + " rows of x", m);
  check_plan(groups >= 1, "there is at least one group", groups);
  LinearPlan plan;
  LinearTiling& t = plan.tiling;
  const uint64_t most_passes = (m < groups ? m : groups) + m / kMaxRows;
  t = plan_detail::common(m, n, k, tiles, activation, dtype, kNoBias, cube_cores, most_passes * tiles);
  check_plan(round_up(k, kBlock) <= kMaxColumns, "k is at most " + std::to_string(kMaxColumns), k);
  check_plan(most_passes * tiles <= UINT32_MAX, "tiles of all passes fit 32 bits", most_passes);
  t.groups = groups;
  t.rows_padded = static_cast<uint32_t>(round_up(m + kFractal - 1, kFractal));
  t.pass_rows = m < kMaxRows ? m : kMaxRows;
  plan.blocks = t.cores;
  t.vector_cores = t.cores * kVectorCores;
  plan.workspace_bytes = plan_detail::pipeline_layout(t).used();
  return plan;
}

// block_gemv: vector cores alone.
inline LinearPlan plan_gemv(uint32_t n, uint32_t k, uint32_t tiles, Activation activation, Dtype dtype,
                            uint32_t bias_dtype, uint32_t vector_cores) {
  LinearPlan plan;
  LinearTiling& t = plan.tiling;
  const uint64_t units = tiles * ceil_div(k, kBlock);
  t = plan_detail::common(1, n, k, tiles, activation, dtype, bias_dtype, vector_cores, units);
  check_plan(round_up(k, kBlock) <= kMaxGemvColumns, "block_gemv takes k up to " + std::to_string(kMaxGemvColumns), k);
  t.rows_padded = 1;
  t.pass_rows = 1;
  t.parts = plan_detail::most_parts(t);
  plan.blocks = t.cores;
  t.vector_cores = t.cores;
  plan_detail::Layout layout;
  t.activations = layout.take(static_cast<uint64_t>(t.k_blocks) * kBlock * sizeof(uint16_t));
  t.scales = layout.take(static_cast<uint64_t>(t.k_blocks) * kBroadcast * sizeof(float));
  t.results = layout.take(plan_detail::result_bytes(t));
  plan.workspace_bytes = layout.used();
  return plan;
}

}  // namespace qwen3_fp8_ascend
