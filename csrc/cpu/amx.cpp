// The kernels for AMX-BF16: one or two rows in registers as on AVX-512, more in tiles.
//
// A decoded chunk of a panel is already in the order of two B tiles per 32 k. C tiles hold one chunk's fp32 partial
// sums, which AVX-512 then scales and adds up. The next chunk is decoded in slices between the tile operations of this
// one, so that the decoder's instructions run while the tile unit is busy. On each of the two paths, the bits of an
// output depend neither on the number of rows nor on the number of threads.
#include "linear_avx512.h"

namespace qwen3_fp8_ascend::cpu {
namespace {

constexpr int kTile = 16;       // rows of a tile register; 64 bytes each
constexpr int kTileDepth = 32;  // k of a tile of bf16
constexpr std::int64_t kAmxRows = 512;
constexpr int kFewRows = 2;
constexpr int kPrefetchBytes = 1024;
constexpr int kRegisterPrefetchBytes = 2048;  // for few rows

constexpr DecodeTables kScaledTables = make_decode_tables(ArithmeticDecoder::kExponent);

// A B tile: 32 k (as 16 pairs) of half a panel.
using WeightTile = std::uint16_t[kTile][2 * kHalf];
constexpr int kStepTiles = 2 * kTilePanels;
constexpr int kSteps = kChunk / kTileDepth;

struct AmxScratch {
  alignas(4096) WeightTile weights[2][kSteps][kStepTiles];
  alignas(64) float partial[4][kTile][kTile];
  alignas(64) float sums[kAmxRows][kTileColumns];
};

struct alignas(64) TileConfig {
  std::uint8_t palette = 1;
  std::uint8_t start_row = 0;
  std::uint8_t reserved[14] = {};
  std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Tile registers are configured per thread, and released so that context switches stay cheap.
class TileSession {
 public:
  // `rows` of A and C tiles (0-5); B tiles (6-7) are whole.
  explicit TileSession(std::int64_t rows) {
    TileConfig config;
    for (int tile = 0; tile < 6; ++tile) config.rows[tile] = static_cast<std::uint8_t>(rows);
    _tile_loadconfig(&config);
  }
  ~TileSession() { _tile_release(); }
  TileSession(const TileSession&) = delete;
  TileSession& operator=(const TileSession&) = delete;
};

// Decodes a chunk of one or two panels, a B tile at a time.
//
// A tile load waits for older stores whose address is the same modulo 4 KiB. Whole tiles are therefore written in the
// order in which tiles are read, so that the stores still under way are those of other tiles.
class ChunkDecoder {
 public:
  ChunkDecoder(const Weight& weight, std::int64_t end) : weight_(weight), end_(end) {}

  // Chunk `chunk` of the panel and of the next one, if that is still in range.
  void start(std::int64_t panel, std::int64_t chunk, WeightTile (*out)[kStepTiles]) {
    panels_ = end_ - panel < kTilePanels ? 1 : kTilePanels;
    for (unsigned p = 0; p < panels_; ++p) {
      source_[p] = weight_.codes_of(panel + p) + weight_.depth.start_of(chunk) * kPanelRows;
      has_nan_[p] = weight_.panels[panel + p].has_nan != 0;
    }
    out_ = out;
    quads_ = (weight_.depth.length_of(chunk) + 3) / 4;
    step_ = 0;
    column_ = 0;
    left_ = (quads_ + kQuads - 1) / kQuads * 2 * panels_;
  }

  std::int64_t tiles_left() const { return left_; }

  void advance(std::int64_t count) {
    for (count = count < left_ ? count : left_; count > 0; --count) {
      const unsigned panel = column_ / 2;
      const std::uint8_t* source = source_[panel] + step_ * kQuads * kQuadBytes + column_ % 2 * kQuadBytes / 2;
      const std::int64_t quads = quads_ - step_ * kQuads;
      WeightTile& out = out_[step_][column_];
      if (has_nan_[panel]) {
        decode_tile(TableDecoder(kScaledTables), source, quads < kQuads ? quads : kQuads, out);
      } else if (quads < kQuads) {
        decode_tile(arithmetic_, source, quads, out);
      } else {
        decode_tile(arithmetic_, source, kQuads, out);
      }
      --left_;
      if (++column_ == 2 * panels_) {
        column_ = 0;
        ++step_;
      }
    }
  }

  void finish() { advance(left_); }

 private:
  static constexpr std::int64_t kQuads = kTileDepth / 4;

