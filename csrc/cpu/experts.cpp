#include "experts.h"

#include <cstring>

#include "expert_shares.h"
#include "isa.h"
#include "require.h"

namespace qwen3_fp8_ascend::cpu {
namespace {

thread_local Scratch activated_memory;
thread_local Scratch result_memory;
thread_local Scratch task_memory;

// Where each token's rows go: those of one expert together, in the order of tokens.
void place_tokens(Plan& plan, const Routing& routing, std::int64_t tokens, std::int64_t experts, int terms) {
  const std::int64_t slots = tokens * routing.top_k;
  plan.counts.assign(static_cast<std::size_t>(experts), 0);
  for (std::int64_t i = 0; i < slots; ++i) {
    if (routing.experts[i] >= 0) ++plan.counts[static_cast<std::size_t>(routing.experts[i])];
  }
  make_shares(plan, terms);
  for (const Share& share : plan.shares) plan.counts[static_cast<std::size_t>(share.expert)] = share.first;
  plan.places.resize(static_cast<std::size_t>(slots));
  for (std::int64_t i = 0; i < slots; ++i) {
    const std::int32_t expert = routing.experts[i];
    plan.places[static_cast<std::size_t>(i)] = expert < 0 ? -1 : plan.counts[static_cast<std::size_t>(expert)]++;
  }
}

void copy_row(const PreparedShares& x, const Share& from, std::int64_t from_row, const Share& to, std::int64_t to_row) {
  const Prepared source = x.of(from);
  const Prepared target = x.of(to);
  const std::int64_t terms = source.terms;
  for (std::int64_t chunk = 0; chunk < x.chunks; ++chunk) {
    const std::int64_t source_at = chunk * source.capacity + from_row * terms;
    const std::int64_t target_at = chunk * target.capacity + to_row * terms;
    std::memcpy(target.values + target_at * kChunk, source.values + source_at * kChunk,
                static_cast<std::size_t>(terms * kChunk) * sizeof *source.values);
    std::memcpy(target.scales + target_at, source.scales + source_at,
                static_cast<std::size_t>(terms) * sizeof *source.scales);
  }
}

// Prepares each token once, and puts it where each of its experts wants it.
void prepare_tokens(const Manner& manner, const Rows& x, const Depth& depth, const Plan& plan, const Routing& routing,
                    const PreparedShares& out) {
  const std::int64_t top_k = routing.top_k;
  parallel(x.rows, row_grain(depth.k), [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t token = begin; token < end; ++token) {
      const Share* first = nullptr;
      std::int64_t first_row = 0;
      for (std::int64_t i = token * top_k; i < (token + 1) * top_k; ++i) {
        if (plan.places[i] < 0) continue;
        const Share& share = plan.shares[plan.share_of[routing.experts[i]]];
        const std::int64_t row = plan.places[i] - share.first;
        if (first == nullptr) {
          prepare_row(manner.kernels, x.row(token), x.dtype, manner.quantization, depth, out.of(share), row);
          first = &share;
          first_row = row;
        } else {
          copy_row(out, *first, first_row, share, row);
        }
      }
    }
  });
}

// One task of the gate and up projections: their products, rounded, become activations of the down projection.
void activate(const Manner& manner, const ExpertWeights& w13, const Depth& down, const Segment& segment, const Glu& glu,
              const Share& share, const Task& task, const PreparedShares& x, const PreparedShares& out) {
  const std::int64_t row_bytes = segment.rows * size_of(manner.dtype);
  char* gate = static_cast<char*>(task_memory.grow(static_cast<std::size_t>((2 * task.rows + 1) * row_bytes)));
  char* up = gate + task.rows * row_bytes;
  char* product = up + task.rows * row_bytes;
  const Weight weight = w13.of(share.expert);
  Output output{gate, nullptr, manner.dtype, manner.dtype, segment.rows, segment.first_row};
  multiply(manner, weight, share, task, x, output, segment.gate_begin, segment.gate_end);
  output.y = up;
  output.first_row += down.k;
  const std::int64_t panels = segment.gate_end - segment.gate_begin;
  multiply(manner, weight, share, task, x, output, segment.up_begin, segment.up_begin + panels);
  const Prepared activations = out.of(share);
  for (std::int64_t row = 0; row < task.rows; ++row) {
    manner.kernels.glu_product(gate + row * row_bytes, up + row * row_bytes, glu, manner.dtype, segment.rows, product);
    for (std::int64_t block = segment.block_begin; block < segment.block_end; ++block) {
      const void* group = at(product, manner.dtype, (block - segment.block_begin) * down.block_k);
      prepare_block(manner.kernels, group, manner.dtype, manner.quantization, down, block, activations,
                    task.first + row);
    }
  }
}

// Each token's weighted sum over its experts' rows of y, in the order of its slots.
void sum_rows(const Manner& manner, const Plan& plan, const Routing& routing, std::int64_t tokens, const float* y,
              std::int64_t n, char* out) {
  const std::int64_t top_k = routing.top_k;
  parallel(tokens, row_grain(top_k * n), [&](std::int64_t begin, std::int64_t end) {
    const auto size = static_cast<std::size_t>(top_k) * (sizeof(const float*) + sizeof(float));
    auto* rows = static_cast<const float**>(task_memory.grow(size));
    auto* weights = reinterpret_cast<float*>(rows + top_k);
    for (std::int64_t token = begin; token < end; ++token) {
      std::int64_t count = 0;
      for (std::int64_t i = token * top_k; i < (token + 1) * top_k; ++i) {
        if (plan.places[i] < 0) continue;
        rows[count] = y + plan.places[i] * n;
        weights[count++] = routing.weights[i];
      }
      manner.kernels.weighted_sum(rows, weights, count, n, manner.dtype, out + token * n * size_of(manner.dtype));
    }
  });
}

}  // namespace

