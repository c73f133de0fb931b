// Block-scaled linear with AVX-512 VBMI and BF16.
//
// Few rows: weights are decoded in registers and used at once. Many rows: a tile of one chunk x 64 weight rows is
// decoded into L1 and used for all of them. Between them, on some cores: a chunk is decoded in registers again for each
// group of rows. In all, each output is one chain of vdpbf16ps per chunk in the order
// of k, so that its bits depend neither on the number of rows nor on the number of threads.
#pragma once

#include "decode_avx512.h"
#include "runs.h"

namespace qwen3_fp8_ascend::cpu {
namespace {

constexpr int kTilePanels = 2;
constexpr int kTileColumns = kTilePanels * kPanelRows;
constexpr int kTileRows = 6;
constexpr std::int64_t kMostTileRows = 516;  // whole groups of kTileRows, and 512 rows at once

struct Avx512Scratch {
  alignas(64) std::uint16_t weights[kChunk / 2][kTileColumns * 2];  // [pair of k][weight row][2]
  alignas(64) float sums[kMostTileRows][kTileColumns];
};

inline __m512bh as_bf16(__m512i bits) { return reinterpret_cast<__m512bh>(bits); }

inline __m512 dot_pair(__m512 sum, __m512i weights, std::int32_t x_pair) {
  return _mm512_dpbf16_ps(sum, as_bf16(weights), as_bf16(_mm512_set1_epi32(x_pair)));
}

inline std::int32_t load_pair(const std::uint16_t* values) {
  std::int32_t pair;
  std::memcpy(&pair, values, sizeof pair);
  return pair;
}

// One chunk of `Panels` panels.
template <int Panels>
struct Chunk {
  const std::uint8_t* codes[Panels];
  float w_scale[Panels];
  std::int64_t offset;  // of its codes in a panel
  std::int64_t quads;
};

template <int Panels>
[[gnu::always_inline]] inline Chunk<Panels> chunk_of(const Weight& w, std::int64_t panel, std::int64_t number) {
  Chunk<Panels> chunk;
  chunk.offset = w.depth.start_of(number) * kPanelRows;
  chunk.quads = (w.depth.length_of(number) + 3) / 4;
  for (int p = 0; p < Panels; ++p) {
    chunk.codes[p] = w.codes_of(panel + p) + chunk.offset;
    chunk.w_scale[p] = w.scales_of(panel + p)[w.depth.block_of(number)];
  }
  return chunk;
}

// One chunk times `Rows` activation rows, scaled and added to `sums`. `ask` is called before each quad of each panel,
// with its codes and its number.
template <int Rows, int Panels, class Decoder, class Ask>
[[gnu::always_inline]] inline void multiply_chunk(const Chunk<Panels>& chunk, const std::uint16_t* values,
                                                  const float* x_scales, float (*sums)[Panels][kPanelRows],
                                                  const Decoder& decode, const Ask& ask) {
  __m512 partial[Rows][Panels][2];
#pragma GCC unroll 12
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 2
    for (int p = 0; p < Panels; ++p) partial[r][p][0] = partial[r][p][1] = _mm512_setzero_ps();
  }
  for (std::int64_t quad = 0; quad < chunk.quads; ++quad) {
#pragma GCC unroll 2
    for (int p = 0; p < Panels; ++p) {
      const std::uint8_t* source = chunk.codes[p] + quad * kQuadBytes;
      ask(source, quad);
      const HalfQuad top = decode(source);
      const HalfQuad bottom = decode(source + kQuadBytes / 2);
#pragma GCC unroll 12
      for (int r = 0; r < Rows; ++r) {
        const std::int32_t x0 = load_pair(values + r * kChunk + quad * 4);
        const std::int32_t x1 = load_pair(values + r * kChunk + quad * 4 + 2);
        partial[r][p][0] = dot_pair(partial[r][p][0], top.pair0, x0);
        partial[r][p][1] = dot_pair(partial[r][p][1], bottom.pair0, x0);
        partial[r][p][0] = dot_pair(partial[r][p][0], top.pair1, x1);
        partial[r][p][1] = dot_pair(partial[r][p][1], bottom.pair1, x1);
      }
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < Rows; ++r) {
    const __m512 x_scale = _mm512_set1_ps(x_scales[r]);
#pragma GCC unroll 2
    for (int p = 0; p < Panels; ++p) {
      const __m512 w_scale = _mm512_set1_ps(chunk.w_scale[p]);
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        float* sum = sums[r][p] + half * kHalf;
        const __m512 scaled = _mm512_mul_ps(partial[r][p][half], x_scale);
        _mm512_store_ps(sum, _mm512_fmadd_ps(scaled, w_scale, _mm512_load_ps(sum)));
      }
    }
  }
}

template <auto Hint>  // g++ has an enumeration for it, clang an int
[[gnu::always_inline]] inline void prefetch_quad(const std::uint8_t* codes) {
  _mm_prefetch(reinterpret_cast<const char*>(codes), Hint);
  _mm_prefetch(reinterpret_cast<const char*>(codes + kLine), Hint);
}

// Asks for codes Core::kAhead bytes before use and, with several rows, into L2 Core::kFarAhead before. Past a panel's
// end follows the panel that takes its place, not its neighbour, which is read beside it. (A lambda would not do: g++
// drops calls of a function that only prefetches, unless it is inlined always.)
template <class Core, int Panels, bool Far>
struct AskForCodes {
  std::int64_t offset;  // of the chunk in its panel
  std::int64_t panel_bytes;

