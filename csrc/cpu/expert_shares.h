// Rows of tokens that go to experts, cut into tasks that threads take: what `grouped_linear` and `block_experts` share.
#pragma once

#include <algorithm>
#include <atomic>
#include <vector>

#include "experts.h"
#include "parallel.h"
#include "prepare.h"
#include "scratch.h"

namespace qwen3_fp8_ascend::cpu {

// Less work than this is done by the caller alone: waking a thread costs a few microseconds.
constexpr std::int64_t kLeastTaskBytesPerThread = 1 << 17;
constexpr std::int64_t kLeastRowNumbersPerThread = 1 << 15;

// What lies between the parts of a layer is bounded by this, whatever the batch; more tokens are taken in several
// passes.
constexpr std::int64_t kMostBytes = 256 << 20;

// Kernels that read tiles of 16 rows take shares in parts of whole tiles.
constexpr std::int64_t kTileRows = 16;

inline std::int64_t size_of(Dtype dtype) { return dtype == Dtype::fp32 ? 4 : 2; }

// The rows of one expert.
struct Share {
  std::int64_t expert;
  std::int64_t first;  // its first row among those of all shares
  std::int64_t rows;
  std::int64_t capacity;  // of its prepared activations
  std::int64_t before;    // capacity of the shares before it
};

struct Task {
  std::int64_t share;
  std::int64_t first;  // row of the share
  std::int64_t rows;
  std::int64_t part;  // of the weight's rows
};

// Activations of all shares, one share behind the other.
struct PreparedShares {
  Prepared all;
  std::int64_t chunks;

  Prepared of(const Share& share) const {
    return {all.values + share.before * chunks * kChunk, all.scales + share.before * chunks, share.capacity, all.terms};
  }
};

// Kept from call to call by the thread that calls: nothing is allocated once it has grown.
struct Plan {
  std::vector<Share> shares;
  std::vector<Task> tasks;
  std::vector<std::int64_t> counts;    // rows of each expert, then where its next row goes
  std::vector<std::int64_t> share_of;  // expert -> its share
  std::vector<std::int64_t> places;    // [token][slot] -> row among those of all shares, or -1
  std::int64_t rows = 0;
  std::int64_t capacity = 0;
};

// Of the thread that calls.
inline thread_local Plan thread_plan;
inline thread_local Scratch prepared_memory;

// Makes shares of `plan.counts`, those with most rows first: they take longest.
void make_shares(Plan& plan, int terms);

// How the kernels are called for all shares of a batch.
struct Manner {
  const Kernels& kernels;
  Dtype dtype;
  Quantization quantization;
  int terms;

  // The most rows of x in a task: whole tiles.
  std::int64_t rows_of_task() const { return kernels.max_rows / terms / kTileRows * kTileRows; }
};

Manner manner_of(Dtype dtype, Quantization quantization);

// Every share's rows, as many at once as tiles take, times every part of the weight's rows.
void make_tasks(Plan& plan, const Manner& manner, std::int64_t parts);

// Calls body(task) for all tasks: whoever is done takes the next one. `bytes` are the codes of a task.
template <class Body>
void share_out(const std::vector<Task>& tasks, std::int64_t bytes, const Body& body) {
  const auto count = static_cast<std::int64_t>(tasks.size());
  const std::int64_t grain = std::max<std::int64_t>(1, kLeastTaskBytesPerThread / std::max<std::int64_t>(1, bytes));
  std::atomic<std::int64_t> next{0};
  parallel(count, grain, [&](std::int64_t, std::int64_t) {
    for (;;) {
      const std::int64_t taken = next.fetch_add(1, std::memory_order_relaxed);
      if (taken >= count) return;
      body(tasks[static_cast<std::size_t>(taken)]);
    }
  });
}

// Ranges of a weight's panels.
struct PanelRanges {
  std::int64_t panel_count;
  std::int64_t panels;  // of a range
  std::int64_t panel_bytes;

  std::int64_t count() const { return ceil_div(panel_count, panels); }
  std::int64_t bytes() const { return panels * panel_bytes; }
  std::int64_t begin(std::int64_t range) const { return range * panels; }
  std::int64_t end(std::int64_t range) const { return std::min(begin(range) + panels, panel_count); }
};

PanelRanges make_ranges(const ExpertWeights& weights, std::int64_t shares);

// Rows of a task times panels [begin, end); y starts with the first of those rows.
void multiply(const Manner& manner, const Weight& weight, const Share& share, const Task& task, const PreparedShares& x,
              const Output& y, std::int64_t begin, std::int64_t end);

PreparedShares grow_prepared(Scratch& memory, const Depth& depth, const Plan& plan, int terms);

inline std::int64_t row_grain(std::int64_t numbers) {
  return std::max<std::int64_t>(1, kLeastRowNumbersPerThread / std::max<std::int64_t>(1, numbers));
}

// Rows of x at a time that keep what lies between within kMostBytes.
inline std::int64_t rows_within_bounds(std::int64_t bytes_per_row) {
  return std::max<std::int64_t>(1, kMostBytes / std::max<std::int64_t>(1, bytes_per_row));
}

inline std::int64_t prepared_row_bytes(const Depth& depth, int terms) {
  return static_cast<std::int64_t>(prepared_bytes(depth, terms));
}

}  // namespace qwen3_fp8_ascend::cpu
