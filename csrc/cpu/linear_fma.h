// The linear with fp32 multiply-adds: AVX2, and AVX-512 without bf16 instructions.
//
// A few panels are taken together, chunk by chunk: a chunk of activations is widened to fp32 once for all of them, and
// the memory has several places to read from. A chunk is taken in strips, so that what is decoded of it leaves most of
// L1 to the activations. A strip is decoded to fp16 while the one before it is multiplied (with one row: quad by quad),
// so that the memory is read all the time and decoding takes what the multiplier leaves. It is widened while it is
// loaded.
//
// Cores differ in what is cheap: a file of kernels says so in a `Core` for each. The bits are the same.
#pragma once

#include <algorithm>
#include <cstring>

#include "runs.h"
#include "tiles_fma.h"

namespace qwen3_fp8_ascend::cpu {
namespace {

constexpr std::int64_t kMaxRows = 256;
constexpr std::int64_t kNever = kMaxRows + 1;  // as `Core::kLongBatch`
constexpr std::int64_t kMostTogether = 8;      // panels, on any core

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

// A chunk of a panel.
struct Step {
  const std::uint8_t* codes;
  const float* x_scale;
  std::int64_t chunk;
  std::int64_t quads;
  std::int64_t panel;  // from the first one on
  float w_scale;
  bool has_nan;
};

// One chunk after the other: that of all panels, then the next one of all panels. Steps are made ahead, so that each is
// made once and those behind the one at hand can be looked at.
template <class Core>
class Steps {
 public:
  Steps(const Weight& weight, const Activation& x, std::int64_t first, std::int64_t panels)
      : weight_(weight), x_(x), panels_(panels), left_(weight.depth.chunks * panels), unmade_(left_) {
    for (std::int64_t p = 0; p < panels; ++p) {
      codes_[p] = weight.codes_of(first + p);
      scales_[p] = weight.scales_of(first + p);
      has_nan_[p] = weight.panels[first + p].has_nan != 0;
    }
    for (std::int64_t i = 0; i < std::max(Core::kEarlyChunks * panels, kLookedAt); ++i) make();
  }

  bool ended() const { return left_ == 0; }

  // The step at hand (0), the one behind it, and so on; null behind the last.
  const Step* behind(std::int64_t count) const { return count < left_ ? &ring_[(at_ + count) % kRing] : nullptr; }

  void advance() {
    ++at_;
    --left_;
    const Step* made = make();
    if (Core::kEarlyChunks == 0 || made == nullptr) return;
    for (int line = 0; line < kEarlyLines; ++line) {
      _mm_prefetch(reinterpret_cast<const char*>(made->codes + line * kLine), _MM_HINT_T1);
    }
  }

 private:
  static constexpr std::int64_t kLookedAt = 1 + 2 * Core::kPlaces + Core::kLaterSteps;  // what `behind` may give
  static constexpr int kEarlyLines = 2;
  static constexpr int kRing = 16;
  static_assert(Core::kPanelsTogether <= kMostTogether && kLookedAt <= kRing);
  static_assert(Core::kEarlyChunks * kMostTogether <= kRing);

  const Step* make() {
    if (unmade_ == 0) return nullptr;
    if (panel_ == 0) enter_chunk();
    Step& step = ring_[made_ % kRing];
    step = {codes_[panel_] + offset_, x_scale_, chunk_, quads_, panel_, scales_[panel_][block_], has_nan_[panel_]};
    ++made_;
    --unmade_;
    if (++panel_ == panels_) {
      panel_ = 0;
      ++chunk_;
    }
    return &step;
  }

  // Here and not for each panel: these are divisions.
  void enter_chunk() {
    const Depth& depth = weight_.depth;
    quads_ = (depth.length_of(chunk_) + 3) / 4;
    offset_ = depth.start_of(chunk_) * kPanelRows;
    block_ = depth.block_of(chunk_);
    x_scale_ = x_.scales_of(chunk_, 0);
  }

  const Weight& weight_;
  const Activation& x_;
  std::int64_t panels_;
  std::int64_t left_;  // with the one at hand
  std::int64_t unmade_;
  std::uint64_t at_ = 0;
  std::uint64_t made_ = 0;
  Step ring_[kRing];

  // Of the step that is made next.
  std::int64_t panel_ = 0;
  std::int64_t chunk_ = 0;
  std::int64_t quads_ = 0;
  std::int64_t offset_ = 0;
  std::int64_t block_ = 0;
  const float* x_scale_ = nullptr;

  const std::uint8_t* codes_[Core::kPanelsTogether];
  const float* scales_[Core::kPanelsTogether];
  bool has_nan_[Core::kPanelsTogether];
};

// The codes that are asked for beside a step: those of the next steps behind `decoded` others. Where a core has two
// places, it is half of each of two steps' codes, and beside the next step the other half. And, into L2, those of
// `Later` steps more.
template <class Core, std::int64_t Later>
class Ahead {
 public:
  explicit Ahead(int decoded) : decoded_(decoded) {}

  // Of the step at hand, once.
  void look(const Steps<Core>& steps) {
    for (int place = 0; place < kPlaces; ++place) {
      for (int d = 0; d < kDistances; ++d) {
        codes_[d][place] = codes_of(steps, decoded_ + kPlaces - part_ + place + d * Later);
      }
    }
    part_ = (part_ + 1) % kPlaces;
  }

  // What is asked for beside one of so many strips.
  template <int Strips>
  auto beside(int strip) const {
    static_assert(Strips >= kPlaces || Strips == 1);
    constexpr int kOfStrip = Strips >= kPlaces ? 1 : kPlaces;  // places
    const int first = Strips >= kPlaces ? strip % kPlaces : 0;
    Prefetch<kOfStrip, kDistances> asked;
    for (int d = 0; d < kDistances; ++d) {
      for (int p = 0; p < kOfStrip; ++p) {
        asked.codes[d][p] = codes_[d][first + p] + strip / kPlaces * (kChunkBytes / Strips);
      }
    }
    return asked;
  }

 private:
  static constexpr int kPlaces = Core::kPlaces;
  static constexpr int kDistances = Later > 0 ? 2 : 1;
  static constexpr int kChunkBytes = kChunk * kPanelRows;

  // This step's part of those of another. Where nothing comes later, codes that are in the cache.
  const std::uint8_t* codes_of(const Steps<Core>& steps, std::int64_t behind) const {
    const Step* step = steps.behind(behind);
    return (step == nullptr ? steps.behind(0) : step)->codes + part_ * (kChunkBytes / kPlaces);
  }

  int decoded_;
  int part_ = 0;
  const std::uint8_t* codes_[kDistances][kPlaces] = {};
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
  for (std::int64_t first = begin; first < end; first += Core::kPanelsTogether) {
    const std::int64_t panels = std::min(Core::kPanelsTogether, end - first);
    for (std::int64_t p = 0; p < panels; ++p) {
      std::memset(scratch.sums[p], 0, static_cast<std::size_t>(x.rows) * sizeof scratch.sums[p][0]);
    }
    Steps<Core> steps(problem.weight, x, first, panels);
    if (x.rows == 1) {
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
