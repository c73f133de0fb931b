// Products with a decoded chunk in AVX2.
//
// x is repeated in pairs to match a group of weights; each output is one chain of multiply-adds for even k and one for
// odd k, added at the end of a chunk. So a row's bits depend on no other row, and not on how many there are.
#pragma once

#include "decode_avx2.h"

namespace qwen3_fp8_ascend::cpu {
namespace {

constexpr int kTileRows = 6;
constexpr int kLine = 64;

[[gnu::always_inline]] inline void prefetch(const std::uint8_t* codes) {
  _mm_prefetch(reinterpret_cast<const char*>(codes), _MM_HINT_T0);
}

// Two consecutive activations, repeated to match a group.
inline __m256 repeat_pair(const float* x) {
  return _mm256_castpd_ps(_mm256_broadcast_sd(reinterpret_cast<const double*>(x)));
}

// The sum of each pair of two groups.
inline __m256 add_pairs(__m256 a, __m256 b) {
  const __m256 sums = _mm256_hadd_ps(a, b);  // two of a, two of b, two of a, two of b
  return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(sums), _MM_SHUFFLE(3, 1, 2, 0)));
}

// A decoded chunk of a panel, and what it is multiplied with and added to.
template <class Number>
struct Operands {
  const Number (*weights)[kGroups][2 * kGroupRows];
  std::int64_t quads;
  const float (*x)[kChunk];
  const float* x_scale;
  float w_scale;
  float (*sums)[kPanelRows];

  Operands from_row(std::int64_t row) const { return {weights, quads, x + row, x_scale + row, w_scale, sums + row}; }
};

// What is done beside the products of a part of the panel, quad by quad, so that it takes none of their time:
// nothing, prefetching, or decoding. Inlined always: g++ drops calls of a function that does nothing but prefetch.
struct Nothing {
  template <int Groups>
  [[gnu::always_inline]] void beside(int, std::int64_t) const {}
};

// Codes that will be wanted soon: a chunk's, in equal parts.
struct Prefetch {
  const std::uint8_t* codes;

  template <int Groups>
  [[gnu::always_inline]] void beside(int group, std::int64_t quad) const {
    const std::uint8_t* part = codes + group * (kGroupBytes * kChunk / 4) + quad * (kGroupBytes * Groups);
#pragma GCC unroll 2
    for (int at = 0; at < kGroupBytes * Groups; at += kLine) prefetch(part + at);
  }
};

// The next chunk to multiply, which has as many quads and no NaN, and prefetching of the one after it.
struct DecodeNext {
  const std::uint8_t* codes;
  std::uint16_t (*out)[kGroups][2 * kGroupRows];
  const DecodeMasks& masks;
  Prefetch later;

  template <int Groups>
  [[gnu::always_inline]] void beside(int group, std::int64_t quad) const {
    later.beside<Groups>(group, quad);
#pragma GCC unroll 4
    for (int g = group; g < group + Groups; g += 2) {
      store_groups(decode<false>(codes + quad * kQuadBytes + g * kGroupBytes, masks), g, out + 2 * quad);
    }
  }
};

// One pair of k: whichever is less, activations or weights, is kept in registers.
template <int Rows, int Groups, class Number>
void multiply_pair(const Number (*weights)[2 * kGroupRows], const float (*x)[kChunk], std::int64_t k,
                   __m256 (&partial)[Rows][Groups]) {
  if constexpr (Rows <= Groups) {
    __m256 value[Rows];
#pragma GCC unroll 6
    for (int r = 0; r < Rows; ++r) value[r] = repeat_pair(x[r] + k);
#pragma GCC unroll 8
    for (int g = 0; g < Groups; ++g) {
      const __m256 w = load_group(weights[g]);
#pragma GCC unroll 6
      for (int r = 0; r < Rows; ++r) partial[r][g] = _mm256_fmadd_ps(w, value[r], partial[r][g]);
    }
  } else {
    __m256 w[Groups];
#pragma GCC unroll 8
    for (int g = 0; g < Groups; ++g) w[g] = load_group(weights[g]);
#pragma GCC unroll 6
    for (int r = 0; r < Rows; ++r) {
      const __m256 value = repeat_pair(x[r] + k);
#pragma GCC unroll 8
      for (int g = 0; g < Groups; ++g) partial[r][g] = _mm256_fmadd_ps(w[g], value, partial[r][g]);
    }
  }
}

// sum += (partial * 2^8) * x_scale * w_scale for two groups.
inline void scale_and_add(__m256 a, __m256 b, float x_scale, float w_scale, float* sum) {
  const __m256 exact = _mm256_mul_ps(add_pairs(a, b), _mm256_set1_ps(kDecodeFactor));
  const __m256 scaled = _mm256_mul_ps(exact, _mm256_set1_ps(x_scale));
  _mm256_store_ps(sum, _mm256_fmadd_ps(scaled, _mm256_set1_ps(w_scale), _mm256_load_ps(sum)));
}

