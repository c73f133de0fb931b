// The order in which a linear with fp32 multiply-adds walks over its weights: a few panels together, chunk by chunk, so
// that the memory has several places to read from; and what it asks for ahead.
#pragma once

#include <algorithm>

#include "tiles_fma.h"

namespace qwen3_fp8_ascend::cpu {
namespace {

constexpr std::int64_t kMostTogether = 8;  // panels, on any core

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

// Panels [begin, end) in groups of at most `together`. Of a group one chunk after the other: that of all its panels,
// then the next one of all its panels. Steps are made ahead, so that each is made once and those behind the one at hand
// can be looked at: those of the next group too, and of panels behind `end`, which another call may multiply.
template <class Core>
class Steps {
 public:
  Steps(const Weight& weight, const Activation& x, std::int64_t begin, std::int64_t end, std::int64_t together)
      : weight_(weight), x_(x), end_(end), together_(together), first_(begin) {
    enter_group();
    const std::int64_t early = Core::kEarlyChunks * panels_;
    for (std::int64_t i = 0; i < std::max(early, kLookedAt); ++i) make();
  }

  // The next group, which has so many panels, begins.
  void begin_group(std::int64_t panels) { left_ = weight_.depth.chunks * panels; }

  // Whether the group at hand has.
  bool ended() const { return left_ == 0; }

  // The step at hand (0), the one behind it, and so on; null behind the last of the group.
  const Step* behind(std::int64_t count) const { return count < left_ ? &ring_[(at_ + count) % kRing] : nullptr; }

  // The same, but null behind the last of all.
  const Step* later(std::int64_t count) const { return at_ + count < made_ ? &ring_[(at_ + count) % kRing] : nullptr; }

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
  static constexpr std::int64_t kLookedAt = 1 + 2 * Core::kPlaces + Core::kLaterSteps;  // what `later` may give
  static constexpr int kEarlyLines = 2;
  static constexpr int kRing = 16;
  static_assert(Core::kPanelsTogether <= kMostTogether && kLookedAt <= kRing);
  static_assert(Core::kPanelsOfOneRow <= Core::kPanelsTogether);
  static_assert(Core::kEarlyChunks * kMostTogether <= kRing);

  const Step* make() {
    if (unmade_ == 0 && !enter_group()) return nullptr;
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

  // Whether there is one, and it has chunks.
  bool enter_group() {
    panels_ = std::min(together_, (first_ < end_ ? end_ : weight_.panel_count) - first_);
    unmade_ = weight_.depth.chunks * panels_;
    chunk_ = 0;
    for (std::int64_t p = 0; p < panels_; ++p, ++first_) {
      codes_[p] = weight_.codes_of(first_);
      scales_[p] = weight_.scales_of(first_);
      has_nan_[p] = weight_.panels[first_].has_nan != 0;
    }
    return unmade_ > 0;
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
  const std::int64_t end_;
  const std::int64_t together_;
  std::int64_t left_ = 0;  // of the group, with the step at hand
  std::int64_t at_ = 0;
  std::int64_t made_ = 0;
  Step ring_[kRing];

  // Of the step that is made next.
  std::int64_t first_;   // panel of the group behind its group
  std::int64_t unmade_;  // of its group
  std::int64_t panels_;
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
    const Step* step = steps.later(behind);
    return (step == nullptr ? steps.behind(0) : step)->codes + part_ * (kChunkBytes / kPlaces);
  }

  int decoded_;
  int part_ = 0;
  const std::uint8_t* codes_[kDistances][kPlaces] = {};
};

}  // namespace
}  // namespace qwen3_fp8_ascend::cpu
