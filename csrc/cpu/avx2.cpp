// The kernels for AVX2, FMA and F16C: any x86-64 server since 2013.
//
// (code & 0x7f) << 7 with the sign on top is the fp16 number code * 2^-8, subnormals included; F16C makes it fp32.
// An fp32 register holds a pair of k for each of four rows: x is repeated to match, and the pairs are added at the end.
#include <immintrin.h>

#include "runs.h"

namespace qwen3_fp8_ascend::cpu {
namespace {

constexpr float kDecodeFactor = 256.0f;  // undoes the 2^-8 of the decoded numbers
constexpr int kGroups = kPanelRows / 4;  // registers of one panel: four rows each
constexpr std::int64_t kMaxRows = 256;
constexpr std::int64_t kMaxRegisterRows = 1;

// Four rows at (k, k + 1) and at (k + 2, k + 3).
struct Lane {
  __m256 pair0;
  __m256 pair1;
};

// 32 codes: two lanes of four rows each.
struct TwoLanes {
  Lane first;
  Lane second;
};

// The fp16 numbers of all ones (480 * 2^-8) are what NaN codes become.
inline __m256i restore_nan(__m256i half) {
  const __m256i ones = _mm256_set1_epi16(0x3f80);
  const __m256i is_nan = _mm256_cmpeq_epi16(_mm256_and_si256(half, ones), ones);
  return _mm256_or_si256(half, _mm256_and_si256(is_nan, _mm256_set1_epi16(0x7e00)));
}

template <bool HasNan>
TwoLanes decode(const std::uint8_t* codes) {
  const __m256i code = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
  // An arithmetic shift doubles the sign; the mask clears its copy and what is left of the neighbouring byte.
  const __m256i mask = _mm256_set1_epi16(static_cast<short>(0xbf80));
  __m256i even = _mm256_and_si256(_mm256_srai_epi16(_mm256_slli_epi16(code, 8), 1), mask);
  __m256i odd = _mm256_and_si256(_mm256_srai_epi16(code, 1), mask);
  if constexpr (HasNan) {
    even = restore_nan(even);
    odd = restore_nan(odd);
  }
  return {{_mm256_cvtph_ps(_mm256_castsi256_si128(even)), _mm256_cvtph_ps(_mm256_castsi256_si128(odd))},
          {_mm256_cvtph_ps(_mm256_extracti128_si256(even, 1)), _mm256_cvtph_ps(_mm256_extracti128_si256(odd, 1))}};
}

// Decoding takes so many instructions that the processor's window ends a few cache lines ahead: too few loads would be
// under way to keep the memory busy.
inline void prefetch(const std::uint8_t* codes) {
  constexpr int kAhead = 4096;
  _mm_prefetch(reinterpret_cast<const char*>(codes + kAhead), _MM_HINT_T0);
  _mm_prefetch(reinterpret_cast<const char*>(codes + kAhead + 64), _MM_HINT_T0);
}

// Four consecutive activations, repeated to match Lane.
inline Lane repeat(const float* x) {
  return {_mm256_castpd_ps(_mm256_broadcast_sd(reinterpret_cast<const double*>(x))),
          _mm256_castpd_ps(_mm256_broadcast_sd(reinterpret_cast<const double*>(x + 2)))};
}

// The sum of each pair.
inline __m128 add_pairs(__m256 v) {
  const __m128 low = _mm256_castps256_ps128(v);
  const __m128 high = _mm256_extractf128_ps(v, 1);
  const __m128 even = _mm_shuffle_ps(low, high, _MM_SHUFFLE(2, 0, 2, 0));
  const __m128 odd = _mm_shuffle_ps(low, high, _MM_SHUFFLE(3, 1, 3, 1));
  return _mm_add_ps(even, odd);
}

struct Scratch {
  alignas(64) float x[kMaxRows][kChunk];               // one chunk of activations as fp32
  alignas(64) float weights[kChunk / 4][kGroups][16];  // one decoded chunk: [quad][lane][pair 0, pair 1]
  alignas(64) float sums[kMaxRows][kPanelRows];
};

// sum += (partial * 2^8) * x_scale * w_scale for four rows.
inline void scale_and_add(__m256 partial, float x_scale, float w_scale, float* sum) {
  const __m128 exact = _mm_mul_ps(add_pairs(partial), _mm_set1_ps(kDecodeFactor));
  const __m128 scaled = _mm_mul_ps(exact, _mm_set1_ps(x_scale));
  _mm_store_ps(sum, _mm_fmadd_ps(scaled, _mm_set1_ps(w_scale), _mm_load_ps(sum)));
}

inline void widen_chunk(const Activation& x, std::int64_t chunk, std::int64_t length, float (*out)[kChunk]) {
  for (std::int64_t row = 0; row < x.rows; ++row) {
    load_run(x.values_of(chunk, row), Dtype::bf16, 0, (length + 3) / 4 * 4, out[row]);
  }
}

// One row: decoded in registers.
template <bool HasNan>
void multiply_row(const std::uint8_t* codes, const float* x, std::int64_t quads, float x_scale, float w_scale,
                  float* sums) {
  __m256 partial[kGroups];
#pragma GCC unroll 8
  for (int g = 0; g < kGroups; ++g) partial[g] = _mm256_setzero_ps();
  for (std::int64_t quad = 0; quad < quads; ++quad) {
    prefetch(codes + quad * kQuadBytes);
    const Lane value = repeat(x + quad * 4);
#pragma GCC unroll 4
    for (int g = 0; g < kGroups; g += 2) {
      const TwoLanes w = decode<HasNan>(codes + quad * kQuadBytes + g * 16);
      partial[g] = _mm256_fmadd_ps(w.first.pair0, value.pair0, partial[g]);
      partial[g + 1] = _mm256_fmadd_ps(w.second.pair0, value.pair0, partial[g + 1]);
      partial[g] = _mm256_fmadd_ps(w.first.pair1, value.pair1, partial[g]);
      partial[g + 1] = _mm256_fmadd_ps(w.second.pair1, value.pair1, partial[g + 1]);
    }
  }
#pragma GCC unroll 8
  for (int g = 0; g < kGroups; ++g) scale_and_add(partial[g], x_scale, w_scale, sums + g * 4);
}

template <bool HasNan>
void decode_chunk(const std::uint8_t* codes, std::int64_t quads, float (*out)[kGroups][16]) {
  for (std::int64_t quad = 0; quad < quads; ++quad) {
    prefetch(codes + quad * kQuadBytes);
#pragma GCC unroll 4
    for (int g = 0; g < kGroups; g += 2) {
      const TwoLanes w = decode<HasNan>(codes + quad * kQuadBytes + g * 16);
      _mm256_store_ps(out[quad][g], w.first.pair0);
      _mm256_store_ps(out[quad][g] + 8, w.first.pair1);
      _mm256_store_ps(out[quad][g + 1], w.second.pair0);
      _mm256_store_ps(out[quad][g + 1] + 8, w.second.pair1);
    }
  }
}

// `Rows` rows times four of the eight groups of a decoded chunk.
template <int Rows>
void multiply_half(const float (*weights)[kGroups][16], int group, const float (*x)[kChunk], std::int64_t quads,
                   const float* x_scale, float w_scale, float (*sums)[kPanelRows]) {
  __m256 partial[Rows][4];
#pragma GCC unroll 2
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
    for (int g = 0; g < 4; ++g) partial[r][g] = _mm256_setzero_ps();
  }
  for (std::int64_t quad = 0; quad < quads; ++quad) {
#pragma GCC unroll 2
    for (int r = 0; r < Rows; ++r) {
      const Lane value = repeat(x[r] + quad * 4);
#pragma GCC unroll 4
      for (int g = 0; g < 4; ++g) {
        const float* w = weights[quad][group + g];
        partial[r][g] = _mm256_fmadd_ps(_mm256_load_ps(w), value.pair0, partial[r][g]);
        partial[r][g] = _mm256_fmadd_ps(_mm256_load_ps(w + 8), value.pair1, partial[r][g]);
      }
    }
  }
#pragma GCC unroll 2
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
    for (int g = 0; g < 4; ++g) scale_and_add(partial[r][g], x_scale[r], w_scale, sums[r] + (group + g) * 4);
  }
}

