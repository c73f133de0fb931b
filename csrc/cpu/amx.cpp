// The kernels for AMX-BF16, for any number of rows.
//
// A decoded chunk of a panel is already in the order of two B tiles per 32 k. C tiles hold one chunk's fp32 partial sums,
// which AVX-512 then scales and adds up. The next chunk is decoded in slices between the tile operations of this one, so
// that the decoder's instructions run while the tile unit is busy. The bits of an output depend neither on the number of
// rows nor on the number of threads.
#include "linear_avx512.h"

namespace qwen3_fp8_ascend::cpu {
namespace {

constexpr int kTile = 16;       // rows of a tile register; 64 bytes each
constexpr int kTileDepth = 32;  // k of a tile of bf16
constexpr std::int64_t kAmxRows = 256;
constexpr int kPrefetchBytes = 4096;

constexpr DecodeTables kScaledTables = make_decode_tables(ArithmeticDecoder::kExponent);

using DecodedRow = std::uint16_t[kTileColumns * 2];  // a pair of k of two panels

struct AmxScratch {
  alignas(64) DecodedRow weights[2][kChunk / 2];
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

// Decodes a chunk of one or two panels quad by quad.
class ChunkDecoder {
 public:
  explicit ChunkDecoder(const Weight& weight) : weight_(weight) {}

  void start(std::int64_t panel, int panels, std::int64_t chunk, DecodedRow* out) {
    for (int p = 0; p < kTilePanels; ++p) {
      const std::int64_t source = panel + (p < panels ? p : 0);
      source_[p] = weight_.codes_of(source) + weight_.depth.start_of(chunk) * kPanelRows;
      has_nan_[p] = weight_.panels[source].has_nan != 0;
    }
    panels_ = panels;
    out_ = out;
    quad_ = 0;
    quads_ = (weight_.depth.length_of(chunk) + 3) / 4;
  }

  std::int64_t quads() const { return quads_; }

  void advance(std::int64_t count) {
    const std::int64_t end = quad_ + count < quads_ ? quad_ + count : quads_;
    for (; quad_ < end; ++quad_) {
      for (int p = 0; p < panels_; ++p) {
        const std::uint8_t* source = source_[p] + quad_ * kQuadBytes;
        _mm_prefetch(reinterpret_cast<const char*>(source + kPrefetchBytes), _MM_HINT_T0);
        _mm_prefetch(reinterpret_cast<const char*>(source + kPrefetchBytes + 64), _MM_HINT_T0);
        if (has_nan_[p]) {
          decode_quad(TableDecoder(kScaledTables), source, p);
        } else {
          decode_quad(arithmetic_, source, p);
        }
      }
    }
  }

  // Tiles reach up to the next multiple of 32 k: what is behind the last quad must be zero, since 0 * NaN is NaN.
  void finish() {
    advance(quads_);
    const std::int64_t first = 2 * quads_;
    const std::int64_t last = (first + kTile - 1) / kTile * kTile;
    if (first < last) std::memset(out_[first], 0, static_cast<std::size_t>(last - first) * sizeof(DecodedRow));
  }

 private:
  template <class Decoder>
  void decode_quad(const Decoder& decode, const std::uint8_t* source, int p) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const HalfQuad decoded = decode(source + half * kQuadBytes / 2);
      const int column = (p * 2 + half) * 2 * kHalf;
      _mm512_store_si512(out_[2 * quad_] + column, decoded.pair0);
      _mm512_store_si512(out_[2 * quad_ + 1] + column, decoded.pair1);
    }
  }

  const Weight& weight_;
  const ArithmeticDecoder arithmetic_;
  const std::uint8_t* source_[kTilePanels];
  bool has_nan_[kTilePanels];
  int panels_;
  DecodedRow* out_;
  std::int64_t quad_;
  std::int64_t quads_;
};

constexpr int kActivationStride = kChunk * 2;  // bytes
constexpr int kWeightStride = sizeof(DecodedRow);

// Brings the same 16 x 32 activations of the next chunk into L1: they are too far apart for the processor to guess.
inline void prefetch_activations(const std::uint16_t* x, std::int64_t chunk_stride) {
#pragma GCC unroll 16
  for (int row = 0; row < kTile; ++row) {
    _mm_prefetch(reinterpret_cast<const char*>(x + chunk_stride + row * kChunk), _MM_HINT_T0);
  }
}

// Partial sums of up to 16 activation rows times two panels (tiles 0-3: their halves) over `steps` * 32 k.
inline void multiply_16_rows(const std::uint16_t* x, std::int64_t chunk_stride, const DecodedRow* weights, std::int64_t steps, ChunkDecoder& next,
                             std::int64_t slice, float (*out)[kTile][kTile]) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (std::int64_t step = 0; step < steps; ++step) {
    const std::uint16_t* b = weights[step * kTile];
    _tile_loadd(4, x + step * kTileDepth, kActivationStride);
    _tile_loadd(6, b, kWeightStride);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, b + 2 * kTile, kWeightStride);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(6, b + 4 * kTile, kWeightStride);
    _tile_dpbf16ps(2, 4, 6);
    _tile_loadd(7, b + 6 * kTile, kWeightStride);
    _tile_dpbf16ps(3, 4, 7);
    prefetch_activations(x + step * kTileDepth, chunk_stride);
    next.advance(slice);
  }
  _tile_stored(0, out[0], 64);
  _tile_stored(1, out[1], 64);
  _tile_stored(2, out[2], 64);
  _tile_stored(3, out[3], 64);
}

