// How the units of a linear are dealt out to cores. The same arithmetic on host and device.
#pragma once

#include "../tiling.h"

#ifndef __aicore__
#define __aicore__
#endif

namespace qwen3_fp8_ascend {

__aicore__ inline uint64_t first_unit(const LinearTiling& t, uint32_t core) {
  return static_cast<uint64_t>(t.tiles) * t.k_blocks * core / t.cores;
}

__aicore__ inline uint32_t owner(const LinearTiling& t, uint64_t unit) {
  return static_cast<uint32_t>(((unit + 1) * t.cores - 1) / (static_cast<uint64_t>(t.tiles) * t.k_blocks));
}

// Number of cores that share a tile, and the place of one of them among these.
__aicore__ inline uint32_t parts_of(const LinearTiling& t, uint32_t tile) {
  const uint64_t begin = static_cast<uint64_t>(tile) * t.k_blocks;
  return owner(t, begin + t.k_blocks - 1) - owner(t, begin) + 1;
}

__aicore__ inline uint32_t part_of(const LinearTiling& t, uint32_t tile, uint32_t core) {
  return core - owner(t, static_cast<uint64_t>(tile) * t.k_blocks);
}

// Up to `limit` consecutive units of one tile, and the rows of x that they are multiplied with.
struct Stage {
  uint32_t tile, k_block, units;
  bool opens, closes;  // first or last of this core's share of the tile
  uint32_t weights;    // the tile's place among all packed ones
  uint32_t row, rows;
};

// Walks a range of units stage by stage.
class StageWalk {
 public:
  __aicore__ inline StageWalk(uint32_t k_blocks, uint64_t begin, uint64_t end, uint32_t limit, uint32_t rows)
      : k_blocks_(k_blocks), limit_(limit), unit_(begin), end_(end), rows_(rows), opens_(true) {}
  // The range of a core.
  __aicore__ inline StageWalk(const LinearTiling& t, uint32_t core, uint32_t limit)
      : StageWalk(t.k_blocks, first_unit(t, core), first_unit(t, core + 1), limit, t.m) {}

  __aicore__ inline bool done() const { return unit_ >= end_; }

  __aicore__ inline Stage next() {
    Stage stage;
    stage.tile = static_cast<uint32_t>(unit_ / k_blocks_);
    stage.k_block = static_cast<uint32_t>(unit_ % k_blocks_);
    const uint64_t rest = end_ - unit_;
    uint32_t units = k_blocks_ - stage.k_block;
    units = units < limit_ ? units : limit_;
    stage.units = rest < units ? static_cast<uint32_t>(rest) : units;
    stage.opens = opens_;
    unit_ += stage.units;
    stage.closes = unit_ == end_ || unit_ % k_blocks_ == 0;
    opens_ = stage.closes;
    stage.weights = stage.tile;
    stage.row = 0;
    stage.rows = rows_;
    return stage;
  }

 private:
  uint64_t k_blocks_, limit_, unit_, end_;
  uint32_t rows_;
  bool opens_;
};

}  // namespace qwen3_fp8_ascend