void multiply_rows(const Scratch& scratch, std::int64_t rows, std::int64_t quads, const float* x_scale, float w_scale,
                   float (*sums)[kPanelRows]) {
  for (int group = 0; group < kGroups; group += 4) {
    std::int64_t row = 0;
    for (; row + 2 <= rows; row += 2) {
      multiply_half<2>(scratch.weights, group, scratch.x + row, quads, x_scale + row, w_scale, sums + row);
    }
    if (row < rows) {
      multiply_half<1>(scratch.weights, group, scratch.x + row, quads, x_scale + row, w_scale, sums + row);
    }
  }
}

template <bool HasNan>
void linear_panel(const Problem& problem, std::int64_t panel, Scratch& scratch) {
  const Weight& w = problem.weight;
  const Activation& x = problem.activation;
  std::memset(scratch.sums, 0, static_cast<std::size_t>(x.rows) * sizeof scratch.sums[0]);
  for (std::int64_t chunk = 0; chunk < w.depth.chunks; ++chunk) {
    const std::int64_t length = w.depth.length_of(chunk);
    const std::int64_t quads = (length + 3) / 4;
    const std::uint8_t* codes = w.codes_of(panel) + w.depth.start_of(chunk) * kPanelRows;
    const float w_scale = w.scales_of(panel)[w.depth.block_of(chunk)];
    const float* x_scale = x.scales_of(chunk, 0);
    widen_chunk(x, chunk, length, scratch.x);
    if (problem.path == Path::registers) {
      multiply_row<HasNan>(codes, scratch.x[0], quads, x_scale[0], w_scale, scratch.sums[0]);
    } else {
      decode_chunk<HasNan>(codes, quads, scratch.weights);
      multiply_rows(scratch, x.rows, quads, x_scale, w_scale, scratch.sums);
    }
  }
  store_panel(problem, panel, scratch.sums[0], kPanelRows, 0, x.rows);
}

void linear(const Problem& problem, std::int64_t begin, std::int64_t end, void* memory) {
  auto& scratch = *static_cast<Scratch*>(memory);
  for (std::int64_t panel = begin; panel < end; ++panel) {
    if (problem.weight.panels[panel].has_nan != 0) {
      linear_panel<true>(problem, panel, scratch);
    } else {
      linear_panel<false>(problem, panel, scratch);
    }
  }
}

}  // namespace

constexpr Kernels kAvx2Kernels = [] {
  Kernels kernels = run_kernels();
  kernels.linear = linear;
  kernels.scratch_bytes = sizeof(Scratch);
  kernels.max_rows = kMaxRows;
  kernels.register_rows = kMaxRegisterRows;
  kernels.paths_agree = true;
  return kernels;
}();

}  // namespace qwen3_fp8_ascend::cpu
