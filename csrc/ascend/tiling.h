// What host and device agree on: block sizes, layouts in global memory, and the numbers that describe one launch.
// Plain structs of 32-bit words, passed to the kernels by value; plan.h computes them on the host.
#pragma once

#include <cstdint>

namespace qwen3_fp8_ascend {

constexpr uint32_t kBlock = 128;             // rows and columns that share a scale; also the tile of the cube
constexpr uint32_t kUnit = kBlock * kBlock;  // weights of one block: the unit of work
constexpr uint32_t kLanes = kUnit / 2;       // 16-bit lanes of a packed block, two weights each
constexpr uint32_t kFractal = 16;            // rows and columns of a cube fractal of 16-bit elements
constexpr uint32_t kBroadcast = 8;           // floats of a 32-byte DataBlock; scales are stored that often
constexpr uint32_t kStageUnits = 4;          // blocks decoded, multiplied and scaled between two cross-core flags
constexpr uint32_t kStageLag = 4;            // stages that vector cores decode ahead of the products they collect
constexpr uint32_t kStageSlots = kStageLag + 1;
constexpr uint32_t kChunk = 2048;  // activations that the vector core works on at once
constexpr uint32_t kChunkGroups = kChunk / kBlock;
constexpr uint32_t kVectorCores = 2;         // vector cores beside one cube core, in a mixed kernel
constexpr uint32_t kMaxRows = 64;            // rows of x in a pass over a weight: see docs/ascendc.md, "hand-over"
constexpr uint32_t kMaxGroupedRows = 4096;   // rows of x in a launch of block_grouped_linear: bounds its workspace
constexpr uint32_t kMaxColumns = 65408;      // k, padded: the row stride of an ND matrix is a 16-bit field
constexpr uint32_t kMaxGemvColumns = 16384;  // k that block_gemv keeps on chip

// Codes decode to their value times 2^-8 (an fp16 with e4m3's bits in place); packed scales carry 2^8.
constexpr float kDecodeBias = 256.0f;

enum Dtype : uint32_t { kFloat16 = 0, kBfloat16 = 1, kFloat32 = 2 };
constexpr uint32_t kNoBias = 3;                                             // in the place of a bias's Dtype
enum Activation : uint32_t { kDynamic = 0, kNone = 1, kDynamicUe8m0 = 2 };  // w8a8, w8a16, w8a8-ue8m0

// Where a tile of 128 packed rows goes: `rows` columns of the output from `start` on. 32 bytes, one DataBlock.
// shrink and grow, the same in every tile, are for the host: powers of two that normalise the weight for many rows.
struct TileSpan {
  uint32_t start, rows;
  float shrink, grow;
  uint32_t reserved[4];
};

struct QuantizeTiling {
  uint32_t rows, columns, groups, activation, dtype;
};

struct DequantizeTiling {
  uint32_t n, k, tiles, k_blocks, dtype;
};

// Units (blocks of weights) are numbered tile by tile and dealt out to the cores in equal consecutive ranges, so a
// tile may be computed by several cores; each leaves a partial result, and the parts are added in a fixed order.
struct LinearTiling {
  uint32_t m, n, k, tiles, k_blocks;
  uint32_t rows_padded;   // of the prepared activations: whole fractals from any row on (block_gemv: 1)
  uint32_t pass_rows;     // most rows of x that a block of weights is multiplied with at once
  uint32_t groups;        // weights of that shape; block_grouped_linear alone has several
  uint32_t parts;         // most cores that share a tile; block_grouped_linear shares none
  uint32_t cores;         // that hold a range: AI cores, or vector cores (block_gemv)
  uint32_t vector_cores;  // launched, for the phases that are dealt out to all of them
  uint32_t activation, dtype;
  uint32_t bias_dtype;  // dtype, kFloat32 or kNoBias
  // Offsets into the workspace, in bytes.
  uint64_t activations, scales, weights, partials, results;
};

}  // namespace qwen3_fp8_ascend
