#include "expert_shares.h"

#include "isa.h"

namespace qwen3_fp8_ascend::cpu {
namespace {

// Codes of a task of the down projection: enough that taking it costs nothing beside it, and fewer where there are so
// few tasks that threads would wait for the last ones.
constexpr std::int64_t kTaskBytes = 1 << 18;
constexpr std::int64_t kLeastTasksPerThread = 8;
constexpr std::int64_t kPanelsAtOnce = 2;  // the most that a kernel takes at a time

thread_local Scratch kernel_memory;

}  // namespace

void make_shares(Plan& plan, int terms) {
  const auto experts = static_cast<std::int64_t>(plan.counts.size());
  plan.shares.clear();
  plan.share_of.assign(plan.counts.size(), -1);
  for (std::int64_t expert = 0; expert < experts; ++expert) {
    if (plan.counts[expert] > 0) plan.shares.push_back({expert, 0, plan.counts[expert], 0, 0});
  }
  std::stable_sort(plan.shares.begin(), plan.shares.end(),
                   [](const Share& a, const Share& b) { return a.rows > b.rows; });
  plan.rows = plan.capacity = 0;
  for (std::size_t i = 0; i < plan.shares.size(); ++i) {
    Share& share = plan.shares[i];
    share.first = plan.rows;
    share.before = plan.capacity;
    share.capacity = capacity_of(share.rows * terms);
    plan.rows += share.rows;
    plan.capacity += share.capacity;
    plan.share_of[share.expert] = static_cast<std::int64_t>(i);
  }
}

Manner manner_of(Dtype dtype, Quantization quantization) {
  return {kernels_of(current_isa()), dtype, quantization, terms_of(dtype, quantization)};
}

void make_tasks(Plan& plan, const Manner& manner, std::int64_t parts) {
  plan.tasks.clear();
  for (std::size_t i = 0; i < plan.shares.size(); ++i) {
    const Share& share = plan.shares[i];
    const std::int64_t at_once = manner.rows_of_task();
    for (std::int64_t first = 0; first < share.rows; first += at_once) {
      const std::int64_t rows = std::min(at_once, share.rows - first);
      for (std::int64_t part = 0; part < parts; ++part) {
        plan.tasks.push_back({static_cast<std::int64_t>(i), first, rows, part});
      }
    }
  }
}

PanelRanges make_ranges(const ExpertWeights& weights, std::int64_t shares) {
  const std::int64_t panel_bytes = std::max<std::int64_t>(1, weights.depth.padded() * kPanelRows);
  const std::int64_t threads = thread_count();
  const std::int64_t evenly = weights.panel_count * shares / (kLeastTasksPerThread * threads);
  const std::int64_t panels = std::min(kTaskBytes / panel_bytes, evenly);
  const std::int64_t pairs = std::max<std::int64_t>(1, panels / kPanelsAtOnce);
  return {weights.panel_count, pairs * kPanelsAtOnce, panel_bytes};
}

void multiply(const Manner& manner, const Weight& weight, const Share& share, const Task& task, const PreparedShares& x,
              const Output& y, std::int64_t begin, std::int64_t end) {
  const Problem problem{weight, x.of(share).activation(task.first, task.rows), y};
  manner.kernels.linear(problem, begin, end, kernel_memory.grow(manner.kernels.scratch_bytes));
}

PreparedShares grow_prepared(Scratch& memory, const Depth& depth, const Plan& plan, int terms) {
  void* bytes = memory.grow(prepared_bytes(depth, plan.capacity));
  return {prepared_at(bytes, depth, plan.capacity, terms), depth.chunks};
}

}  // namespace qwen3_fp8_ascend::cpu