  [[gnu::always_inline]] std::int64_t past_end(std::int64_t at) const {
    return at < panel_bytes ? 0 : (Panels - 1) * panel_bytes;
  }

  [[gnu::always_inline]] void operator()(const std::uint8_t* source, std::int64_t quad) const {
    const std::int64_t at = offset + quad * kQuadBytes;
    prefetch_quad<_MM_HINT_T0>(source + Core::kAhead + past_end(at + Core::kAhead));
    if constexpr (Far && Core::kFarAhead > 0) {
      prefetch_quad<_MM_HINT_T1>(source + Core::kFarAhead + past_end(at + Core::kFarAhead));
    }
  }
};

struct AskForNothing {
  [[gnu::always_inline]] void operator()(const std::uint8_t*, std::int64_t) const {}
};

// All activation rows (exactly `Rows`) times `Panels` panels, whose codes are asked for ahead, and the first lines of a
// chunk when the one before it begins.
template <int Rows, int Panels, class Core, class Decoder>
void multiply_in_registers(const Problem& problem, std::int64_t panel, const Decoder& decode) {
  const Weight& w = problem.weight;
  const Activation& x = problem.activation;
  alignas(64) float sums[Rows][Panels][kPanelRows] = {};
  const std::int64_t panel_bytes = w.depth.padded() * kPanelRows;
  for (std::int64_t number = 0; number < w.depth.chunks; ++number) {
    const Chunk<Panels> chunk = chunk_of<Panels>(w, panel, number);
    const AskForCodes<Core, Panels, (Rows > 1)> ask{chunk.offset, panel_bytes};
    const std::int64_t size = chunk.quads * kQuadBytes;
#pragma GCC unroll 2
    for (int p = 0; p < Panels; ++p) {
      const std::uint8_t* next = chunk.codes[p] + size + ask.past_end(chunk.offset + size);
#pragma GCC unroll 2
      for (int line = 0; line < Core::kEarlyLines; ++line) {
        _mm_prefetch(reinterpret_cast<const char*>(next + line * kLine), _MM_HINT_T1);
      }
    }
    multiply_chunk<Rows>(chunk, x.values_of(number, 0), x.scales_of(number, 0), sums, decode, ask);
  }
  for (int p = 0; p < Panels; ++p) store_panel(problem, panel + p, sums[0][p], Panels * kPanelRows, 0, Rows);
}

// At most `Rows` rows, and `Panels` panels at a time.
template <int Rows, int Panels, class Core, class Decoder>
void linear_in_registers(const Problem& problem, std::int64_t begin, std::int64_t end, const Decoder& decode) {
  if constexpr (Rows > 1) {
    if (problem.activation.rows < Rows) {
      return linear_in_registers<Rows - 1, Panels, Core>(problem, begin, end, decode);
    }
  }
  std::int64_t panel = begin;
  for (; panel + Panels <= end; panel += Panels) multiply_in_registers<Rows, Panels, Core>(problem, panel, decode);
  for (; panel < end; ++panel) multiply_in_registers<Rows, 1, Core>(problem, panel, decode);
}

// The activation rows in groups of `Rows`, and of one less behind them, times one panel: each chunk is decoded again
// for each group, from L1. Only the first group asks for codes.
template <int Rows, class Core, class Decoder>
void multiply_in_groups(const Problem& problem, std::int64_t panel, const Decoder& decode,
                        float (*sums)[1][kPanelRows]) {
  const Weight& w = problem.weight;
  const Activation& x = problem.activation;
  const std::int64_t groups = ceil_div(x.rows, Rows);
  const std::int64_t rows_of_whole = (x.rows - groups * (Rows - 1)) * Rows;
  std::memset(sums, 0, static_cast<std::size_t>(x.rows) * sizeof *sums);
  for (std::int64_t number = 0; number < w.depth.chunks; ++number) {
    const Chunk<1> chunk = chunk_of<1>(w, panel, number);
    const std::uint16_t* values = x.values_of(number, 0);
    const float* scales = x.scales_of(number, 0);
    const AskForCodes<Core, 1, true> ask{};  // one panel has no neighbour
    multiply_chunk<Rows>(chunk, values, scales, sums, decode, ask);
    std::int64_t row = Rows;
    for (; row < rows_of_whole; row += Rows) {
      multiply_chunk<Rows>(chunk, values + row * kChunk, scales + row, sums + row, decode, AskForNothing{});
    }
    for (; row < x.rows; row += Rows - 1) {
      multiply_chunk<Rows - 1>(chunk, values + row * kChunk, scales + row, sums + row, decode, AskForNothing{});
    }
  }
  store_panel(problem, panel, sums[0][0], kPanelRows, 0, x.rows);
}

// More rows than `Most`, in as few groups of at most `Most` rows as there can be.
template <int Most, class Core, class Decoder, int Rows = Most>
void linear_in_groups(const Problem& problem, std::int64_t begin, std::int64_t end, const Decoder& decode,
                      Avx512Scratch& scratch) {
  if constexpr (2 * (Rows - 1) > Most) {  // a group of fewer would need no second one
    const std::int64_t rows = problem.activation.rows;
    if (ceil_div(rows, ceil_div(rows, Most)) < Rows) {
      return linear_in_groups<Most, Core, Decoder, Rows - 1>(problem, begin, end, decode, scratch);
    }
  }
  auto* sums = reinterpret_cast<float (*)[1][kPanelRows]>(scratch.sums);
  for (std::int64_t panel = begin; panel < end; ++panel) multiply_in_groups<Rows, Core>(problem, panel, decode, sums);
}

// Decodes a chunk of `panels` panels; the second of one panel is left as it was.
template <class Decoder>
void decode_tile(const Weight& w, std::int64_t panel, int panels, std::int64_t chunk, const Decoder& decode,
                 std::uint16_t (*out)[kTileColumns * 2]) {
  const std::int64_t quads = (w.depth.length_of(chunk) + 3) / 4;
  for (int p = 0; p < panels; ++p) {
    const std::uint8_t* source = w.codes_of(panel + p) + w.depth.start_of(chunk) * kPanelRows;
    for (std::int64_t quad = 0; quad < quads; ++quad) {
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const HalfQuad decoded = decode(source + quad * kQuadBytes + half * kQuadBytes / 2);
        const int column = (p * 2 + half) * 2 * kHalf;
        _mm512_store_si512(out[2 * quad] + column, decoded.pair0);
        _mm512_store_si512(out[2 * quad + 1] + column, decoded.pair1);
      }
    }
  }
}

