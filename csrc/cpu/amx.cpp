// The kernels for AMX-BF16: one or two rows in registers as on AVX-512, more in tiles.
//
// A quarter of a chunk of a panel is two B tiles, one for each half of its rows: decoded, they are already in the order
// that tdpbf16ps wants. The unit of work is a visit: up to 32 activation rows times one panel over one chunk. Its C
// tiles then hold fp32 partial sums, which AVX-512 scales and adds up while the next visit is under way. Decoding, too,
// goes on between the tile operations. On each of the two paths, the bits of an output depend neither on the number of
// rows nor on the number of threads.
#include "linear_avx512.h"

namespace qwen3_fp8_ascend::cpu {
namespace {

constexpr int kTile = 16;       // rows of a tile register; 64 bytes each
constexpr int kTileDepth = 32;  // k of a tile of bf16
constexpr int kTileStride = 64;
constexpr int kActivationStride = kChunk * 2;  // bytes between rows
constexpr int kVisitRows = 2 * kTile;
constexpr std::int64_t kAmxRows = 512;
constexpr int kFewRows = 2;

constexpr int kRegisterPrefetchBytes = 2048;
constexpr int kTilePrefetchBytes = 768;

// A B tile: 32 k (as 16 pairs) of half a panel.
using WeightTile = std::uint16_t[kTile][2 * kHalf];
constexpr int kChunkTiles = 2 * kChunk / kTileDepth;

// A C tile for each half of a panel and each 16 activation rows.
using PartialSums = float[kVisitRows / kTile][2][kTile][kHalf];

// The order of work: groups of panels; in a group chunk after chunk, and in a chunk panel after panel.
//
// One visit takes all of a small batch. Every decoded tile is then used once, and a ring of eight is enough: what is
// written over and over stays in L1, since it is cache lines on their way out of L1 that are dear. Two panels share the
// activations of a chunk while they are in L1. Longer batches use a chunk of a panel many times, so that the ring holds
// it and the next one, and eight panels share the activations of a chunk, which come from L3, while they are in L2.
//
// Half a ring is the best lead but for the fewest rows, which leave the unit idle: one tile more is up to 7 % faster
// with up to eight, 3 % slower with twelve and 20 % with 32. Six tiles, or two, cost 20 % at 16.
//
// A load that follows the store of a tile at once waits for all of it, so that scaling does not begin at once. In
// longer batches the sums come from L2, and it takes more turns to load them.
struct Schedule {
  explicit Schedule(std::int64_t rows)
      : visits(ceil_div(rows, kVisitRows)),
        panels(visits == 1 ? 2 : kMostPanels),
        ring(visits == 1 ? kChunkTiles : 2 * kChunkTiles),
        lead(rows <= kRowsOfLongLead ? ring / 2 + 1 : ring / 2),
        wait(visits == 1 ? 4 : 2) {}

  static constexpr std::int64_t kMostPanels = 8;
  static constexpr std::int64_t kRowsOfLongLead = 8;

  std::int64_t visits;  // to a chunk of a panel
  std::int64_t panels;  // of a group
  std::int64_t ring;    // decoded tiles, a power of two
  std::int64_t lead;    // tiles that decoding is ahead of their first use
  std::int64_t wait;    // turns of a visit (one a B tile) before it scales the last one's sums
};

struct AmxScratch {
  alignas(4096) WeightTile ring[2 * kChunkTiles];
  alignas(64) PartialSums partial[2];
  alignas(64) float sums[Schedule::kMostPanels][kAmxRows][kPanelRows];
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
    // g++ 12 takes the intrinsic to read eight bytes, and may leave the others out or write them later.
    asm volatile("" : : "r"(&config) : "memory");
    _tile_loadconfig(&config);
  }
  ~TileSession() { _tile_release(); }
  TileSession(const TileSession&) = delete;
  TileSession& operator=(const TileSession&) = delete;
};

// The B tiles of a range of panels in the order of their use, decoded one at a time into a ring.
//
// A tile load waits for older stores whose address is the same modulo 4 KiB. Whole tiles are therefore written in the
// order in which tiles are read, so that the stores still under way are those of other tiles.
class WeightStream {
 public:
  WeightStream(const Weight& weight, std::int64_t begin, std::int64_t end, const Schedule& schedule, WeightTile* ring)
      : weight_(weight), end_(end), schedule_(schedule), ring_(ring), group_(begin), panel_(begin) {
    if (weight.depth.chunks == 0) panel_ = end;
    open();
    for (std::int64_t tile = 0; tile < schedule.lead; ++tile) decode();
  }

