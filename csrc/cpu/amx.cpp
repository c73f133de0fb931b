// The kernels for AMX-BF16, all in tiles.
//
// A step, 32 k of a panel, is two B tiles, one for each half of its rows: decoded, they are already in the order that
// tdpbf16ps wants. The unit of work is a visit: up to 16 activation rows times two panels, or 32 times one, over one
// chunk. Its C tiles then hold fp32 partial sums, which AVX-512 scales and adds up while the next visit is under way.
// Decoding, too, goes on between the tile operations, and reads codes in the order of memory. The bits of an output
// depend neither on the number of rows nor on the number of threads.
#include "decode_avx512.h"
#include "runs.h"

namespace qwen3_fp8_ascend::cpu {
namespace {

constexpr int kTile = 16;       // rows of a tile register; 64 bytes each
constexpr int kTileDepth = 32;  // k of a tile of bf16
constexpr int kTileStride = 64;
constexpr int kActivationStride = kChunk * 2;  // bytes between rows
constexpr int kVisitRows = 2 * kTile;          // the most of a visit to one panel; half as many to two
constexpr std::int64_t kAmxRows = 512;

// A B tile: 32 k (as 16 pairs) of half a panel.
using WeightTile = std::uint16_t[kTile][2 * kHalf];
constexpr std::int64_t kStepQuads = kTileDepth / 4;
constexpr int kChunkTiles = 2 * kChunk / kTileDepth;

// The order of work: groups of panels; in a group chunk after chunk, and in a chunk panel after panel, or two at once.
// A turn is what one B tile takes: its products, the decoding of as many weights, and some rows' scaling.
//
// One visit takes all of a small batch. Every decoded tile is then used once, and a ring of eight is enough: what is
// written over and over stays in L1, since it is cache lines on their way out of L1 that are dear. Two panels share the
// activations of a chunk: up to 16 rows their registers, and their codes are read in turn, a quad each, since the
// memory is faster at two places than at one; up to 32 rows, L1. The activations of the next chunk are asked for
// meanwhile; of few rows they are a few lines, and asking for them costs more than it saves.
//
// A chunk of a panel is a page of codes, and at a page's end the processor's own prefetching stops. It is set going on
// the panel's next page when this one begins.
//
// Longer batches use a chunk of a panel many times, so that the ring holds it and the next one, and eight panels share
// the activations of a chunk, which come from L3, while they are in L2. From there to L1 they are what takes longest:
// in long batches, two panels visit each 32 rows one after the other. A short one has to decode too fast for that: the
// ring, twice as large, would not stay in L1.
//
// Half a ring is the best lead. A load that follows the store of a tile at once waits for all of it, so that scaling
// does not begin at once. In longer batches the sums come from L2, and it takes more turns to load them.
enum class Batch { upto_4, upto_16, upto_32, upto_128, longer };

template <Batch batch>
struct Schedule {
  static constexpr bool kOneRowTile = batch == Batch::upto_4 || batch == Batch::upto_16;
  // Whether a chunk of a panel has several visits.
  static constexpr bool kShared = batch == Batch::upto_128 || batch == Batch::longer;
  static constexpr bool kAsks = batch == Batch::upto_16 || batch == Batch::upto_32;
  static constexpr std::int64_t kGroupPanels = kShared ? 8 : 2;
  static constexpr std::int64_t kTogether = batch == Batch::longer ? 2 : 1;           // panels that visit rows in turn
  static constexpr std::int64_t kRing = (kShared ? 2 : 1) * kTogether * kChunkTiles;  // decoded tiles, a power of two
  static constexpr std::int64_t kLead = kRing / 2;        // tiles that decoding is ahead of their first use
  static constexpr std::int64_t kWait = kShared ? 2 : 4;  // turns of a visit before it scales the last one's sums
  static constexpr std::int64_t kAhead = kOneRowTile ? 1856 : 832;  // bytes that codes are prefetched ahead
  // Lines of a panel's next chunk that are asked for when this one begins.
  static constexpr int kEarlyLines = kShared ? 0 : kOneRowTile ? 2 : 4;
};

struct AmxScratch {
  alignas(4096) WeightTile ring[Schedule<Batch::longer>::kRing];
  alignas(64) float partial[kVisitRows * kPanelRows];
  alignas(64) float sums[Schedule<Batch::longer>::kGroupPanels][kAmxRows * kPanelRows];
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

// The B tiles of a range of panels in the order of their use, `Panels` at once, decoded turn by turn into a ring.
//
// Always inlined, and nothing gets its address: its state and the decoder's constants have to stay in registers.
template <Batch batch, int Panels, class Decoder>
class WeightStream {
 public:
  static constexpr int kTurns = 2 * Panels;  // of a step, and so its tiles