struct Prefetch {
  const std::uint8_t* source[kTilePanels];  // the next tile's codes, or any readable address
};

struct TileStep {
  const std::uint16_t (*weights)[kTileColumns * 2];
  const std::uint16_t* x;
  std::int64_t pairs;
  const float* x_scale;
  const float* w_scale;  // of each panel
  float (*sums)[kTileColumns];
};

// `Rows` activation rows times the decoded tile, scaled and added to `sums`.
template <int Rows, bool Ahead>
void multiply_tile(const TileStep& step, const Prefetch& next) {
  __m512 partial[Rows][4];
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) partial[r][v] = _mm512_setzero_ps();
  }
  for (std::int64_t pair = 0; pair < step.pairs; ++pair) {
    if constexpr (Ahead) {
      for (const std::uint8_t* source : next.source) {
        _mm_prefetch(reinterpret_cast<const char*>(source + pair * 64), _MM_HINT_T0);
      }
    }
    __m512i b[4];
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) b[v] = _mm512_load_si512(step.weights[pair] + v * 2 * kHalf);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const std::int32_t x_pair = load_pair(step.x + r * kChunk + 2 * pair);
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) partial[r][v] = dot_pair(partial[r][v], b[v], x_pair);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
    const __m512 row_scale = _mm512_set1_ps(step.x_scale[r]);
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      const __m512 scaled = _mm512_mul_ps(partial[r][v], row_scale);
      float* sum = step.sums[r] + v * kHalf;
      _mm512_store_ps(sum, _mm512_fmadd_ps(scaled, _mm512_set1_ps(step.w_scale[v / 2]), _mm512_load_ps(sum)));
    }
  }
}

