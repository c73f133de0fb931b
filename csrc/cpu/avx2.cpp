// The kernels for AVX2, FMA and F16C: any x86-64 server since 2013.
//
// A few panels are taken together, chunk by chunk: a chunk of activations is widened to fp32 once for all of them, and
// the memory has several places to read from. Few rows multiply a chunk as fp16, which F16C widens while it loads; more
// rows share one that was widened before. The next chunk (with one row: the next quad) is decoded beside the products,
// so that the memory is read all the time and decoding takes what the multiplier leaves.
#include <algorithm>
#include <cstring>

#include "linear_avx2.h"
#include "runs.h"

namespace qwen3_fp8_ascend::cpu {
namespace {

constexpr std::int64_t kMaxRows = 256;
constexpr std::int64_t kMaxRegisterRows = 5;
constexpr std::int64_t kPanelsTogether = 4;  // as many as the gate or the up projection of an expert gives a task

// Processors take a load to depend on a store before it whose address ends in the same 12 bits. While one chunk is read
// another is written at the same place: half of 4096 bytes apart, the store is long done.
struct HalfChunk {
  alignas(64) Decoded<std::uint16_t> weights;
  std::uint8_t apart[2048];
};

struct Scratch {
  alignas(64) float x[kMaxRows][kChunk];  // one chunk of activations as fp32
  alignas(64) float sums[kPanelsTogether][kMaxRows][kPanelRows];
  HalfChunk half[2];  // the chunk that is multiplied, and the next one
  alignas(64) Decoded<float> numbers;
  DecodeMasks masks;
};

// One chunk after the other: that of all panels, then the next one of all panels.
class Walk {
 public:
  Walk(const Weight& weight, std::int64_t first, std::int64_t panels)
      : weight_(weight), first_(first), panels_(panels) {
    enter_chunk();
  }

  bool ended() const { return chunk_ == weight_.depth.chunks; }
  std::int64_t panel() const { return panel_; }  // from `first` on
  std::int64_t chunk() const { return chunk_; }
  std::int64_t quads() const { return quads_; }
  bool has_nan() const { return weight_.panels[first_ + panel_].has_nan != 0; }
  const std::uint8_t* codes() const { return weight_.codes_of(first_ + panel_) + offset_; }
  float scale() const { return weight_.scales_of(first_ + panel_)[block_]; }

  void advance() {
    if (++panel_ < panels_) return;
    panel_ = 0;
    ++chunk_;
    enter_chunk();
  }

 private:
  // Here and not for each panel: these are divisions.
  void enter_chunk() {
    if (ended()) return;
    const Depth& depth = weight_.depth;
    quads_ = (depth.length_of(chunk_) + 3) / 4;
    offset_ = depth.start_of(chunk_) * kPanelRows;
    block_ = depth.block_of(chunk_);
  }

  const Weight& weight_;
  std::int64_t first_;
  std::int64_t panels_;
  std::int64_t panel_ = 0;
  std::int64_t chunk_ = 0;
  std::int64_t quads_ = 0;
  std::int64_t offset_ = 0;
  std::int64_t block_ = 0;
};

void widen_activations(const Activation& x, const Walk& now, float (*out)[kChunk]) {
  for (std::int64_t row = 0; row < x.rows; ++row) {
    load_run(x.values_of(now.chunk(), row), Dtype::bf16, 0, 4 * now.quads(), out[row]);
  }
}

template <class Number>
Operands<Number> operands(const Decoded<Number>& weights, const Walk& now, const Activation& x, Scratch& scratch) {
  return {weights, now.quads(), scratch.x, x.scales_of(now.chunk(), 0), now.scale(), scratch.sums[now.panel()]};
}

// All rows times one chunk, and `work` beside the first of them.
template <class Work>
void multiply_chunk(const Problem& problem, const Walk& now, const Decoded<std::uint16_t>& half, const Work& work,
                    Scratch& scratch) {
  const Activation& x = problem.activation;
  if (problem.path == Path::registers) {
    multiply_tile(operands(half, now, x, scratch), x.rows, work);
    return;
  }
  widen_weights(half, now.quads(), scratch.numbers);
  const auto o = operands(scratch.numbers, now, x, scratch);
  std::int64_t row = multiply_tile(o, x.rows, work);
  while (row < x.rows) row += multiply_tile(o.from_row(row), x.rows - row, Nothing{});
}

void multiply_one(const Problem& problem, Walk now, Scratch& scratch) {
  if (now.ended()) return;
  Walk next = now;
  next.advance();
  for (; !now.ended(); now.advance()) {
    if (now.panel() == 0) widen_activations(problem.activation, now, scratch.x);
    auto& half = scratch.half[0].weights;
    const auto o = operands(half, now, problem.activation, scratch);
    const Prefetch prefetch{next.ended() ? now.codes() : next.codes()};
    if (now.has_nan()) {
      multiply_row<true>(o, now.codes(), half, prefetch);
    } else {
      multiply_row<false>(o, now.codes(), half, prefetch);
    }
    if (!next.ended()) next.advance();
  }
}

void multiply_panels(const Problem& problem, Walk now, Scratch& scratch) {
  if (now.ended()) return;
  decode_chunk(now.codes(), now.quads(), now.has_nan(), scratch.half[0].weights);
  Walk next = now;
  next.advance();
  Walk later = next;
  if (!later.ended()) later.advance();
  for (int current = 0; !now.ended(); current = 1 - current) {
    if (now.panel() == 0) widen_activations(problem.activation, now, scratch.x);
    const auto& half = scratch.half[current].weights;
    auto& out = scratch.half[1 - current].weights;
    // Where nothing comes later, codes that are in the cache.
    const Prefetch prefetch{later.ended() ? now.codes() : later.codes()};
    if (!next.ended() && !next.has_nan() && next.quads() == now.quads()) {
      multiply_chunk(problem, now, half, DecodeNext{next.codes(), out, scratch.masks, prefetch}, scratch);
    } else {
      multiply_chunk(problem, now, half, prefetch, scratch);
      if (!next.ended()) decode_chunk(next.codes(), next.quads(), next.has_nan(), out);
    }
    now.advance();
    if (!next.ended()) next.advance();
    if (!later.ended()) later.advance();
  }
}

void linear(const Problem& problem, std::int64_t begin, std::int64_t end, void* memory) {
  auto& scratch = *static_cast<Scratch*>(memory);
  scratch.masks = DecodeMasks{};
  const Activation& x = problem.activation;
  for (std::int64_t first = begin; first < end; first += kPanelsTogether) {
    const std::int64_t panels = std::min(kPanelsTogether, end - first);
    for (std::int64_t p = 0; p < panels; ++p) {
      std::memset(scratch.sums[p], 0, static_cast<std::size_t>(x.rows) * sizeof scratch.sums[p][0]);
    }
    const Walk start(problem.weight, first, panels);
    if (x.rows == 1) {
      multiply_one(problem, start, scratch);
    } else {
      multiply_panels(problem, start, scratch);
    }
    for (std::int64_t p = 0; p < panels; ++p) {
      store_panel(problem, first + p, scratch.sums[p][0], kPanelRows, 0, x.rows);
    }
  }
}

}  // namespace

constexpr Kernels kAvx2Kernels = [] {
  Kernels kernels = run_kernels();
  kernels.linear = linear;
  kernels.scratch_bytes = sizeof(Scratch);
  kernels.max_rows = kMaxRows;
  kernels.register_rows = kMaxRegisterRows;
  kernels.paths_agree = true;
  kernels.multiply_add = multiply_add;
  return kernels;
}();

}  // namespace qwen3_fp8_ascend::cpu
