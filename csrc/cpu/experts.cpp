#include "experts.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstring>

#include "checks.h"
#include "isa.h"
#include "parallel.h"
#include "prepare.h"
#include "scratch.h"

namespace qwen3_fp8_ascend::cpu {
namespace {

// Less work than this is done by the caller alone: waking a thread costs a few microseconds.
constexpr std::int64_t kLeastTaskBytesPerThread = 1 << 17;
constexpr std::int64_t kLeastRowNumbersPerThread = 1 << 15;

// Codes of a task of the down projection: enough that taking it costs nothing beside it, and fewer where there are so
// few tasks that threads would wait for the last ones.
constexpr std::int64_t kTaskBytes = 1 << 18;
constexpr std::int64_t kLeastTasksPerThread = 8;
constexpr std::int64_t kPanelsAtOnce = 2;  // the most that a kernel takes at a time

// What lies between the parts of a layer is bounded by this, whatever the batch; more tokens are taken in several
// passes.
constexpr std::int64_t kMostBytes = 256 << 20;

// Kernels that read tiles of 16 rows take shares in parts of whole tiles.
constexpr std::int64_t kTileRows = 16;

std::int64_t size_of(Dtype dtype) { return dtype == Dtype::fp32 ? 4 : 2; }

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

thread_local Plan thread_plan;
thread_local Scratch prepared_memory;
thread_local Scratch activated_memory;
thread_local Scratch result_memory;
thread_local Scratch kernel_memory;
thread_local Scratch task_memory;

// Makes shares of `plan.counts`, those with most rows first: they take longest.
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

// How the kernels are called for all shares of a batch.
struct Manner {
  const Kernels& kernels;
  Dtype dtype;
  Quantization quantization;
  int terms;
  Path batch_path;  // of all shares, where paths do not agree

  // Few rows of x are decoded in registers, more in tiles. Where that changes a row's bits, all shares of a batch take
  // one path, by the size of the batch alone: else a row's bits would depend on where the others are routed.
  Path path_of(const Share& share) const {
    if (!kernels.paths_agree) return batch_path;
    return share.rows * terms <= kernels.register_rows ? Path::registers : Path::tiles;
  }

  // The most rows of x that a kernel takes at once.
  std::int64_t rows_at_once(Path path) const {
    return path == Path::registers ? kernels.register_rows / terms : rows_of_task();
  }