inline void multiply_rest(const TileStep& step, std::int64_t rows, const Prefetch& next) {
  switch (rows) {
    case 1: return multiply_tile<1, false>(step, next);
    case 2: return multiply_tile<2, false>(step, next);
    case 3: return multiply_tile<3, false>(step, next);
    case 4: return multiply_tile<4, false>(step, next);
    case 5: return multiply_tile<5, false>(step, next);
    default: return;
  }
}

// Past the last rows of a chunk, the first of the next one follow.
inline void prefetch_rows(const std::uint16_t* values) {
  for (int at = 0; at < kTileRows * kChunk; at += kLine / static_cast<int>(sizeof *values)) {
    _mm_prefetch(reinterpret_cast<const char*>(values + at), _MM_HINT_T0);
  }
}

// At most kMostTileRows rows.
template <class Decoder>
void linear_in_tiles(const Problem& problem, std::int64_t begin, std::int64_t end, const Decoder& decode,
                     Avx512Scratch& scratch) {
  const Weight& w = problem.weight;
  const Activation& x = problem.activation;
  for (std::int64_t panel = begin; panel < end; panel += kTilePanels) {
    const int panels = end - panel < kTilePanels ? 1 : kTilePanels;
    std::memset(scratch.sums, 0, static_cast<std::size_t>(x.rows) * sizeof scratch.sums[0]);
    for (std::int64_t chunk = 0; chunk < w.depth.chunks; ++chunk) {
      decode_tile(w, panel, panels, chunk, decode, scratch.weights);
      const std::int64_t pairs = (w.depth.length_of(chunk) + 3) / 4 * 2;
      const std::int64_t block = w.depth.block_of(chunk);
      const float w_scale[kTilePanels] = {w.scales_of(panel)[block], w.scales_of(panel + panels - 1)[block]};
      // Past the last chunk of a panel, the next panel's codes follow.
      Prefetch next;
      const std::int64_t ahead = (w.depth.start_of(chunk) + w.depth.length_of(chunk)) * kPanelRows;
      next.source[0] = w.codes_of(panel) + ahead;
      next.source[1] = w.codes_of(panel + panels - 1) + ahead;
      const auto step_of = [&](std::int64_t row) {
        return TileStep{scratch.weights, x.values_of(chunk, row), pairs, x.scales_of(chunk, row),
                        w_scale,         scratch.sums + row};
      };
      std::int64_t row = 0;
      for (; row + kTileRows <= x.rows; row += kTileRows) {
        prefetch_rows(x.values_of(chunk, row + kTileRows));
        if (row == 0) {
          multiply_tile<kTileRows, true>(step_of(row), next);
        } else {
          multiply_tile<kTileRows, false>(step_of(row), next);
        }
      }
      multiply_rest(step_of(row), x.rows - row, next);
    }
    for (int p = 0; p < panels; ++p) {
      store_panel(problem, panel + p, scratch.sums[0] + p * kPanelRows, kTileColumns, 0, x.rows);
    }
  }
}

// The multiplier's limit: more chains than a product takes cycles, and nothing else.
inline void multiply_add(std::int64_t count) {
  constexpr int kChains = 16;
  constexpr int kProducts = 2 * kHalf;             // of one instruction
  const __m512i half = _mm512_set1_epi16(0x3f00);  // 0.5 in bf16
  __m512 chain[kChains];
#pragma GCC unroll 16
  for (int i = 0; i < kChains; ++i) chain[i] = _mm512_setzero_ps();
  for (std::int64_t done = 0; done < count; done += kChains * kProducts) {
#pragma GCC unroll 16
    for (int i = 0; i < kChains; ++i) {
      chain[i] = _mm512_dpbf16_ps(chain[i], as_bf16(half), as_bf16(half));
      asm volatile("" : "+v"(chain[i]));  // the result is wanted, as far as the compiler knows
    }
  }
}

}  // namespace
}  // namespace qwen3_fp8_ascend::cpu
