// Whose rows are whose: the list of the groups' ends, which is on the device and is read there by every core.
//
// ends (groups) int64: rows [ends[g - 1], ends[g]) of x are group g's. A pass is up to kMaxRows rows of one group; a
// group without rows has none. Nothing about the passes is known when the kernel is launched.
#pragma once

#include "kernel_operator.h"
#include "work.h"

namespace qwen3_fp8_ascend {

struct Pass {
  uint32_t group, row, rows;
};

// The passes from first to last.
class PassWalk {
 public:
  __aicore__ inline PassWalk(GM_ADDR ends, const LinearTiling& t) : groups_(t.groups), m_(t.m) {
    ends_.SetGlobalBuffer(reinterpret_cast<__gm__ int64_t*>(ends), t.groups);
  }

  __aicore__ inline bool next(Pass& pass) {
    while (row_ == end_) {
      if (group_ == groups_) {
        return false;
      }
      end_ = end_of(group_);
      ++group_;
    }
    pass.group = group_ - 1;
    pass.row = row_;
    pass.rows = end_ - row_ < kMaxRows ? end_ - row_ : kMaxRows;
    row_ += pass.rows;
    return true;
  }

 private:
  // A list that decreases, or leaves x, is the caller's fault, but must not leave x's memory.
  __aicore__ inline uint32_t end_of(uint32_t group) const {
    const int64_t end = ends_.GetValue(group), begin = static_cast<int64_t>(row_), last = static_cast<int64_t>(m_);
    return static_cast<uint32_t>(end < begin ? begin : end > last ? last : end);
  }

  AscendC::GlobalTensor<int64_t> ends_;
  uint32_t groups_, m_;
  uint32_t group_ = 0, row_ = 0, end_ = 0;
};

struct Survey {
  uint32_t passes, most_rows;
};

__aicore__ inline Survey survey(PassWalk walk) {
  Survey seen = {0, 0};
  for (Pass pass; walk.next(pass);) {
    ++seen.passes;
    seen.most_rows = pass.rows > seen.most_rows ? pass.rows : seen.most_rows;
  }
  return seen;
}

// Walks a core's range stage by stage. Tiles are numbered pass by pass and dealt out whole, in consecutive ranges that
// differ by one at most: so a row's sums are added in one order, whatever other rows there are.
class GroupedWalk {
 public:
  __aicore__ inline GroupedWalk(const PassWalk& passes, uint32_t count, const LinearTiling& t, uint32_t core,
                                uint32_t limit)
      : passes_(passes),
        stages_(t.k_blocks, first_tile(count, t, core) * t.k_blocks, first_tile(count, t, core + 1) * t.k_blocks, limit,
                0),
        tiles_(t.tiles) {}

  __aicore__ inline bool done() const { return stages_.done(); }

  __aicore__ inline Stage next() {
    Stage stage = stages_.next();
    for (const uint32_t pass = stage.tile / tiles_; seen_ <= pass; ++seen_) {
      passes_.next(pass_);
    }
    stage.tile %= tiles_;
    stage.weights = pass_.group * tiles_ + stage.tile;
    stage.row = pass_.row;
    stage.rows = pass_.rows;
    return stage;
  }

 private:
  __aicore__ static inline uint64_t first_tile(uint32_t passes, const LinearTiling& t, uint32_t core) {
    return static_cast<uint64_t>(passes) * t.tiles * core / t.cores;
  }

  PassWalk passes_;
  StageWalk stages_;
  Pass pass_{};
  uint32_t tiles_, seen_ = 0;
};

}  // namespace qwen3_fp8_ascend