  // Tile `index` of the chunk of a panel that is in use: half index % 2 of step index / 2.
  const WeightTile& tile(std::int64_t index) const { return ring_[(first_ + index) & (schedule_.ring - 1)]; }

  // To be called once for each use of a tile: what is decoded keeps the lead.
  void advance() {
    if (++uses_ == schedule_.visits) {
      uses_ = 0;
      decode();
    }
  }

  // To be called after all visits to a chunk of a panel, which had that many tiles.
  void leave(std::int64_t tiles) { first_ += tiles; }

 private:
  static constexpr std::int64_t kQuads = kTileDepth / 4;

  void open() {
    if (panel_ >= end_) return;
    source_ = weight_.codes_of(panel_) + weight_.depth.start_of(chunk_) * kPanelRows;
    has_nan_ = weight_.panels[panel_].has_nan != 0;
    quads_ = (weight_.depth.length_of(chunk_) + 3) / 4;
    half_ = 0;
  }

  void decode() {
    if (panel_ >= end_) return;
    WeightTile& out = ring_[decoded_++ & (schedule_.ring - 1)];
    const std::uint8_t* source = source_ + half_ * kQuadBytes / 2;
    if (has_nan_) {
      decode_tile(TableDecoder(kScaledTables), source, quads_ < kQuads ? quads_ : kQuads, out);
    } else if (quads_ < kQuads) {
      decode_tile(arithmetic_, source, quads_, out);
    } else {
      decode_tile(arithmetic_, source, kQuads, out);
    }
    half_ ^= 1;
    if (half_ != 0) return;
    source_ += kQuads * kQuadBytes;
    quads_ -= kQuads;
    if (quads_ <= 0) open_next();
  }

  void open_next() {
    ++panel_;
    if (panel_ == end_ || panel_ == group_ + schedule_.panels) {
      if (++chunk_ == weight_.depth.chunks) {
        chunk_ = 0;
        group_ += schedule_.panels;
      }
      panel_ = group_;
    }
    open();
  }

  // What is behind the last quad becomes zero, since the tile reaches further and 0 * NaN is NaN.
  template <class Decoder>
  static void decode_tile(const Decoder& decode, const std::uint8_t* source, std::int64_t quads, WeightTile& out) {
    for (std::int64_t quad = 0; quad < quads; ++quad) {
      _mm_prefetch(reinterpret_cast<const char*>(source + quad * kQuadBytes + kTilePrefetchBytes), _MM_HINT_T0);
      const HalfQuad decoded = decode(source + quad * kQuadBytes);
      _mm512_store_si512(out[2 * quad], decoded.pair0);
      _mm512_store_si512(out[2 * quad + 1], decoded.pair1);
    }
    for (std::int64_t pair = 2 * quads; pair < kTile; ++pair) _mm512_store_si512(out[pair], _mm512_setzero_si512());
  }

  const Weight& weight_;
  const std::int64_t end_;
  const Schedule schedule_;
  WeightTile* const ring_;
  const ArithmeticDecoder arithmetic_;

  // What is decoded next.
  std::int64_t group_;
  std::int64_t panel_;
  std::int64_t chunk_ = 0;
  const std::uint8_t* source_ = nullptr;
  bool has_nan_ = false;
  std::int64_t quads_ = 0;
  int half_ = 0;

  std::int64_t decoded_ = 0;
  std::int64_t first_ = 0;  // the first tile in use
  std::int64_t uses_ = 0;
};

// sums += partial * x_scale * w_scale for the rows of a visit, some at a time.
class Scaling {
 public:
  Scaling() = default;
  Scaling(const PartialSums& partial, std::int64_t rows, const float* x_scale, float w_scale, float (*sums)[kPanelRows])
      : partial_(partial), left_(rows), rows_(rows), x_scale_(x_scale), w_scale_(w_scale), sums_(sums) {}

  std::int64_t rows_left() const { return left_; }

  void advance(std::int64_t count) {
    const __m512 column_scale = _mm512_set1_ps(w_scale_);
    for (; count > 0 && left_ > 0; --count, --left_) {
      const std::int64_t row = rows_ - left_;
      const __m512 row_scale = _mm512_set1_ps(x_scale_[row]);
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        float* sum = sums_[row] + half * kHalf;
        const __m512 scaled = _mm512_mul_ps(_mm512_load_ps(partial_[row / kTile][half][row % kTile]), row_scale);
        _mm512_store_ps(sum, _mm512_fmadd_ps(scaled, column_scale, _mm512_load_ps(sum)));
      }
    }
  }

