// Linears of many experts, and a layer of experts, over torch's threads.
//
// A token's row is computed once for each expert that it is routed to. The rows of one expert are a share of the work;
// shares are cut into tasks by weight rows, which threads take from a common counter, those of the largest shares
// first. No sum is cut, so that a result's bits depend on no number of threads.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.h"
#include "linear.h"

namespace qwen3_fp8_ascend::cpu {

// The weights of all experts, which have one shape and one grid of panels.
struct ExpertWeights {
  const std::uint8_t* codes;  // [experts][panel_count][depth.padded()][kPanelRows]
  const float* scales;        // [experts][scale_rows][depth.blocks]
  const Panel* panels;        // [experts][panel_count]
  std::int64_t experts;
  std::int64_t panel_count;
  std::int64_t scale_rows;
  Depth depth;

  Weight of(std::int64_t expert) const {
    return {codes + expert * panel_count * depth.padded() * kPanelRows, scales + expert * scale_rows * depth.blocks,
            panels + expert * panel_count, panel_count, depth};
  }
};

// Panels [gate_begin, gate_end) and those of the same rows of the up projection, from up_begin on. They make whole
// groups of the activations that the down projection takes: blocks [block_begin, block_end) of its depth.
struct Segment {
  std::int64_t gate_begin;
  std::int64_t gate_end;
  std::int64_t up_begin;
  std::int64_t block_begin;
  std::int64_t block_end;
  std::int64_t first_row;  // of the gate projection
  std::int64_t rows;
};

// Cuts the panels of w13, `intermediate` rows of gate and as many of up, into segments as small as they can be. Throws
// if gate and up are not cut alike.
std::vector<Segment> make_segments(const Panel* panels, std::int64_t panel_count, std::int64_t intermediate,
                                   std::int64_t block_k);

// Which experts each token goes to, with which weight. An expert of -1 is none.
struct Routing {
  const float* weights;         // [tokens][top_k]
  const std::int32_t* experts;  // [tokens][top_k], each at least -1 and below the number of experts
  std::int64_t top_k;
};

// y (x.rows, n) of x.dtype: rows [ends[e - 1], ends[e]) of x times the weight of expert e; rows behind the last end
// zero.
void grouped_linear(const Rows& x, const ExpertWeights& weights, const std::int64_t* ends, Quantization quantization,
                    void* y, std::int64_t n);

// out (h.rows, half) of h.dtype: glu of the first `half` columns of h and the second, rounded as in a layer.
void glu_products(const Rows& h, std::int64_t half, const Glu& glu, void* out);

// out (x.rows, n) of x.dtype: the sum over a token's experts, in their order, of w2(glu(gate, up)) times their
// weight.
void block_experts(const Rows& x, const ExpertWeights& w13, const ExpertWeights& w2,
                   const std::vector<Segment>& segments, const Routing& routing, Quantization quantization,
                   const Glu& glu, void* out, std::int64_t n);

}  // namespace qwen3_fp8_ascend::cpu