// `Rows` rows times `Groups` groups from `group` on, scaled and added to the sums.
template <int Rows, int Groups, class Number, class Work>
void multiply_groups(const Operands<Number>& o, int group, const Work& work) {
  __m256 partial[Rows][Groups];
#pragma GCC unroll 6
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
    for (int g = 0; g < Groups; ++g) partial[r][g] = _mm256_setzero_ps();
  }
  for (std::int64_t quad = 0; quad < o.quads; ++quad) {
    work.template beside<Groups>(group, quad);
    multiply_pair<Rows, Groups>(o.weights[2 * quad] + group, o.x, 4 * quad, partial);
    multiply_pair<Rows, Groups>(o.weights[2 * quad + 1] + group, o.x, 4 * quad + 2, partial);
  }
#pragma GCC unroll 6
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
    for (int g = 0; g < Groups; g += 2) {
      float* sum = o.sums[r] + (group + g) * kGroupRows;
      scale_and_add(partial[r][g], partial[r][g + 1], o.x_scale[r], o.w_scale, sum);
    }
  }
}

// `Rows` rows times the whole panel, by as many groups as registers hold sums for.
template <int Rows, class Number, class Work>
void multiply_panel(const Operands<Number>& o, const Work& work) {
  constexpr int kAtOnce = Rows == 1 ? 8 : Rows <= 3 ? 4 : 2;
#pragma GCC unroll 1
  for (int group = 0; group < kGroups; group += kAtOnce) multiply_groups<Rows, kAtOnce>(o, group, work);
}

// How many of `rows` rows the next tile takes. Ten are two tiles of five: a multiply-add takes four cycles and two
// begin in each, so that the eight sums of a tile of four have no time to spare.
inline std::int64_t tile_rows(std::int64_t rows) {
  if (rows == 10) return 5;
  return rows < kTileRows ? rows : kTileRows;
}

// The first of `rows` rows, at most a tile of them; returns how many.
template <class Number, class Work>
std::int64_t multiply_tile(const Operands<Number>& o, std::int64_t rows, const Work& work) {
  const std::int64_t taken = tile_rows(rows);
  switch (taken) {
    case 1: multiply_panel<1>(o, work); break;
    case 2: multiply_panel<2>(o, work); break;
    case 3: multiply_panel<3>(o, work); break;
    case 4: multiply_panel<4>(o, work); break;
    case 5: multiply_panel<5>(o, work); break;
    default: multiply_panel<kTileRows>(o, work); break;
  }
  return taken;
}

// One row: each quad is decoded, into `half`, while the one before it is multiplied.
template <bool HasNan>
void multiply_row(const Operands<std::uint16_t>& o, const std::uint8_t* codes, Decoded<std::uint16_t>& half,
                  const Prefetch& ahead) {
  const DecodeMasks masks;
  __m256 partial[1][kGroups];
#pragma GCC unroll 8
  for (int g = 0; g < kGroups; ++g) partial[0][g] = _mm256_setzero_ps();
  decode_quad<HasNan>(codes, masks, half);
  for (std::int64_t quad = 0; quad < o.quads; ++quad) {
    ahead.beside<kGroups>(0, quad);
    if (quad + 1 < o.quads) decode_quad<HasNan>(codes + (quad + 1) * kQuadBytes, masks, half + 2 * (quad + 1));
    multiply_pair<1, kGroups>(half[2 * quad], o.x, 4 * quad, partial);
    multiply_pair<1, kGroups>(half[2 * quad + 1], o.x, 4 * quad + 2, partial);
  }
#pragma GCC unroll 4
  for (int g = 0; g < kGroups; g += 2) {
    scale_and_add(partial[0][g], partial[0][g + 1], o.x_scale[0], o.w_scale, o.sums[0] + g * kGroupRows);
  }
}

// The multiplier's limit: as many chains as a tile has, and nothing else. 1 = 0.5 * 1 + 0.5 stays an ordinary number.
inline void multiply_add(std::int64_t count) {
  constexpr int kChains = 12;
  constexpr int kLanes = 8;
  const __m256 half = _mm256_set1_ps(0.5f);
  __m256 chain[kChains];
#pragma GCC unroll 12
  for (int i = 0; i < kChains; ++i) chain[i] = _mm256_set1_ps(1.0f);
  for (std::int64_t done = 0; done < count; done += kChains * kLanes) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) {
      chain[i] = _mm256_fmadd_ps(chain[i], half, half);
      asm volatile("" : "+x"(chain[i]));  // the result is wanted, as far as the compiler knows
    }
  }
}

}  // namespace
}  // namespace qwen3_fp8_ascend::cpu
