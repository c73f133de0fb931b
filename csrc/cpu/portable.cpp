// The kernels in plain C++: right on any processor, and the reading version of the others.
#include "runs.h"

namespace qwen3_fp8_ascend::cpu {
namespace {

constexpr std::int64_t kRowsAtOnce = 4;

struct Scratch {
  float weights[kChunk][kPanelRows];
  float sums[1];  // [activation rows][kPanelRows]
};

constexpr std::int64_t kMaxRows = 256;

// One chunk of a panel as fp32, [k][row], codes beyond `length` as zero.
void decode_chunk(const std::uint8_t* codes, std::int64_t length, float (*out)[kPanelRows]) {
  for (std::int64_t quad = 0; quad < (length + 3) / 4; ++quad) {
    const std::uint8_t* in = codes + quad * kQuadBytes;
    for (int row = 0; row < kPanelRows; ++row) {
      for (int i = 0; i < 4; ++i) {
        const unsigned code = in[4 * row + i % 2 * 2 + i / 2];
        const std::uint32_t magnitude =
            static_cast<std::uint32_t>(kDecodeTables.high[code & 0x7fu]) << 24 | kDecodeTables.low[code & 0x7fu] << 16;
        out[quad * 4 + i][row] = float_of(magnitude | (code & 0x80u) << 24);
      }
    }
  }
}

template <int Rows>
void multiply(const Activation& x, std::int64_t chunk, std::int64_t row, std::int64_t length,
              const float (*weights)[kPanelRows], float w_scale, float* sums) {
  float partial[Rows][kPanelRows] = {};
  const std::uint16_t* values = x.values_of(chunk, row);
  for (std::int64_t k = 0; k < length; ++k) {
    for (int r = 0; r < Rows; ++r) {
      const float value = fp32_of_bf16(values[r * kChunk + k]);
      for (int i = 0; i < kPanelRows; ++i) partial[r][i] += value * weights[k][i];
    }
  }
  for (int r = 0; r < Rows; ++r) {
    const float x_scale = *x.scales_of(chunk, row + r);
    for (int i = 0; i < kPanelRows; ++i) sums[r * kPanelRows + i] += partial[r][i] * x_scale * w_scale;
  }
}

void linear(const Problem& problem, std::int64_t begin, std::int64_t end, void* memory) {
  auto* scratch = static_cast<Scratch*>(memory);
  const Weight& w = problem.weight;
  const Activation& x = problem.activation;
  for (std::int64_t panel = begin; panel < end; ++panel) {
    for (std::int64_t i = 0; i < x.rows * kPanelRows; ++i) scratch->sums[i] = 0.0f;
    for (std::int64_t chunk = 0; chunk < w.depth.chunks; ++chunk) {
      const std::int64_t length = w.depth.length_of(chunk);
      decode_chunk(w.codes_of(panel) + w.depth.start_of(chunk) * kPanelRows, length, scratch->weights);
      const float w_scale = w.scales_of(panel)[w.depth.block_of(chunk)];
      std::int64_t row = 0;
      for (; row + kRowsAtOnce <= x.rows; row += kRowsAtOnce) {
        multiply<kRowsAtOnce>(x, chunk, row, length, scratch->weights, w_scale, scratch->sums + row * kPanelRows);
      }
      for (; row < x.rows; ++row) {
        multiply<1>(x, chunk, row, length, scratch->weights, w_scale, scratch->sums + row * kPanelRows);
      }
    }
    store_panel(problem, panel, scratch->sums, kPanelRows, 0, x.rows);
  }
}

}  // namespace

constexpr Kernels kPortableKernels = [] {
  Kernels kernels = run_kernels();
  kernels.linear = linear;
  kernels.scratch_bytes = sizeof(Scratch) + kMaxRows * kPanelRows * sizeof(float);
  kernels.max_rows = kMaxRows;
  kernels.register_rows = 0;
  return kernels;
}();

}  // namespace qwen3_fp8_ascend::cpu
