// Block-scaled linear on AArch64, once for every arithmetic.
//
// A unit is a register of numbers: a quad of k, in the order of the packed codes, of each of one or two rows. Each
// output has one chain of products per chunk, quad by quad, whether weights are decoded in registers or into L1, so
// that its bits depend neither on the number of rows nor on the number of threads.
//
// An arithmetic says what a unit is:
//   Unit                          the register
//   kUnitRows                     rows in it, of x and of the weight
//   kDecodeFactor                 undoes the power of two that decoded weights carry beside `Kernels::weight_exponent`
//   decode<HasNan>(codes, units)  the 16 codes of a group, four weight rows, to 4 / kUnitRows units
//   arrange(rows, units)          four k of kUnitRows rows of bf16 to a unit
//   multiply(sum, x, w)           sum + the products of a unit of x with a unit of weights
//   collect(sums, row)            what the sums of one group hold for row `row` of a unit of x: one number a weight row
#pragma once

#include <arm_neon.h>

#include "runs.h"

namespace qwen3_fp8_ascend::cpu {
namespace {

constexpr int kQuads = kChunk / 4;
constexpr int kGroupRows = 4;                     // weight rows whose codes fill a register
constexpr int kGroups = kPanelRows / kGroupRows;  // of a panel
constexpr int kGroupBytes = 4 * kGroupRows;       // of a quad
constexpr int kSums = 16;                         // registers that hold sums: half of all
constexpr int kMostUnits = 4;                     // units of x that share decoded weights in registers
constexpr std::int64_t kMaxRows = 128;
constexpr std::int64_t kTilePanels = 4;      // panels that share a chunk of arranged activations
constexpr int kAhead = kChunk * kPanelRows;  // codes are prefetched a chunk before use

template <class Arithmetic>
constexpr std::int64_t kRegisterRows = kMostUnits * Arithmetic::kUnitRows;

template <class Arithmetic>
constexpr int kGroupUnits = kGroupRows / Arithmetic::kUnitRows;

// Groups of weight rows that `units` units of x are multiplied with at a time; three units take as many as four.
template <class Arithmetic>
constexpr int groups_beside(int units) {
  return kSums / ((units == 3 ? 4 : units) * kGroupUnits<Arithmetic>);
}

template <class Arithmetic>
struct NeonScratch {
  using Unit = typename Arithmetic::Unit;
  alignas(64) Unit x[kMaxRows / Arithmetic::kUnitRows][kQuads];        // one chunk of activations
  alignas(64) Unit weights[kQuads][kGroups][kGroupUnits<Arithmetic>];  // one decoded chunk of a panel
  alignas(64) float sums[kTilePanels][kMaxRows][kPanelRows];
};

// k, k + 1, k + 2, k + 3 to the order of the packed codes: k, k + 2, k + 1, k + 3.
inline uint16x4_t swap_middle(uint16x4_t quad) { return vzip1_u16(quad, vext_u16(quad, quad, 2)); }

// Decodes weights where they are used.
template <class Arithmetic, bool HasNan>
class PackedCodes {
 public:
  explicit PackedCodes(const std::uint8_t* codes) : codes_(codes) {}

  void load(std::int64_t quad, int group, typename Arithmetic::Unit* units) const {
    Arithmetic::template decode<HasNan>(codes_ + quad * kQuadBytes + group * kGroupBytes, units);
  }

  // Every cache line once, whatever number of groups is taken at a time.
  template <int Groups>
  void prefetch(std::int64_t quad, int group) const {
    const std::uint8_t* ahead = codes_ + quad * kQuadBytes + group * kGroupBytes + kAhead;
    if constexpr (Groups * kGroupBytes >= kLine) {
#pragma GCC unroll 2
      for (int at = 0; at < Groups * kGroupBytes; at += kLine) __builtin_prefetch(ahead + at);
    } else if (group * kGroupBytes % kLine == 0) {
      __builtin_prefetch(ahead);
    }
  }

 private:
  const std::uint8_t* codes_;
};

// Takes weights that were decoded before.
template <class Arithmetic>
class DecodedTile {
 public:
  using Unit = typename Arithmetic::Unit;
  explicit DecodedTile(const Unit (*weights)[kGroups][kGroupUnits<Arithmetic>]) : weights_(weights) {}