  [[gnu::always_inline]] WeightStream(const Decoder& decode, const Weight& weight, std::int64_t begin, std::int64_t end,
                                      std::int64_t visits, WeightTile* ring)
      : decode_(decode),
        weight_(weight),
        end_(end),
        visits_(visits),
        panel_bytes_(weight.depth.padded() * kPanelRows),
        ring_(ring),
        group_(begin),
        chunk_source_(weight.codes_of(begin)) {
    open_chunk();
    for (std::int64_t tile = 0; tile < Schedule<batch>::kLead; tile += kTurns) {
      for (int turn = 0; turn < kTurns; ++turn) decode_turn(turn);
      next_step();
    }
  }

  // Tile `index` of those in use: half index % 2 of panel index / 2 % Panels at step index / kTurns.
  [[gnu::always_inline]] const WeightTile& tile(std::int64_t index) const { return at(first_ + index); }

  // To be called in each turn (of a step) of every visit: what is decoded keeps the lead.
  [[gnu::always_inline]] void advance(int turn) {
    if constexpr (Schedule<batch>::kShared) {
      if (++uses_ < visits_) return;
      uses_ = 0;
      turn = turn_;
      turn_ = (turn_ + 1) % kTurns;
    }
    decode_turn(turn);
    if (turn == kTurns - 1) next_step();
  }

  // To be called after all visits to so many tiles.
  [[gnu::always_inline]] void leave(std::int64_t tiles) { first_ += tiles; }

 private:
  static constexpr int kTurnQuads = kStepQuads / kTurns;  // of each panel

  [[gnu::always_inline]] WeightTile& at(std::int64_t tile) const { return ring_[tile & (Schedule<batch>::kRing - 1)]; }

  [[gnu::always_inline]] void next_step() {
    decoded_ += kTurns;
    source_ += kStepQuads * kQuadBytes;
    quads_ -= kStepQuads;
    if (quads_ <= 0) next_panel();
    // Past a panel's end, the codes of the one that takes its place: its neighbours' are read beside it.
    ahead_ = Schedule<batch>::kAhead + (quads_ * kQuadBytes > Schedule<batch>::kAhead ? 0 : past_end_);
  }

  [[gnu::always_inline]] void next_panel() {
    panel_ += Panels;
    if (panel_ < Schedule<batch>::kGroupPanels && group_ + panel_ < end_) {
      open_panel();
      return;
    }
    if (++chunk_ >= weight_.depth.chunks) {
      chunk_ = 0;
      group_ += Schedule<batch>::kGroupPanels;
    }
    open_chunk();
  }

  // Behind the last chunk there is nothing: zeros, which nobody uses.
  [[gnu::always_inline]] void open_chunk() {
    const Depth& depth = weight_.depth;
    chunk_quads_ = 0;
    if (group_ < end_ && chunk_ < depth.chunks) {
      chunk_source_ = weight_.codes_of(group_) + depth.start_of(chunk_) * kPanelRows;
      chunk_quads_ = (depth.length_of(chunk_) + 3) / 4;
      past_end_ = chunk_ + 1 < depth.chunks ? 0 : (Schedule<batch>::kGroupPanels - 1) * panel_bytes_;
    }
    panel_ = 0;
    open_panel();
  }

  [[gnu::always_inline]] void open_panel() {
    source_ = chunk_source_ + panel_ * panel_bytes_;
    quads_ = chunk_quads_;
    for (int panel = 0; panel < Panels; ++panel) {
      const std::uint8_t* next = source_ + panel * panel_bytes_ + chunk_quads_ * kQuadBytes + past_end_;
#pragma GCC unroll 4
      for (int line = 0; line < Schedule<batch>::kEarlyLines; ++line) {
        _mm_prefetch(reinterpret_cast<const char*>(next + line * kLine), _MM_HINT_T1);
      }
    }
  }

