#include "linear.h"

#include <algorithm>

#include "isa.h"
#include "parallel.h"
#include "prepare.h"
#include "scratch.h"

namespace qwen3_fp8_ascend::cpu {
namespace {

constexpr std::int64_t kPanelsAtOnce = 2;  // the most that a kernel takes at a time: ranges are cut between such pairs

// Less work than this is done by the caller alone: waking a thread costs a few microseconds.
constexpr std::int64_t kLeastBytesPerThread = 1 << 17;
constexpr std::int64_t kLeastNumbersPerThread = 1 << 15;

// Prepared activations are bounded by this, whatever the shape; more rows are taken in several passes.
constexpr std::int64_t kMostPreparedBytes = 32 << 20;

thread_local Scratch prepared_memory;
thread_local Scratch kernel_memory;

// All rows at once; they fit the kernel and the bound on prepared activations.
void linear_pass(const Kernels& kernels, const Rows& x, const Weight& weight, Quantization quantization,
                 const Output& output) {
  const Depth& depth = weight.depth;
  const int terms = terms_of(x.dtype, quantization);
  const std::int64_t capacity = capacity_of(x.rows * terms);
  const Prepared prepared = prepared_at(prepared_memory.grow(prepared_bytes(depth, capacity)), depth, capacity, terms);
  const std::int64_t row_grain = std::max<std::int64_t>(1, kLeastNumbersPerThread / std::max<std::int64_t>(1, depth.k));
  parallel(x.rows, row_grain, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) {
      prepare_row(kernels, x.row(row), x.dtype, quantization, depth, prepared, row);
    }
  });

  const Problem problem{weight, prepared.activation(0, x.rows), output};
  const std::int64_t bytes_at_once = std::max<std::int64_t>(1, kPanelsAtOnce * depth.padded() * kPanelRows);
  // Work grows with the rows: eight of them count as one more pass over the codes.
  const std::int64_t work_at_once = bytes_at_once * (1 + x.rows * terms / 8);
  const std::int64_t grain = std::max<std::int64_t>(1, kLeastBytesPerThread / work_at_once);
  parallel(ceil_div(weight.panel_count, kPanelsAtOnce), grain, [&](std::int64_t begin, std::int64_t end) {
    void* scratch = kernel_memory.grow(kernels.scratch_bytes);
    kernels.linear(problem, begin * kPanelsAtOnce, std::min(end * kPanelsAtOnce, weight.panel_count), scratch);
  });
}

}  // namespace

Depth make_depth(std::int64_t k, std::int64_t block_k) {
  Depth depth{};
  depth.k = k;
  depth.block_k = block_k;
  depth.blocks = ceil_div(k, block_k);
  depth.chunks_per_block = ceil_div(block_k, kChunk);
  const std::int64_t last = k - std::max<std::int64_t>(0, depth.blocks - 1) * block_k;
  depth.chunks = std::max<std::int64_t>(0, depth.blocks - 1) * depth.chunks_per_block + ceil_div(last, kChunk);
  return depth;
}

void block_linear(const Rows& x, const Weight& weight, Quantization quantization, const Output& output) {
  if (output.n == 0) return;
  const Kernels& kernels = kernels_of(current_isa());
  const std::int64_t terms = terms_of(x.dtype, quantization);
  const std::int64_t row_bytes = std::max<std::int64_t>(1, weight.depth.chunks * kChunk * 2 * terms);
  const std::int64_t bound = std::max<std::int64_t>(32, kMostPreparedBytes / row_bytes);
  const std::int64_t rows_per_pass = std::min(kernels.max_rows / terms, bound);
  for (std::int64_t row = 0; row < x.rows; row += rows_per_pass) {
    Rows part = x;
    part.data = x.row(row);
    part.rows = std::min(rows_per_pass, x.rows - row);
    Output target = output;
    target.y = static_cast<char*>(output.y) + row * output.n * (output.dtype == Dtype::fp32 ? 4 : 2);
    linear_pass(kernels, part, weight, quantization, target);
  }
}

void quantize_activation(const Rows& x, std::int64_t k, std::int64_t block_k, Quantization quantization,
                         std::uint8_t* codes, float* scale) {
  const Kernels& kernels = kernels_of(current_isa());
  const std::int64_t groups = ceil_div(k, block_k);
  if (groups == 0) return;
  const std::int64_t grain = std::max<std::int64_t>(1, kLeastNumbersPerThread / std::max<std::int64_t>(1, k));
  parallel(x.rows, grain, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) {
      for (std::int64_t group = 0; group < groups; ++group) {
        const std::int64_t start = group * block_k;
        const std::int64_t count = std::min(block_k, k - start);
        const void* source = at(x.row(row), x.dtype, start);
        const float group_value = group_scale(kernels.amax(source, x.dtype, count), quantization);
        scale[row * groups + group] = group_value;
        kernels.quantize_codes(source, x.dtype, count, group_value, codes + row * k + start);
      }
    }
  });
}

void dequantize_weight(const std::uint8_t* weight, std::int64_t n, std::int64_t k, const float* scales,
                       const std::int32_t* scale_rows, std::int64_t block_k, Dtype dtype, void* out) {
  const Kernels& kernels = kernels_of(current_isa());
  const std::int64_t blocks = ceil_div(k, block_k);
  const std::int64_t size = dtype == Dtype::fp32 ? 4 : 2;
  const std::int64_t grain = std::max<std::int64_t>(1, kLeastNumbersPerThread / std::max<std::int64_t>(1, k));
  parallel(n, grain, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) {
      for (std::int64_t block = 0; block < blocks; ++block) {
        const std::int64_t start = row * k + block * block_k;
        const std::int64_t count = std::min(block_k, k - block * block_k);
        kernels.dequantize(weight + start, count, scales[scale_rows[row] * blocks + block], dtype,
                           static_cast<char*>(out) + start * size);
      }
    }
  });
}

}  // namespace qwen3_fp8_ascend::cpu