std::vector<Segment> make_segments(const Panel* panels, std::int64_t panel_count, std::int64_t intermediate,
                                   std::int64_t block_k) {
  const std::int64_t half = panel_count / 2;
  require(panel_count % 2 == 0, "w13 must have as many panels of gate as of up, got ", panel_count, " in all");
  std::vector<Segment> segments;
  for (std::int64_t p = 0; p < half; ++p) {
    const Panel& gate = panels[p];
    const Panel& up = panels[half + p];
    require(gate.first_row < intermediate && up.first_row == gate.first_row + intermediate && up.rows == gate.rows,
            "gate and up must be cut into panels alike, but panel ", p, " of gate starts at row ", gate.first_row,
            " and of up at ", up.first_row, ", of ", intermediate, " rows each");
    // A panel that starts within a group belongs to the segment before it.
    if (gate.first_row % block_k == 0) {
      segments.push_back({p, p, half + p, gate.first_row / block_k, 0, gate.first_row, 0});
    }
    Segment& segment = segments.back();
    segment.gate_end = p + 1;
    segment.rows += gate.rows;
    segment.block_end = ceil_div(segment.first_row + segment.rows, block_k);
  }
  return segments;
}

void glu_products(const Rows& h, std::int64_t half, const Glu& glu, void* out) {
  if (half == 0) return;
  const Kernels& kernels = kernels_of(current_isa());
  parallel(h.rows, row_grain(half), [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) {
      const void* gate = h.row(row);
      char* product = static_cast<char*>(out) + row * half * size_of(h.dtype);
      kernels.glu_product(gate, at(gate, h.dtype, half), glu, h.dtype, half, product);
    }
  });
}

void block_experts(const Rows& x, const ExpertWeights& w13, const ExpertWeights& w2,
                   const std::vector<Segment>& segments, const Routing& routing, Quantization quantization,
                   const Glu& glu, void* out, std::int64_t n) {
  if (n == 0 || x.rows == 0) return;
  const std::int64_t top_k = routing.top_k;
  const std::int64_t experts = w13.experts;
  const Manner manner = manner_of(x.dtype, quantization);
  const std::int64_t slot_bytes = prepared_row_bytes(w13.depth, manner.terms) +
                                  prepared_row_bytes(w2.depth, manner.terms) +
                                  n * static_cast<std::int64_t>(sizeof(float));
  const std::int64_t at_once = rows_within_bounds(top_k * slot_bytes);
  Plan& plan = thread_plan;
  for (std::int64_t begin = 0; begin < x.rows; begin += at_once) {
    Rows tokens = x;
    tokens.data = x.row(begin);
    tokens.rows = std::min(at_once, x.rows - begin);
    const Routing part{routing.weights + begin * top_k, routing.experts + begin * top_k, top_k};
    place_tokens(plan, part, tokens.rows, experts, manner.terms);

    const PreparedShares prepared = grow_prepared(prepared_memory, w13.depth, plan, manner.terms);
    prepare_tokens(manner, tokens, w13.depth, plan, part, prepared);

    const PreparedShares activated = grow_prepared(activated_memory, w2.depth, plan, manner.terms);
    make_tasks(plan, manner, static_cast<std::int64_t>(segments.size()));
    const std::int64_t panels = segments.empty() ? 0 : 2 * (segments[0].gate_end - segments[0].gate_begin);
    share_out(plan.tasks, panels * w13.depth.padded() * kPanelRows, [&](const Task& task) {
      activate(manner, w13, w2.depth, segments[task.part], glu, plan.shares[task.share], task, prepared, activated);
    });

    const auto y_bytes = static_cast<std::size_t>(plan.rows * n) * sizeof(float);
    auto* y = static_cast<float*>(result_memory.grow(y_bytes));
    const PanelRanges ranges = make_ranges(w2, static_cast<std::int64_t>(plan.shares.size()));
    make_tasks(plan, manner, ranges.count());
    share_out(plan.tasks, ranges.bytes(), [&](const Task& task) {
      const Share& share = plan.shares[task.share];
      float* out_rows = y + (share.first + task.first) * n;
      multiply(manner, w2.of(share.expert), share, task, activated, {out_rows, nullptr, Dtype::fp32, Dtype::fp32, n},
               ranges.begin(task.part), ranges.end(task.part));
    });

    sum_rows(manner, plan, part, tokens.rows, y, n, static_cast<char*>(out) + begin * n * size_of(x.dtype));
  }
}

}  // namespace qwen3_fp8_ascend::cpu