  void load(std::int64_t quad, int group, Unit* units) const {
#pragma GCC unroll 4
    for (int i = 0; i < kGroupUnits<Arithmetic>; ++i) units[i] = weights_[quad][group][i];
  }

  template <int Groups>
  void prefetch(std::int64_t, int) const {}

 private:
  const Unit (*weights_)[kGroups][kGroupUnits<Arithmetic>];
};

// What the rows of one step have in common: a chunk of a panel.
struct ChunkStep {
  std::int64_t quads;
  std::int64_t rows;     // of x, from the first row of the step on
  const float* x_scale;  // of the first row
  float w_scale;
  float (*sums)[kPanelRows];
};

// sum += partial * x_scale * w_scale for four weight rows.
inline void scale_and_add(float32x4_t partial, float x_scale, float w_scale, float* sum) {
  vst1q_f32(sum, vfmaq_n_f32(vld1q_f32(sum), vmulq_n_f32(partial, x_scale), w_scale));
}

// `Units` units of x times `Groups` groups of weight rows from `group` on.
template <class Arithmetic, int Units, int Groups, class Weights>
void multiply_step(const typename Arithmetic::Unit (*x)[kQuads], const Weights& weights, int group,
                   const ChunkStep& step) {
  constexpr int kColumns = kGroupUnits<Arithmetic>;
  float32x4_t partial[Units][Groups][kColumns];
#pragma GCC unroll 4
  for (int u = 0; u < Units; ++u) {
#pragma GCC unroll 8
    for (int g = 0; g < Groups; ++g) {
#pragma GCC unroll 4
      for (int c = 0; c < kColumns; ++c) partial[u][g][c] = vdupq_n_f32(0.0f);
    }
  }
  for (std::int64_t quad = 0; quad < step.quads; ++quad) {
    weights.template prefetch<Groups>(quad, group);
#pragma GCC unroll 8
    for (int g = 0; g < Groups; ++g) {
      typename Arithmetic::Unit w[kColumns];
      weights.load(quad, group + g, w);
#pragma GCC unroll 4
      for (int u = 0; u < Units; ++u) {
#pragma GCC unroll 4
        for (int c = 0; c < kColumns; ++c) {
          partial[u][g][c] = Arithmetic::multiply(partial[u][g][c], x[u][quad], w[c]);
        }
      }
    }
  }
#pragma GCC unroll 4
  for (int u = 0; u < Units; ++u) {
#pragma GCC unroll 2
    for (int r = 0; r < Arithmetic::kUnitRows; ++r) {
      const int row = u * Arithmetic::kUnitRows + r;
      if (row >= step.rows) break;
#pragma GCC unroll 8
      for (int g = 0; g < Groups; ++g) {
        const float32x4_t sums = vmulq_n_f32(Arithmetic::collect(partial[u][g], r), Arithmetic::kDecodeFactor);
        scale_and_add(sums, step.x_scale[row], step.w_scale, step.sums[row] + (group + g) * kGroupRows);
      }
    }
  }
}

// All groups of a panel, for at most kMostUnits units of x.
template <class Arithmetic, int Units, class Weights>
void multiply_panel(const typename Arithmetic::Unit (*x)[kQuads], const Weights& weights, const ChunkStep& step) {
  if constexpr (Units > 1) {
    if (step.rows <= (Units - 1) * Arithmetic::kUnitRows) {
      return multiply_panel<Arithmetic, Units - 1>(x, weights, step);
    }
  }
  constexpr int kStep = groups_beside<Arithmetic>(Units);
  for (int group = 0; group < kGroups; group += kStep) {
    multiply_step<Arithmetic, Units, kStep>(x, weights, group, step);
  }
}

// Any number of rows: blocks of weights that stay in L1 while all rows pass.
template <class Arithmetic>
void multiply_tile(const NeonScratch<Arithmetic>& scratch, const ChunkStep& step) {
  constexpr int kStep = groups_beside<Arithmetic>(kMostUnits);
  constexpr std::int64_t kRows = kRegisterRows<Arithmetic>;
  const DecodedTile<Arithmetic> weights(scratch.weights);
  for (int group = 0; group < kGroups; group += kStep) {
    ChunkStep part = step;
    const auto* x = scratch.x;
    for (; part.rows >= kRows; part.rows -= kRows) {
      multiply_step<Arithmetic, kMostUnits, kStep>(x, weights, group, part);
      x += kMostUnits;
      part.x_scale += kRows;
      part.sums += kRows;
    }
    const std::int64_t units = ceil_div(part.rows, Arithmetic::kUnitRows);
    if (units == 4) multiply_step<Arithmetic, 4, kStep>(x, weights, group, part);
    if (units == 3) multiply_step<Arithmetic, 3, kStep>(x, weights, group, part);
    if (units == 2) multiply_step<Arithmetic, 2, kStep>(x, weights, group, part);
    if (units == 1) multiply_step<Arithmetic, 1, kStep>(x, weights, group, part);
  }
}

template <class Arithmetic>
void arrange_chunk(const Activation& x, std::int64_t chunk, std::int64_t quads,
                   typename Arithmetic::Unit (*out)[kQuads]) {
  static constexpr std::uint16_t kZeros[kChunk] = {};
  for (std::int64_t row = 0; row < x.rows; row += Arithmetic::kUnitRows) {
    const std::uint16_t* rows[Arithmetic::kUnitRows];
    for (int r = 0; r < Arithmetic::kUnitRows; ++r) rows[r] = row + r < x.rows ? x.values_of(chunk, row + r) : kZeros;
    auto* units = out[row / Arithmetic::kUnitRows];
    for (std::int64_t quad = 0; quad < quads; ++quad) units[quad] = Arithmetic::arrange(rows, quad);
  }
}

template <class Arithmetic, bool HasNan>
void multiply_chunk(const std::uint8_t* codes, const ChunkStep& step, NeonScratch<Arithmetic>& scratch) {
  const PackedCodes<Arithmetic, HasNan> packed(codes);
  if (step.rows <= kRegisterRows<Arithmetic>) return multiply_panel<Arithmetic, kMostUnits>(scratch.x, packed, step);
  for (std::int64_t quad = 0; quad < step.quads; ++quad) {
    packed.template prefetch<kGroups>(quad, 0);
#pragma GCC unroll 8
    for (int group = 0; group < kGroups; ++group) packed.load(quad, group, scratch.weights[quad][group]);
  }
  multiply_tile(scratch, step);
}

template <class Arithmetic>
void linear(const Problem& problem, std::int64_t begin, std::int64_t end, void* memory) {
  auto& scratch = *static_cast<NeonScratch<Arithmetic>*>(memory);
  const Weight& w = problem.weight;
  const Activation& x = problem.activation;
  // Few rows are arranged anew for each panel, so that its codes are read in one go.
  const std::int64_t panels_at_once = x.rows <= kRegisterRows<Arithmetic> ? 1 : kTilePanels;
  for (std::int64_t first = begin; first < end; first += panels_at_once) {
    const std::int64_t panels = end - first < panels_at_once ? end - first : panels_at_once;
    for (std::int64_t p = 0; p < panels; ++p) {
      std::memset(scratch.sums[p], 0, static_cast<std::size_t>(x.rows) * sizeof scratch.sums[p][0]);
    }
    for (std::int64_t chunk = 0; chunk < w.depth.chunks; ++chunk) {
      const std::int64_t quads = ceil_div(w.depth.length_of(chunk), 4);
      arrange_chunk<Arithmetic>(x, chunk, quads, scratch.x);
      for (std::int64_t p = 0; p < panels; ++p) {
        const std::int64_t panel = first + p;
        const std::uint8_t* codes = w.codes_of(panel) + w.depth.start_of(chunk) * kPanelRows;
        const ChunkStep step{quads, x.rows, x.scales_of(chunk, 0), w.scales_of(panel)[w.depth.block_of(chunk)],
                             scratch.sums[p]};
        if (w.panels[panel].has_nan != 0) {
          multiply_chunk<Arithmetic, true>(codes, step, scratch);
        } else {
          multiply_chunk<Arithmetic, false>(codes, step, scratch);
        }
      }
    }
    for (std::int64_t p = 0; p < panels; ++p)
      store_panel(problem, first + p, scratch.sums[p][0], kPanelRows, 0, x.rows);
  }
}

}  // namespace
}  // namespace qwen3_fp8_ascend::cpu
