#include "linear.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "isa.h"
#include "numbers.h"
#include "parallel.h"
#include "scratch.h"

namespace qwen3_fp8_ascend::cpu {
namespace {

constexpr std::int64_t kPanelsAtOnce = 2;  // the most that a kernel takes at a time: ranges are cut between such pairs

// From this many rows on, AMX reads whole tiles of as many.
constexpr std::int64_t kTileRows = 16;

// Less work than this is done by the caller alone: waking a thread costs a few microseconds.
constexpr std::int64_t kLeastBytesPerThread = 1 << 17;
constexpr std::int64_t kLeastNumbersPerThread = 1 << 15;

// Prepared activations are bounded by this, whatever the shape; more rows are taken in several passes.
constexpr std::int64_t kMostPreparedBytes = 32 << 20;

constexpr std::int64_t round_up(std::int64_t a, std::int64_t b) { return ceil_div(a, b) * b; }

float group_scale(float amax) {
  const float floored = amax < kAmaxFloor ? kAmaxFloor : amax;  // keeps NaN
  return floored / kE4m3Max;
}

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

int terms_of(Dtype dtype, bool quantize) {
  if (quantize || dtype == Dtype::bf16) return 1;
  return dtype == Dtype::fp16 ? 2 : 3;  // bf16 has 8 significant bits, fp16 11, fp32 24
}

const void* at(const void* x, Dtype dtype, std::int64_t index) {
  return static_cast<const char*>(x) + index * (dtype == Dtype::fp32 ? 4 : 2);
}

// One row of x into the kernels' form (see Activation).
void prepare_row(const Kernels& kernels, const void* x, Dtype dtype, bool quantize, const Depth& depth,
                 const Activation& out, std::int64_t row, std::uint16_t* values, float* scales) {
  const float code_factor = std::ldexp(1.0f, -kernels.weight_exponent);
  for (std::int64_t block = 0; block < depth.blocks; ++block) {
    const std::int64_t begin = block * depth.block_k;
    const std::int64_t count = std::min(depth.block_k, depth.k - begin);
    const float amax = kernels.amax(at(x, dtype, begin), dtype, count);
    const PowerScale power =
        quantize ? PowerScale{1.0f, group_scale(amax)} : power_scale(amax, kernels.weight_exponent);
    const std::int64_t first = block * depth.chunks_per_block;
    for (std::int64_t chunk = first; chunk < first + ceil_div(count, kChunk); ++chunk) {
      const std::int64_t length = depth.length_of(chunk);
      const void* source = at(x, dtype, depth.start_of(chunk));
      std::uint16_t* target = values + (chunk * out.capacity + row * out.terms) * kChunk;
      if (quantize) {
        kernels.quantize_values(source, dtype, length, power.scale, code_factor, target);
      } else {
        kernels.split_values(source, dtype, length, power.factor, std::isfinite(amax), out.terms, target, kChunk);
      }
      for (int term = 0; term < out.terms; ++term) {
        std::uint16_t* tail = target + term * kChunk + length;
        std::memset(tail, 0, static_cast<std::size_t>(round_up(length, 32) - length) * sizeof *tail);
        scales[chunk * out.capacity + row * out.terms + term] = power.scale;
      }
    }
  }
}

thread_local Scratch prepared_memory;
thread_local Scratch kernel_memory;

// All rows at once; they fit the kernel and the bound on prepared activations.
void linear_pass(const Kernels& kernels, Path path, const Rows& x, const Weight& weight, bool quantize,
                 const Output& output) {
  const Depth& depth = weight.depth;
  Activation prepared{};
  prepared.terms = terms_of(x.dtype, quantize);
  prepared.rows = x.rows * prepared.terms;
  prepared.capacity = prepared.rows < kTileRows ? prepared.rows : round_up(prepared.rows, kTileRows);
  const std::int64_t numbers = depth.chunks * prepared.capacity;
  auto* values = static_cast<std::uint16_t*>(
      prepared_memory.grow(static_cast<std::size_t>(numbers) * (kChunk * sizeof(std::uint16_t) + sizeof(float))));
  auto* scales = reinterpret_cast<float*>(values + numbers * kChunk);
  prepared.values = values;
  prepared.scales = scales;

  const std::int64_t row_grain = std::max<std::int64_t>(1, kLeastNumbersPerThread / std::max<std::int64_t>(1, depth.k));
  parallel(x.rows, row_grain, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) {
      prepare_row(kernels, x.row(row), x.dtype, quantize, depth, prepared, row, values, scales);
    }
  });

  const Problem problem{weight, prepared, output, path};
  const std::int64_t bytes_at_once = std::max<std::int64_t>(1, kPanelsAtOnce * depth.padded() * kPanelRows);
  // Work grows with the rows: eight of them count as one more pass over the codes.
  const std::int64_t work_at_once = bytes_at_once * (1 + prepared.rows / 8);
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

void block_linear(const Rows& x, const Weight& weight, bool quantize, const Output& output) {
  if (output.n == 0) return;
  const Kernels& kernels = kernels_of(current_isa());
  const std::int64_t terms = terms_of(x.dtype, quantize);
  // By the whole batch, so that the rows of a short last pass have the bits of all others.
  const Path path = x.rows * terms <= kernels.register_rows ? Path::registers : Path::tiles;
  const std::int64_t row_bytes = std::max<std::int64_t>(1, weight.depth.chunks * kChunk * 2 * terms);
  const std::int64_t bound = std::max<std::int64_t>(32, kMostPreparedBytes / row_bytes);
  const std::int64_t rows_per_pass = std::min(kernels.max_rows / terms, bound);
  for (std::int64_t row = 0; row < x.rows; row += rows_per_pass) {
    Rows part = x;
    part.data = x.row(row);
    part.rows = std::min(rows_per_pass, x.rows - row);
    Output target = output;
    target.y = static_cast<char*>(output.y) + row * output.n * (output.dtype == Dtype::fp32 ? 4 : 2);
    linear_pass(kernels, path, part, weight, quantize, target);
  }
}

void quantize_activation(const Rows& x, std::int64_t k, std::int64_t block_k, std::uint8_t* codes, float* scale) {
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
        const float group_value = group_scale(kernels.amax(source, x.dtype, count));
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
