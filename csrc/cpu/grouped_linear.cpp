#include <cstring>

#include "expert_shares.h"

namespace qwen3_fp8_ascend::cpu {

void grouped_linear(const Rows& x, const ExpertWeights& weights, const std::int64_t* ends, Quantization quantization,
                    void* y, std::int64_t n) {
  if (n == 0 || x.rows == 0) return;
  const Manner manner = manner_of(x.dtype, quantization);
  const std::int64_t row_bytes = n * size_of(x.dtype);
  const std::int64_t last = weights.experts == 0 ? 0 : ends[weights.experts - 1];
  std::memset(static_cast<char*>(y) + last * row_bytes, 0, static_cast<std::size_t>((x.rows - last) * row_bytes));
  Plan& plan = thread_plan;
  const std::int64_t at_once = rows_within_bounds(prepared_row_bytes(weights.depth, manner.terms));
  for (std::int64_t begin = 0; begin < last; begin += at_once) {
    const std::int64_t end = std::min(begin + at_once, last);
    plan.counts.assign(static_cast<std::size_t>(weights.experts), 0);
    plan.places.assign(static_cast<std::size_t>(weights.experts), 0);  // each expert's first row in x
    std::int64_t start = 0;
    for (std::int64_t expert = 0; expert < weights.experts; ++expert) {
      plan.places[expert] = std::clamp(start, begin, end);
      plan.counts[expert] = std::clamp(ends[expert], begin, end) - plan.places[expert];
      start = ends[expert];
    }
    make_shares(plan, manner.terms);
    const PreparedShares prepared = grow_prepared(prepared_memory, weights.depth, plan, manner.terms);
    parallel(plan.rows, row_grain(weights.depth.k), [&](std::int64_t first_row, std::int64_t end_row) {
      for (const Share& share : plan.shares) {
        const std::int64_t first = std::max(first_row, share.first) - share.first;
        const std::int64_t behind = std::min(end_row, share.first + share.rows) - share.first;
        for (std::int64_t row = first; row < behind; ++row) {
          prepare_row(manner.kernels, x.row(plan.places[share.expert] + row), x.dtype, quantization, weights.depth,
                      prepared.of(share), row);
        }
      }
    });
    const PanelRanges ranges = make_ranges(weights, static_cast<std::int64_t>(plan.shares.size()));
    make_tasks(plan, manner, ranges.count());
    share_out(plan.tasks, ranges.bytes(), [&](const Task& task) {
      const Share& share = plan.shares[task.share];
      char* out = static_cast<char*>(y) + (plan.places[share.expert] + task.first) * row_bytes;
      multiply(manner, weights.of(share.expert), share, task, prepared, {out, nullptr, x.dtype, x.dtype, n},
               ranges.begin(task.part), ranges.end(task.part));
    });
  }
}

}  // namespace qwen3_fp8_ascend::cpu