  [[gnu::always_inline]] void decode_turn(int turn) {
    const std::int64_t first = turn * kTurnQuads;
    if (quads_ >= kStepQuads) {
#pragma GCC unroll 4
      for (std::int64_t quad = first; quad < first + kTurnQuads; ++quad) {
#pragma GCC unroll 2
        for (int panel = 0; panel < Panels; ++panel) {
          decode_quad(decode_, source_ + panel * panel_bytes_, quad, ahead_, &at(decoded_ + 2 * panel));
        }
      }
    } else {
      for (int panel = 0; panel < Panels; ++panel) {
        const Decoder decode = decode_;  // whose address may be known to others
        decode_rest(decode, source_ + panel * panel_bytes_, first, quads_, &at(decoded_ + 2 * panel));
      }
    }
  }

  [[gnu::always_inline]] static void decode_quad(const Decoder& decode, const std::uint8_t* step, std::int64_t quad,
                                                 std::int64_t ahead, WeightTile* out) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const std::uint8_t* codes = step + quad * kQuadBytes + half * kQuadBytes / 2;
      _mm_prefetch(reinterpret_cast<const char*>(codes + ahead), _MM_HINT_T0);
      const HalfQuad decoded = decode(load_once(codes));
      _mm512_store_si512(out[half][2 * quad], decoded.pair0);
      _mm512_store_si512(out[half][2 * quad + 1], decoded.pair1);
    }
  }

  // A turn of a step that has only so many quads. What is behind the last one becomes zero, since the tile reaches
  // further and 0 * NaN is NaN.
  [[gnu::noinline]] static void decode_rest(const Decoder& decode, const std::uint8_t* step, std::int64_t first,
                                            std::int64_t quads, WeightTile* out) {
    for (std::int64_t quad = first; quad < first + kTurnQuads; ++quad) {
      if (quad < quads) {
        decode_quad(decode, step, quad, 0, out);
      } else {
        for (int half = 0; half < 2; ++half) std::memset(out[half][2 * quad], 0, 2 * sizeof out[half][0]);
      }
    }
  }

  const Decoder decode_;
  const Weight& weight_;
  const std::int64_t end_;
  const std::int64_t visits_;  // to a chunk of a panel
  const std::int64_t panel_bytes_;
  WeightTile* const ring_;

  // What is decoded next.
  std::int64_t group_;  // its first panel
  std::int64_t chunk_ = 0;
  std::int64_t panel_ = 0;  // of the group
  int turn_ = 0;
  const std::uint8_t* chunk_source_;  // the group's first
  std::int64_t chunk_quads_ = 0;
  const std::uint8_t* source_ = nullptr;  // the step's
  std::int64_t quads_ = 0;                // of the chunk, from there on
  std::int64_t ahead_ = Schedule<batch>::kAhead;
  std::int64_t past_end_ = 0;

  std::int64_t decoded_ = 0;  // tiles, without the step's
  std::int64_t first_ = 0;    // the first tile in use
  std::int64_t uses_ = 0;
};

// sums += partial * x_scale * w_scale for the rows of a visit, some at a time.
template <int Panels>
class Scaling {
 public:
  Scaling() = default;
  [[gnu::always_inline]] Scaling(const float* partial, std::int64_t rows, const float* x_scale,
                                 const float (&w_scale)[Panels], float* sums)
      : partial_(partial), rows_(rows), x_scale_(x_scale), sums_(sums) {
    for (int panel = 0; panel < Panels; ++panel) w_scale_[panel] = _mm512_set1_ps(w_scale[panel]);
  }

  std::int64_t rows() const { return rows_; }

  [[gnu::always_inline]] void advance(std::int64_t count) {
    const std::int64_t stop = count < rows_ - row_ ? row_ + count : rows_;
    for (; row_ < stop; ++row_) {
      const __m512 row_scale = _mm512_set1_ps(x_scale_[row_]);
#pragma GCC unroll 4
      for (int half = 0; half < 2 * Panels; ++half) {
        const std::int64_t at = row_ * Panels * kPanelRows + half * kHalf;
        const __m512 scaled = _mm512_mul_ps(_mm512_load_ps(partial_ + at), row_scale);
        _mm512_store_ps(sums_ + at, _mm512_fmadd_ps(scaled, w_scale_[half / 2], _mm512_load_ps(sums_ + at)));
      }
    }
  }

  [[gnu::always_inline]] void finish() { advance(rows_); }