// Partial sums of 32 activation rows (A tiles 4, 5) times one panel (tiles 0, 1 and 2, 3: their halves).
inline void multiply_32_rows(const std::uint16_t* x, std::int64_t chunk_stride, const DecodedRow* weights, int panel, std::int64_t steps,
                             ChunkDecoder& next, std::int64_t slice, float (*out)[kTile][kTile]) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (std::int64_t step = 0; step < steps; ++step) {
    const std::uint16_t* b = weights[step * kTile] + panel * kPanelRows * 2;
    _tile_loadd(4, x + step * kTileDepth, kActivationStride);
    _tile_loadd(6, b, kWeightStride);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, b + 2 * kTile, kWeightStride);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, x + kTile * kChunk + step * kTileDepth, kActivationStride);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
    if (panel == 0) {
      prefetch_activations(x + step * kTileDepth, chunk_stride);
      prefetch_activations(x + kTile * kChunk + step * kTileDepth, chunk_stride);
    }
    next.advance(slice);
  }
  _tile_stored(0, out[0], 64);
  _tile_stored(1, out[1], 64);
  _tile_stored(2, out[2], 64);
  _tile_stored(3, out[3], 64);
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

void linear(const Problem& problem, std::int64_t begin, std::int64_t end, void* memory) {
  auto& scratch = *static_cast<AmxScratch*>(memory);
  const Weight& w = problem.weight;
  const Activation& x = problem.activation;
  if (begin >= end) return;
  const TileSession session(x.rows < kTile ? x.rows : kTile);
  ChunkDecoder next(w);
  int buffer = 0;
  if (w.depth.chunks > 0) {
    next.start(begin, end - begin < kTilePanels ? 1 : kTilePanels, 0, scratch.weights[buffer]);
    next.finish();
  }
  for (std::int64_t panel = begin; panel < end; panel += kTilePanels) {
    const int panels = end - panel < kTilePanels ? 1 : kTilePanels;
    std::memset(scratch.sums, 0, static_cast<std::size_t>(x.rows) * sizeof scratch.sums[0]);
    for (std::int64_t chunk = 0; chunk < w.depth.chunks; ++chunk) {
      const DecodedRow* weights = scratch.weights[buffer];
      buffer ^= 1;
      const bool last_chunk = chunk + 1 == w.depth.chunks;
      const std::int64_t next_panel = last_chunk ? panel + kTilePanels : panel;
      const bool more = next_panel < end;
      if (more) {
        next.start(next_panel, end - next_panel < kTilePanels ? 1 : kTilePanels, last_chunk ? 0 : chunk + 1,
                   scratch.weights[buffer]);
      }
      const std::int64_t steps = (w.depth.length_of(chunk) + kTileDepth - 1) / kTileDepth;
      const std::int64_t units = x.rows / 32 * panels + (x.rows % 32 + kTile - 1) / kTile;
      const std::int64_t slice = more ? (next.quads() + units * steps - 1) / (units * steps) : 0;
      const std::int64_t block = w.depth.block_of(chunk);
      const float w_scale[kTilePanels] = {w.scales_of(panel)[block], w.scales_of(panel + panels - 1)[block]};
      std::int64_t row = 0;
      for (; row + 2 * kTile <= x.rows; row += 2 * kTile) {
        for (int p = 0; p < panels; ++p) {
          multiply_32_rows(x.values_of(chunk, row), x.capacity * kChunk, weights, p, steps, next, slice, scratch.partial);
          const float* x_scale = x.scales_of(chunk, row);
          add_scaled(scratch.partial, kTile, x_scale, w_scale[p], scratch.sums + row, p);
          add_scaled(scratch.partial + 2, kTile, x_scale + kTile, w_scale[p], scratch.sums + row + kTile, p);
        }
      }
      for (; row < x.rows; row += kTile) {
        const std::int64_t rows = x.rows - row < kTile ? x.rows - row : kTile;
        multiply_16_rows(x.values_of(chunk, row), x.capacity * kChunk, weights, steps, next, slice, scratch.partial);
        for (int p = 0; p < panels; ++p) {
          add_scaled(scratch.partial + 2 * p, rows, x.scales_of(chunk, row), w_scale[p], scratch.sums + row, p);
        }
      }
      if (more) next.finish();
    }
    for (int p = 0; p < panels; ++p) {
      store_panel(problem, panel + p, scratch.sums[0] + p * kPanelRows, kTileColumns, 0, x.rows);
    }
  }
}

}  // namespace

const Kernels kAmxKernels = {
    amax,
    quantize_values,
    quantize_codes,
    split_values,
    dequantize,
    ArithmeticDecoder::kExponent,
    linear,
    sizeof(AmxScratch),
    kAmxRows,
};

}  // namespace qwen3_fp8_ascend::cpu