  // What is behind the last quad becomes zero, since the tile reaches further and 0 * NaN is NaN.
  template <class Decoder>
  static void decode_tile(const Decoder& decode, const std::uint8_t* source, std::int64_t quads, WeightTile& out) {
    for (std::int64_t quad = 0; quad < quads; ++quad) {
      _mm_prefetch(reinterpret_cast<const char*>(source + quad * kQuadBytes + kPrefetchBytes), _MM_HINT_T0);
      const HalfQuad decoded = decode(source + quad * kQuadBytes);
      _mm512_store_si512(out[2 * quad], decoded.pair0);
      _mm512_store_si512(out[2 * quad + 1], decoded.pair1);
    }
    for (std::int64_t pair = 2 * quads; pair < kTile; ++pair) _mm512_store_si512(out[pair], _mm512_setzero_si512());
  }

  const Weight& weight_;
  const std::int64_t end_;
  const ArithmeticDecoder arithmetic_;
  const std::uint8_t* source_[kTilePanels] = {};
  bool has_nan_[kTilePanels] = {};
  unsigned panels_ = 0;
  WeightTile (*out_)[kStepTiles] = nullptr;
  std::int64_t quads_ = 0;
  std::int64_t step_ = 0;
  unsigned column_ = 0;
  std::int64_t left_ = 0;
};

constexpr int kActivationStride = kChunk * 2;  // bytes between rows
constexpr int kTileStride = 64;

// Partial sums of up to 16 activation rows times two panels (C tiles 0-3: their halves) over `steps` * 32 k.
inline void multiply_16_rows(const std::uint16_t* x, const WeightTile (*weights)[kStepTiles], std::int64_t steps,
                             ChunkDecoder& next, std::int64_t slice, float (*out)[kTile][kTile]) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (std::int64_t step = 0; step < steps; ++step) {
    _tile_loadd(4, x + step * kTileDepth, kActivationStride);
    _tile_loadd(6, weights[step][0], kTileStride);
    _tile_dpbf16ps(0, 4, 6);
    next.advance(slice);
    _tile_loadd(7, weights[step][1], kTileStride);
    _tile_dpbf16ps(1, 4, 7);
    next.advance(slice);
    _tile_loadd(6, weights[step][2], kTileStride);
    _tile_dpbf16ps(2, 4, 6);
    next.advance(slice);
    _tile_loadd(7, weights[step][3], kTileStride);
    _tile_dpbf16ps(3, 4, 7);
    next.advance(slice);
  }
  _tile_stored(0, out[0], kTileStride);
  _tile_stored(1, out[1], kTileStride);
  _tile_stored(2, out[2], kTileStride);
  _tile_stored(3, out[3], kTileStride);
}

inline void prefetch_kilobyte(const std::uint16_t* x) {
#pragma GCC unroll 16
  for (int line = 0; line < 16; ++line) _mm_prefetch(reinterpret_cast<const char*>(x + line * 32), _MM_HINT_T0);
}

// Partial sums of 32 activation rows (A tiles 4, 5) times one panel (C tiles 0, 1 and 2, 3: its halves).
inline void multiply_32_rows(const std::uint16_t* x, const WeightTile (*weights)[kStepTiles], int panel,
                             std::int64_t steps, ChunkDecoder& next, std::int64_t slice, float (*out)[kTile][kTile]) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (std::int64_t step = 0; step < steps; ++step) {
    _tile_loadd(4, x + step * kTileDepth, kActivationStride);
    _tile_loadd(6, weights[step][2 * panel], kTileStride);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, weights[step][2 * panel + 1], kTileStride);
    _tile_dpbf16ps(1, 4, 7);
    next.advance(slice);
    _tile_loadd(5, x + kTile * kChunk + step * kTileDepth, kActivationStride);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
    // Half of the 8 KiB of the next 32 rows for each panel: tiles read too scattered for the processor to guess.
    prefetch_kilobyte(x + 2 * kTile * kChunk + (panel * kSteps + step) * 512);
    next.advance(slice);
  }
  _tile_stored(0, out[0], kTileStride);
  _tile_stored(1, out[1], kTileStride);
  _tile_stored(2, out[2], kTileStride);
  _tile_stored(3, out[3], kTileStride);
}

// sums += partial * x_scale * w_scale for `rows` <= 16 rows and the two halves of a panel.
inline void add_scaled(const float (*partial)[kTile][kTile], std::int64_t rows, const float* x_scale, float w_scale,
                       float (*sums)[kTileColumns], int panel) {
  const __m512 column_scale = _mm512_set1_ps(w_scale);
  for (std::int64_t row = 0; row < rows; ++row) {
    const __m512 row_scale = _mm512_set1_ps(x_scale[row]);
    float* sum = sums[row] + panel * kPanelRows;
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const __m512 scaled = _mm512_mul_ps(_mm512_load_ps(partial[half][row]), row_scale);
      const __m512 total = _mm512_fmadd_ps(scaled, column_scale, _mm512_load_ps(sum + half * kHalf));
      _mm512_store_ps(sum + half * kHalf, total);
    }
  }
}