 private:
  const float* partial_ = nullptr;  // (rows, Panels * kPanelRows), as sums
  std::int64_t rows_ = 0;
  std::int64_t row_ = 0;  // the next
  const float* x_scale_ = nullptr;
  __m512 w_scale_[Panels] = {};
  float* sums_ = nullptr;
};

// A visit: partial sums of 16 * RowTiles activation rows (A tiles 4, 5) times `Panels` panels over `steps` * 32 k,
// while the weights to come are decoded and the last visit's sums are scaled. C tiles 0 to 3: a panel's halves, then
// those of the second panel or of the second 16 rows.
//
// Loads, products and vector work alternate as finely as this because the processor runs them in nearly this order: all
// loads of a step first, then its products, takes up to a sixth more time. `first` is the first of the visit's tiles.
// `next` are activations to be asked for, or null.
template <int RowTiles, Batch batch, int Panels, class Decoder>
[[gnu::always_inline]] inline void visit(const std::uint16_t* x, const std::uint16_t* next, std::int64_t steps,
                                         std::int64_t first, WeightStream<batch, Panels, Decoder>& weights,
                                         Scaling<Panels>& last, float* out) {
  static_assert(RowTiles * Panels <= 2, "C has four tiles");
  constexpr int kTurns = WeightStream<batch, Panels, Decoder>::kTurns;
  constexpr int kOutStride = Panels * kPanelRows * static_cast<int>(sizeof(float));
  constexpr std::int64_t kWait = Schedule<batch>::kWait;
  constexpr int kLineNumbers = kLine / sizeof *next;
  constexpr int kLines =
      RowTiles * kTile * kChunk / kLineNumbers / (kTurns * kChunk / kTileDepth);  // to be asked for in a turn
  const std::int64_t turns = kTurns * steps - kWait;
  const std::int64_t rows_a_turn = turns > 0 ? ceil_div(last.rows(), turns) : 0;
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (RowTiles * Panels == 2) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (std::int64_t step = 0; step < steps; ++step) {
    const std::int64_t tile = kTurns * step;
    const auto beside = [&](int turn) {
      if (Schedule<batch>::kAsks && next != nullptr) {
#pragma GCC unroll 16
        for (int line = 0; line < kLines; ++line) {
          _mm_prefetch(reinterpret_cast<const char*>(next + ((tile + turn) * kLines + line) * kLineNumbers),
                       _MM_HINT_T0);
        }
      }
      if (tile + turn >= kWait) last.advance(rows_a_turn);
    };
    _tile_loadd(6, weights.tile(first + tile), kTileStride);
    _tile_loadd(4, x + step * kTileDepth, kActivationStride);
    _tile_dpbf16ps(0, 4, 6);
    weights.advance(0);
    if constexpr (RowTiles == 1) beside(0);
    _tile_loadd(7, weights.tile(first + tile + 1), kTileStride);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (RowTiles == 2) {
      beside(0);
      _tile_loadd(5, x + kTile * kChunk + step * kTileDepth, kActivationStride);
      _tile_dpbf16ps(2, 5, 6);
    }
    weights.advance(1);
    if constexpr (RowTiles == 2) _tile_dpbf16ps(3, 5, 7);
    beside(1);
    if constexpr (Panels == 2) {
      _tile_loadd(6, weights.tile(first + tile + 2), kTileStride);
      _tile_dpbf16ps(2, 4, 6);
      weights.advance(2);
      beside(2);
      _tile_loadd(7, weights.tile(first + tile + 3), kTileStride);
      _tile_dpbf16ps(3, 4, 7);
      weights.advance(3);
      beside(3);
    }
  }
  last.finish();
  _tile_stored(0, out, kOutStride);
  _tile_stored(1, out + kHalf, kOutStride);
  if constexpr (Panels == 2) {
    _tile_stored(2, out + 2 * kHalf, kOutStride);
    _tile_stored(3, out + 3 * kHalf, kOutStride);
  }
  if constexpr (RowTiles == 2) {
    _tile_stored(2, out + kTile * kPanelRows, kOutStride);
    _tile_stored(3, out + kTile * kPanelRows + kHalf, kOutStride);
  }
}

// Panels [begin, end), a multiple of `Panels`.
template <Batch batch, int Panels, class Decoder>
void linear_in_tiles(const Problem& problem, std::int64_t begin, std::int64_t end, const Decoder& decode,
                     AmxScratch& scratch) {
  if (begin == end) return;
  constexpr std::int64_t kWidth = Panels > Schedule<batch>::kTogether ? Panels : Schedule<batch>::kTogether;
  const Weight& w = problem.weight;
  const Activation& x = problem.activation;
  WeightStream<batch, Panels, Decoder> weights(decode, w, begin, end, ceil_div(x.rows, kVisitRows), scratch.ring);
  for (std::int64_t group = begin; group < end; group += Schedule<batch>::kGroupPanels) {
    const std::int64_t left = end - group;
    const std::int64_t panels = left < Schedule<batch>::kGroupPanels ? left : Schedule<batch>::kGroupPanels;
    for (std::int64_t p = 0; p < panels; p += Panels) {
      std::memset(scratch.sums[p], 0, static_cast<std::size_t>(x.rows) * Panels * kPanelRows * sizeof(float));
    }
    Scaling<Panels> last;
    for (std::int64_t chunk = 0; chunk < w.depth.chunks; ++chunk) {
      const std::int64_t steps = ceil_div(w.depth.length_of(chunk), kTileDepth);
      const std::int64_t block = w.depth.block_of(chunk);
      for (std::int64_t first = 0; first < panels; first += kWidth) {
        const std::int64_t stop = first + kWidth < panels ? first + kWidth : panels;
        const bool ask = Schedule<batch>::kAsks && stop == panels;
        const std::uint16_t* next = ask ? x.values_of(chunk + 1 < w.depth.chunks ? chunk + 1 : 0, 0) : nullptr;
        for (std::int64_t row = 0; row < x.rows; row += kVisitRows) {
          const std::int64_t rows = x.rows - row < kVisitRows ? x.rows - row : kVisitRows;
          for (std::int64_t p = first; p < stop; p += Panels) {
            const std::int64_t tile = 2 * (p - first) * steps;
            if (Schedule<batch>::kOneRowTile || (Schedule<batch>::kShared && rows <= kTile)) {
              visit<1>(x.values_of(chunk, row), next, steps, tile, weights, last, scratch.partial);
            } else if constexpr (!Schedule<batch>::kOneRowTile) {
              visit<2>(x.values_of(chunk, row), next, steps, tile, weights, last, scratch.partial);
            }
            float w_scale[Panels];
            for (int i = 0; i < Panels; ++i) w_scale[i] = w.scales_of(group + p + i)[block];
            last = Scaling<Panels>(scratch.partial, rows, x.scales_of(chunk, row), w_scale,
                                   scratch.sums[p] + row * Panels * kPanelRows);
          }
        }
        weights.leave(2 * (stop - first) * steps);
      }
    }
    last.finish();
    for (std::int64_t p = 0; p < panels; ++p) {
      store_panel(problem, group + p, scratch.sums[p - p % Panels] + p % Panels * kPanelRows, Panels * kPanelRows, 0,
                  x.rows);
    }
  }
}

// Two panels at once, and a last one alone.
template <Batch batch, class Decoder>
void linear_in_pairs(const Problem& problem, std::int64_t begin, std::int64_t end, const Decoder& decode,
                     AmxScratch& scratch) {
  const std::int64_t pairs_end = end - (end - begin) % 2;
  linear_in_tiles<batch, 2>(problem, begin, pairs_end, decode, scratch);
  linear_in_tiles<batch, 1>(problem, pairs_end, end, decode, scratch);
}

void linear(const Problem& problem, std::int64_t begin, std::int64_t end, void* memory) {
  auto& scratch = *static_cast<AmxScratch*>(memory);
  const std::int64_t rows = problem.activation.rows;
  const TileSession session(rows < kTile ? rows : kTile);
  with_scaled_decoder(problem.weight, begin, end, [&](const auto& decode) {
    if (rows <= 4) return linear_in_pairs<Batch::upto_4>(problem, begin, end, decode, scratch);
    if (rows <= kTile) return linear_in_pairs<Batch::upto_16>(problem, begin, end, decode, scratch);
    if (rows <= kVisitRows) return linear_in_tiles<Batch::upto_32, 1>(problem, begin, end, decode, scratch);
    if (rows <= 128) return linear_in_tiles<Batch::upto_128, 1>(problem, begin, end, decode, scratch);
    return linear_in_tiles<Batch::longer, 1>(problem, begin, end, decode, scratch);
  });
}

}  // namespace

constexpr Kernels kAmxKernels = [] {
  Kernels kernels = run_kernels();
  kernels.weight_exponent = ArithmeticDecoder::kExponent;
  kernels.linear = linear;
  kernels.scratch_bytes = sizeof(AmxScratch);
  kernels.max_rows = kAmxRows;
  return kernels;
}();

}  // namespace qwen3_fp8_ascend::cpu