  std::int64_t rows_of_task() const { return kernels.max_rows / terms / kTileRows * kTileRows; }
};

Manner manner_of(Dtype dtype, Quantization quantization, std::int64_t rows, std::int64_t experts) {
  const Kernels& kernels = kernels_of(current_isa());
  const int terms = terms_of(dtype, quantization);
  const bool few = terms <= kernels.register_rows && ceil_div(rows, experts) * terms <= kernels.register_rows;
  return {kernels, dtype, quantization, terms, few ? Path::registers : Path::tiles};
}

// Every share's rows, as many at once as tiles take, times every part of the weight's rows.
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

PanelRanges make_ranges(const ExpertWeights& weights, std::int64_t shares) {
  const std::int64_t panel_bytes = std::max<std::int64_t>(1, weights.depth.padded() * kPanelRows);
  const std::int64_t threads = torch::stable::get_num_threads();
  const std::int64_t evenly = weights.panel_count * shares / (kLeastTasksPerThread * threads);
  const std::int64_t panels = std::min(kTaskBytes / panel_bytes, evenly);
  const std::int64_t pairs = std::max<std::int64_t>(1, panels / kPanelsAtOnce);
  return {weights.panel_count, pairs * kPanelsAtOnce, panel_bytes};
}

// Rows of a task times panels [begin, end); y starts with the first of those rows.
void multiply(const Manner& manner, const Weight& weight, const Share& share, const Task& task, const PreparedShares& x,
              const Output& y, std::int64_t begin, std::int64_t end) {
  const Path path = manner.path_of(share);
  const std::int64_t at_once = manner.rows_at_once(path);
  const Prepared prepared = x.of(share);
  void* scratch = kernel_memory.grow(manner.kernels.scratch_bytes);
  // Rows beyond what registers hold take the same panels again, from the cache.
  const std::int64_t panels = task.rows <= at_once ? std::max<std::int64_t>(1, end - begin) : kPanelsAtOnce;
  for (std::int64_t panel = begin; panel < end; panel += panels) {
    for (std::int64_t row = 0; row < task.rows; row += at_once) {
      Output part = y;
      part.y = static_cast<char*>(y.y) + row * y.n * size_of(y.dtype);
      const std::int64_t rows = std::min(at_once, task.rows - row);
      const Problem problem{weight, prepared.activation(task.first + row, rows), part, path};
      manner.kernels.linear(problem, panel, std::min(panel + panels, end), scratch);
    }
  }
}

PreparedShares grow_prepared(Scratch& memory, const Depth& depth, const Plan& plan, int terms) {
  void* bytes = memory.grow(prepared_bytes(depth, plan.capacity));
  return {prepared_at(bytes, depth, plan.capacity, terms), depth.chunks};
}

std::int64_t row_grain(std::int64_t numbers) {
  return std::max<std::int64_t>(1, kLeastRowNumbersPerThread / std::max<std::int64_t>(1, numbers));
}

// Rows of x at a time that keep what lies between within kMostBytes.
std::int64_t rows_within_bounds(std::int64_t bytes_per_row) {
  return std::max<std::int64_t>(1, kMostBytes / std::max<std::int64_t>(1, bytes_per_row));
}

std::int64_t prepared_row_bytes(const Depth& depth, int terms) {
  return static_cast<std::int64_t>(prepared_bytes(depth, terms));
}

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
void activate(const Manner& manner, const ExpertWeights& w13, const Depth& down, const Segment& segment,
              std::int64_t intermediate, const Share& share, const Task& task, const PreparedShares& x,
              const PreparedShares& out) {
  const std::int64_t row_bytes = segment.rows * size_of(manner.dtype);
  char* gate = static_cast<char*>(task_memory.grow(static_cast<std::size_t>((2 * task.rows + 1) * row_bytes)));
  char* up = gate + task.rows * row_bytes;
  char* product = up + task.rows * row_bytes;
  const Weight weight = w13.of(share.expert);
  Output output{gate, nullptr, manner.dtype, manner.dtype, segment.rows, segment.first_row};
  multiply(manner, weight, share, task, x, output, segment.gate_begin, segment.gate_end);
  output.y = up;
  output.first_row += intermediate;
  const std::int64_t panels = segment.gate_end - segment.gate_begin;
  multiply(manner, weight, share, task, x, output, segment.up_begin, segment.up_begin + panels);
  const Prepared activations = out.of(share);
  for (std::int64_t row = 0; row < task.rows; ++row) {
    manner.kernels.silu_product(gate + row * row_bytes, up + row * row_bytes, manner.dtype, segment.rows, product);
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

void grouped_linear(const Rows& x, const ExpertWeights& weights, const std::int64_t* ends, Quantization quantization,
                    void* y, std::int64_t n) {
  if (n == 0 || x.rows == 0) return;
  const Manner manner = manner_of(x.dtype, quantization, x.rows, std::max<std::int64_t>(1, weights.experts));
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

void silu_products(const Rows& h, std::int64_t half, void* out) {
  if (half == 0) return;
  const Kernels& kernels = kernels_of(current_isa());
  parallel(h.rows, row_grain(half), [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) {
      const void* gate = h.row(row);
      char* product = static_cast<char*>(out) + row * half * size_of(h.dtype);
      kernels.silu_product(gate, at(gate, h.dtype, half), h.dtype, half, product);
    }
  });
}

void block_experts(const Rows& x, const ExpertWeights& w13, const ExpertWeights& w2,
                   const std::vector<Segment>& segments, const Routing& routing, Quantization quantization, void* out,
                   std::int64_t n) {
  if (n == 0 || x.rows == 0) return;
  const std::int64_t top_k = routing.top_k;
  const std::int64_t experts = w13.experts;
  const std::int64_t intermediate = w2.depth.k;
  const Manner manner = manner_of(x.dtype, quantization, x.rows * top_k, std::max<std::int64_t>(1, experts));
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
      activate(manner, w13, w2.depth, segments[task.part], intermediate, plan.shares[task.share], task, prepared,
               activated);
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
