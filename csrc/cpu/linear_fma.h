// The linear with fp32 multiply-adds: AVX2, and AVX-512 without bf16 instructions.
//
// A few panels are taken together, chunk by chunk: a chunk of activations is widened to fp32 once for all of them, and
// the memory has several places to read from. A chunk is taken in strips, so that what is decoded of it leaves most of
// L1 to the activations. A strip is decoded to fp16 while the one before it is multiplied (with one row: quad by quad),
// so that the memory is read all the time and decoding takes what the multiplier leaves. It is widened while it is
// loaded.
//
// One and two rows need none of that where multipliers take subnormal numbers: see subnormals_fma.h.
//
// Cores differ in what is cheap: a file of kernels says so in a `Core` for each. The bits are the same.
#pragma once

#include <algorithm>
#include <cstring>

#include "runs.h"
#include "steps_fma.h"
#include "subnormals_fma.h"
#include "tiles_fma.h"

namespace qwen3_fp8_ascend::cpu {
namespace {

constexpr std::int64_t kMaxRows = 256;
constexpr std::int64_t kNever = kMaxRows + 1;  // as `Core::kLongBatch`

constexpr std::int64_t kFewRows = kTileRows<FewRows::kGroupsOfStrip>;

// Processors take a load to depend on a store before it whose address ends in the same 12 bits. While one strip is read
// another is written at the same place: half of 4096 bytes apart, the store is long done.
struct HalfStrip {
  alignas(64) std::uint16_t numbers[strip_numbers(4)];
  std::uint8_t apart[2048];
};

struct Scratch {
  alignas(64) float x[kMaxRows][kChunk];  // one chunk of activations as fp32
  alignas(64) float sums[kMostTogether][kMaxRows][kPanelRows];
  HalfStrip half[2];                                      // the strip that is multiplied, and the next one
  alignas(64) float kept[strip_numbers(4)];               // that strip as fp32
  alignas(64) std::uint16_t row[strip_numbers(kGroups)];  // a whole chunk, for one row
  DecodeMasks masks;
};

void widen_activations(const Activation& x, const Step& now, float (*out)[kChunk]) {
  for (std::int64_t row = 0; row < x.rows; ++row) {
    load_run(x.values_of(now.chunk, row), Dtype::bf16, 0, 4 * now.quads, out[row]);
  }
}

// Of the strip that begins with weight row `row` of the panel.
Operands operands(const Step& now, Scratch& scratch, int row = 0) {
  auto* sums = reinterpret_cast<float (*)[kPanelRows]>(&scratch.sums[now.panel][0][row]);
  return {now.quads, scratch.x, now.x_scale, now.w_scale, sums};
}

// All rows times one strip, and `work` beside the first of them.
template <class Core, class Tiles, class Work>
void multiply_rows(const Operands& o, std::int64_t rows, const std::uint16_t* half, float* kept, const Work& work) {
  if constexpr (Tiles::kOne) {
    multiply_tile<Tiles>(o, rows, Half{half}, work);
  } else if (rows <= Core::kRowsWithoutKeeping) {
    std::int64_t row = multiply_tile<Tiles>(o, rows, Half{half}, work);
    while (row < rows) row += multiply_tile<Tiles>(o.from_row(row), rows - row, Half{half}, Nothing{});
  } else {
    std::int64_t row = multiply_tile<Tiles>(o, rows, HalfAndKeep{half, kept}, work);
    while (row < rows) row += multiply_tile<Tiles>(o.from_row(row), rows - row, Kept{kept}, Nothing{});
  }
}

template <class Core>
void multiply_one(const Problem& problem, Steps<Core>& steps, Scratch& scratch) {
  Ahead<Core, Core::kLaterSteps> ahead(0);
  for (; !steps.ended(); steps.advance()) {
    const Step& now = *steps.behind(0);
    if (now.panel == 0) widen_activations(problem.activation, now, scratch.x);
    const Operands o = operands(now, scratch);
    ahead.look(steps);
    const auto prefetch = ahead.template beside<1>(0);
    if (now.has_nan) {
      multiply_row<true>(o, now.codes, scratch.row, prefetch);
    } else {
      multiply_row<false>(o, now.codes, scratch.row, prefetch);
    }
  }
}

// One or two rows, decoded in registers.
template <class Core, int Rows>
void multiply_few(const Problem& problem, Steps<Core>& steps, Scratch& scratch) {
  constexpr int kStrips = Rows;
  constexpr int kOfStrip = kRegisters / kStrips;  // registers
  const SubnormalsKept kept;
  Ahead<Core, Core::kLaterSteps> ahead(0);
  for (; !steps.ended(); steps.advance()) {
    const Step& now = *steps.behind(0);
    if (now.panel == 0) {
      widen_activations(problem.activation, now, scratch.x);
      for (int row = 0; row < Rows; ++row) {
        for (std::int64_t i = 0; i < 4 * now.quads; ++i) scratch.x[row][i] *= kRaise;
      }
    }
    ahead.look(steps);
    for (int strip = 0; strip < kStrips; ++strip) {
      multiply_subnormals<Rows, kOfStrip>(operands(now, scratch, strip * kOfStrip * kLanes),
                                          now.codes + strip * kOfStrip * kRegisterBytes,
                                          ahead.template beside<kStrips>(strip));
    }
  }
}

template <class Core, class Tiles>
void multiply_panels(const Problem& problem, Steps<Core>& steps, Scratch& scratch) {
  constexpr int kGroupsOfStrip = Tiles::kGroupsOfStrip;
  constexpr int kStrips = kGroups / kGroupsOfStrip;
  const Activation& x = problem.activation;
  constexpr std::int64_t kLater = Tiles::kOne ? Core::kLaterSteps : 0;  // more rows wait for the multiplier
  Ahead<Core, kLater> ahead(1);
  int turn = 0;  // which half holds the strip at hand
  if (const Step* first = steps.behind(0)) {
    decode_strip<kGroupsOfStrip>(first->codes, first->quads, first->has_nan, scratch.half[0].numbers);
  }
  for (; !steps.ended(); steps.advance()) {
    const Step& now = *steps.behind(0);
    const Step* next = steps.behind(1);
    if (now.panel == 0) widen_activations(x, now, scratch.x);
    ahead.look(steps);
    for (int strip = 0; strip < kStrips; ++strip, turn = 1 - turn) {
      const Operands o = operands(now, scratch, strip * kGroupsOfStrip * kGroupRows);
      const std::uint16_t* half = scratch.half[turn].numbers;
      std::uint16_t* out = scratch.half[1 - turn].numbers;
      const bool last = strip + 1 == kStrips;
      const Step* source = last ? next : &now;  // of the strip after this one
      const std::uint8_t* codes =
          source == nullptr ? nullptr : source->codes + (last ? 0 : strip + 1) * kGroupsOfStrip * kGroupBytes;
      auto prefetch = ahead.template beside<kStrips>(strip);
      if (codes != nullptr && !source->has_nan && source->quads == now.quads) {
        const DecodeNext<decltype(prefetch)> decode_next{codes, out, &scratch.masks, prefetch};
        multiply_rows<Core, Tiles>(o, x.rows, half, scratch.kept, decode_next);
      } else {
        multiply_rows<Core, Tiles>(o, x.rows, half, scratch.kept, prefetch);
        if (codes != nullptr) decode_strip<kGroupsOfStrip>(codes, source->quads, source->has_nan, out);
      }
    }
  }
}

template <class Core>
void multiply_many(const Problem& problem, Steps<Core>& steps, Scratch& scratch) {
  if constexpr (Core::kLongBatch != kNever) {
    if (problem.activation.rows >= Core::kLongBatch) return multiply_panels<Core, LongBatch>(problem, steps, scratch);
  }
  multiply_panels<Core, ManyRows>(problem, steps, scratch);
}

template <class Core>
void linear(const Problem& problem, std::int64_t begin, std::int64_t end, void* memory) {
  auto& scratch = *static_cast<Scratch*>(memory);
  scratch.masks = DecodeMasks{};
  const Activation& x = problem.activation;
  const bool few = Core::kTakesSubnormals && x.rows <= kSubnormalRows && take_subnormals(x, problem.weight.depth);
  const std::int64_t together = x.rows == 1 ? Core::kPanelsOfOneRow : Core::kPanelsTogether;
  Steps<Core> steps(problem.weight, x, begin, end, together);
  for (std::int64_t first = begin; first < end; first += together) {
    const std::int64_t panels = std::min(together, end - first);
    bool has_nan = false;
    for (std::int64_t p = 0; p < panels; ++p) {
      std::memset(scratch.sums[p], 0, static_cast<std::size_t>(x.rows) * sizeof scratch.sums[p][0]);
      has_nan = has_nan || problem.weight.panels[first + p].has_nan != 0;
    }
    steps.begin_group(panels);
    if (few && !has_nan && x.rows == 1) {
      multiply_few<Core, 1>(problem, steps, scratch);
    } else if (few && !has_nan) {
      multiply_few<Core, kSubnormalRows>(problem, steps, scratch);
    } else if (x.rows == 1) {
      multiply_one(problem, steps, scratch);
    } else if (x.rows <= kFewRows) {
      multiply_panels<Core, FewRows>(problem, steps, scratch);
    } else {
      multiply_many(problem, steps, scratch);
    }
    for (std::int64_t p = 0; p < panels; ++p) {
      store_panel(problem, first + p, scratch.sums[p][0], kPanelRows, 0, x.rows);
    }
  }
}

template <class Core>
constexpr Kernels kernels_for() {
  Kernels kernels = run_kernels();
  kernels.linear = linear<Core>;
  kernels.scratch_bytes = sizeof(Scratch);
  kernels.max_rows = kMaxRows;
  kernels.register_rows = kFewRows;
  kernels.multiply_add = multiply_add;
  return kernels;
}

}  // namespace
}  // namespace qwen3_fp8_ascend::cpu