// One chunk: all activation rows times two panels, while `next` decodes the chunk after it.
void multiply_chunk(const Problem& problem, std::int64_t panel, int panels, std::int64_t chunk,
                    const WeightTile (*weights)[kStepTiles], ChunkDecoder& next, AmxScratch& scratch) {
  const Weight& w = problem.weight;
  const Activation& x = problem.activation;
  const std::int64_t steps = (w.depth.length_of(chunk) + kTileDepth - 1) / kTileDepth;
  const std::int64_t block = w.depth.block_of(chunk);
  const float w_scale[kTilePanels] = {w.scales_of(panel)[block], w.scales_of(panel + panels - 1)[block]};
  // The decoder gets its turn two (32 rows) or four times (16 rows) a step.
  const std::int64_t turns = steps * (x.rows / 32 * panels * 2 + (x.rows % 32 + kTile - 1) / kTile * 4);
  const std::int64_t slice = (next.tiles_left() + turns - 1) / turns;
  std::int64_t row = 0;
  for (; row + 2 * kTile <= x.rows; row += 2 * kTile) {
    for (int p = 0; p < panels; ++p) {
      multiply_32_rows(x.values_of(chunk, row), weights, p, steps, next, slice, scratch.partial);
      const float* x_scale = x.scales_of(chunk, row);
      add_scaled(scratch.partial, kTile, x_scale, w_scale[p], scratch.sums + row, p);
      add_scaled(scratch.partial + 2, kTile, x_scale + kTile, w_scale[p], scratch.sums + row + kTile, p);
    }
  }
  for (; row < x.rows; row += kTile) {
    const std::int64_t rows = x.rows - row < kTile ? x.rows - row : kTile;
    multiply_16_rows(x.values_of(chunk, row), weights, steps, next, slice, scratch.partial);
    for (int p = 0; p < panels; ++p) {
      add_scaled(scratch.partial + 2 * p, rows, x.scales_of(chunk, row), w_scale[p], scratch.sums + row, p);
    }
  }
  next.finish();
}

// Few rows: the tiles' detour through memory costs more than it saves.
void linear_of_few_rows(const Problem& problem, std::int64_t begin, std::int64_t end) {
  bool has_nan = false;
  for (std::int64_t panel = begin; panel < end; ++panel) has_nan |= problem.weight.panels[panel].has_nan != 0;
  if (has_nan) {
    linear_in_registers<kFewRows, 2, kRegisterPrefetchBytes>(problem, begin, end, TableDecoder(kScaledTables));
  } else {
    linear_in_registers<kFewRows, 2, kRegisterPrefetchBytes>(problem, begin, end, ArithmeticDecoder());
  }
}

void linear(const Problem& problem, std::int64_t begin, std::int64_t end, void* memory) {
  if (problem.path == Path::registers) return linear_of_few_rows(problem, begin, end);
  auto& scratch = *static_cast<AmxScratch*>(memory);
  const Activation& x = problem.activation;
  const std::int64_t chunks = problem.weight.depth.chunks;
  const TileSession session(x.rows < kTile ? x.rows : kTile);
  ChunkDecoder next(problem.weight, end);
  int buffer = 0;
  if (chunks > 0) {
    next.start(begin, 0, scratch.weights[buffer]);
    next.finish();
  }
  for (std::int64_t panel = begin; panel < end; panel += kTilePanels) {
    const int panels = end - panel < kTilePanels ? 1 : kTilePanels;
    std::memset(scratch.sums, 0, static_cast<std::size_t>(x.rows) * sizeof scratch.sums[0]);
    for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
      const WeightTile(*weights)[kStepTiles] = scratch.weights[buffer];
      buffer ^= 1;
      if (chunk + 1 < chunks) {
        next.start(panel, chunk + 1, scratch.weights[buffer]);
      } else if (panel + kTilePanels < end) {
        next.start(panel + kTilePanels, 0, scratch.weights[buffer]);
      }
      multiply_chunk(problem, panel, panels, chunk, weights, next, scratch);
    }
    for (int p = 0; p < panels; ++p) {
      store_panel(problem, panel + p, scratch.sums[0] + p * kPanelRows, kTileColumns, 0, x.rows);
    }
  }
}

}  // namespace

constexpr Kernels kAmxKernels = [] {
  Kernels kernels = run_kernels();
  kernels.weight_exponent = ArithmeticDecoder::kExponent;
  kernels.linear = linear;
  kernels.scratch_bytes = sizeof(AmxScratch);
  kernels.max_rows = kAmxRows;
  kernels.register_rows = kFewRows;
  kernels.paths_agree = false;  // tdpbf16ps adds even and odd k apart, vdpbf16ps in turn
  return kernels;
}();

}  // namespace qwen3_fp8_ascend::cpu