  void finish() { advance(left_); }

 private:
  const float (*partial_)[2][kTile][kHalf] = nullptr;
  std::int64_t left_ = 0;
  std::int64_t rows_ = 0;
  const float* x_scale_ = nullptr;
  float w_scale_ = 0;
  float (*sums_)[kPanelRows] = nullptr;
};

// A visit: partial sums of 16 * RowTiles activation rows (A tiles 4, 5) times a panel (C tiles 0, 1 and 2, 3: its
// halves) over `steps` * 32 k, while the weights to come are decoded and the last visit's sums are scaled.
template <int RowTiles>
inline void visit(const std::uint16_t* x, std::int64_t steps, std::int64_t wait, WeightStream& weights, Scaling& last,
                  PartialSums& out) {
  const std::int64_t turns = 2 * steps - wait;
  const std::int64_t rows_a_turn = turns > 0 ? ceil_div(last.rows_left(), turns) : 0;
  const auto take_turn = [&](std::int64_t turn) {
    weights.advance();
    if (turn >= wait) last.advance(rows_a_turn);
  };
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (RowTiles == 2) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (std::int64_t step = 0; step < steps; ++step) {
    _tile_loadd(4, x + step * kTileDepth, kActivationStride);
    _tile_loadd(6, weights.tile(2 * step), kTileStride);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (RowTiles == 2) {
      _tile_loadd(5, x + kTile * kChunk + step * kTileDepth, kActivationStride);
      _tile_dpbf16ps(2, 5, 6);
    }
    take_turn(2 * step);
    _tile_loadd(7, weights.tile(2 * step + 1), kTileStride);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (RowTiles == 2) _tile_dpbf16ps(3, 5, 7);
    take_turn(2 * step + 1);
  }
  last.finish();
  _tile_stored(0, out[0][0], kTileStride);
  _tile_stored(1, out[0][1], kTileStride);
  if constexpr (RowTiles == 2) {
    _tile_stored(2, out[1][0], kTileStride);
    _tile_stored(3, out[1][1], kTileStride);
  }
}

// Few rows: the tiles' detour through memory costs more than it saves.
void linear_of_few_rows(const Problem& problem, std::int64_t begin, std::int64_t end) {
  with_scaled_decoder(problem.weight, begin, end, [&](const auto& decode) {
    linear_in_registers<kFewRows, 2, kRegisterPrefetchBytes>(problem, begin, end, decode);
  });
}

void linear(const Problem& problem, std::int64_t begin, std::int64_t end, void* memory) {
  if (problem.path == Path::registers) return linear_of_few_rows(problem, begin, end);
  auto& scratch = *static_cast<AmxScratch*>(memory);
  const Weight& w = problem.weight;
  const Activation& x = problem.activation;
  const TileSession session(x.rows < kTile ? x.rows : kTile);
  const Schedule schedule(x.rows);
  WeightStream weights(w, begin, end, schedule, scratch.ring);
  int buffer = 0;
  for (std::int64_t group = begin; group < end; group += schedule.panels) {
    const std::int64_t panels = end - group < schedule.panels ? end - group : schedule.panels;
    for (std::int64_t p = 0; p < panels; ++p) {
      std::memset(scratch.sums[p], 0, static_cast<std::size_t>(x.rows) * sizeof scratch.sums[p][0]);
    }
    Scaling last;
    for (std::int64_t chunk = 0; chunk < w.depth.chunks; ++chunk) {
      const std::int64_t steps = ceil_div(w.depth.length_of(chunk), kTileDepth);
      for (std::int64_t p = 0; p < panels; ++p) {
        const float w_scale = w.scales_of(group + p)[w.depth.block_of(chunk)];
        for (std::int64_t row = 0; row < x.rows; row += kVisitRows) {
          const std::int64_t rows = x.rows - row < kVisitRows ? x.rows - row : kVisitRows;
          PartialSums& partial = scratch.partial[buffer];
          buffer ^= 1;
          if (rows > kTile) {
            visit<2>(x.values_of(chunk, row), steps, schedule.wait, weights, last, partial);
          } else {
            visit<1>(x.values_of(chunk, row), steps, schedule.wait, weights, last, partial);
          }
          last = Scaling(partial, rows, x.scales_of(chunk, row), w_scale, scratch.sums[p] + row);
        }
        weights.leave(2 * steps);
      }
    }
    last.finish();
    for (std::int64_t p = 0; p < panels; ++p)
      store_panel(problem, group + p, scratch.sums[p][0], kPanelRows, 0, x.rows);
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
