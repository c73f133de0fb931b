// What a kernel is given, and the table of kernels that each instruction set provides.
//
// Kernels are plain functions over a range of panels; they start no thread and allocate nothing.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>

namespace qwen3_fp8_ascend::cpu {

enum class Dtype { bf16, fp16, fp32 };

// What becomes of x: it stays as it is (W8A16), or is rounded to e4m3 in groups whose scale is any number (W8A8) or a
// power of two (ue8m0). The numbers are those that the operators take.
enum class Quantization { none = 0, any_scale = 1, power_of_two = 2 };

// The packed layout. A weight (n, k) is cut into panels, and a panel into quads; a quad is 128 consecutive bytes.
//
//              k =  0..3    4..7    8..11          last
//                 +-------+-------+-------+-   -+-------+
//   32 rows       |       |       |       |     |       |  panel 0: its rows share one row of scales, so that a panel
//                 | quad  | quad  | quad  | ... | quad  |  ends where a scale block or a shard ends; rows and k
//                 |   0   |   1   |   2   |     |       |  beyond that hold code zero
//                 +-------+-------+-------+-   -+-------+
//   32 rows       |       |       |       |     |       |  panel 1, behind the last quad of panel 0
//
// A quad holds four k of each of the 32 rows, the middle two swapped:
//
//   byte      0    1    2    3  |  4    5    6    7  | ... | 124  125  126  127
//   row       0    0    0    0  |  1    1    1    1  |     |  31   31   31   31
//   k        +0   +2   +1   +3  | +0   +2   +1   +3  |     |  +0   +2   +1   +3
//
// In 16-bit lanes the even bytes are then the pairs (k, k + 1) of all rows and the odd bytes the pairs (k + 2, k + 3),
// in the order that vdpbf16ps and tdpbf16ps want, and no decoder has to move anything across lanes.
//
// A tile is what is decoded into L1 for many rows of x: one chunk of a panel. With AVX-512 and AMX it is in
// bf16, a line for each pair of k, two lines from each quad; AMX multiplies 16 lines of 16 rows at once (a B tile):
//
//   line 0   row 0: k, k + 1        row 1: k, k + 1        ...   row 31: k, k + 1
//   line 1   row 0: k + 2, k + 3    row 1: k + 2, k + 3    ...   row 31: k + 2, k + 3
constexpr int kPanelRows = 32;
constexpr int kQuadBytes = 4 * kPanelRows;

// Kernels walk k in chunks of at most this many, none of which crosses a scale block.
constexpr int kChunk = 128;

// Bytes of a cache line: what one prefetch asks for.
constexpr int kLine = 64;

// The most columns of a weight; far from where the arithmetic of sizes would overflow.
constexpr std::int64_t kMostColumns = std::int64_t{1} << 40;

// Neither argument is negative, and no sum that could overflow is formed: a block may be as wide as an integer can say.
static constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return a / b + (a % b != 0 ? 1 : 0); }

// act(gate) * up, with bounds: min(g / (1 + e^(-alpha (g + cubic g^3))), act_limit) * (u + beta), where g is the gate
// up to its limit and u the up within +-up_limit.
struct Glu {
  float gate_limit;
  float act_limit;
  float up_limit;
  float alpha;
  float cubic;
  float beta;

  [[gnu::always_inline]] bool is_silu() const {
    constexpr float none = std::numeric_limits<float>::infinity();
    const bool unbounded = gate_limit == none && act_limit == none && up_limit == none;
    return unbounded && alpha == 1.0f && cubic == 0.0f && beta == 0.0f;
  }
};

struct Panel {
  std::int32_t first_row;
  std::int32_t rows;
  std::int32_t scale_row;
  std::int32_t has_nan;  // whether any code is NaN, which some kernels decode on a slower path
};

// Member functions are inlined always: of a copy in each object the linker would keep one, which may be for another
// processor.

// How k is cut: into scale blocks, and those into chunks.
struct Depth {
  std::int64_t k;
  std::int64_t block_k;
  std::int64_t blocks;            // ceil(k / block_k)
  std::int64_t chunks_per_block;  // ceil(block_k / kChunk)
  std::int64_t chunks;

  [[gnu::always_inline]] std::int64_t block_of(std::int64_t chunk) const { return chunk / chunks_per_block; }
  [[gnu::always_inline]] std::int64_t start_of(std::int64_t chunk) const {
    return block_of(chunk) * block_k + chunk % chunks_per_block * kChunk;
  }
  [[gnu::always_inline]] std::int64_t length_of(std::int64_t chunk) const {
    const std::int64_t block_end = (block_of(chunk) + 1) * block_k;
    const std::int64_t end = block_end < k ? block_end : k;
    const std::int64_t length = end - start_of(chunk);
    return length < kChunk ? length : kChunk;
  }
  [[gnu::always_inline]] std::int64_t padded() const { return ceil_div(k, 4) * 4; }
};

struct Weight {
  const std::uint8_t* codes;  // [panels][depth.padded()][kPanelRows]
  const float* scales;        // [scale rows][depth.blocks]
  const Panel* panels;
  std::int64_t panel_count;
  Depth depth;

  [[gnu::always_inline]] const std::uint8_t* codes_of(std::int64_t panel) const {
    return codes + panel * depth.padded() * kPanelRows;
  }
  [[gnu::always_inline]] const float* scales_of(std::int64_t panel) const {
    return scales + panels[panel].scale_row * depth.blocks;
  }
};

// Activations as bf16 terms: an output row is the sum of `terms` consecutive rows here. Behind the last k of a chunk,
// values are zero up to the next multiple of 32. From 16 rows on, `capacity` is the next multiple of 16; rows between
// them hold any number.
struct Activation {
  const std::uint16_t* values;  // [chunks][capacity][kChunk]
  const float* scales;          // [chunks][capacity]
  std::int64_t rows;
  std::int64_t capacity;
  int terms;

  [[gnu::always_inline]] const std::uint16_t* values_of(std::int64_t chunk, std::int64_t row) const {
    return values + (chunk * capacity + row) * kChunk;
  }
  [[gnu::always_inline]] const float* scales_of(std::int64_t chunk, std::int64_t row) const {
    return scales + chunk * capacity + row;
  }
};

struct Output {
  void* y;           // (rows / terms, n), row stride n
  const void* bias;  // null, or (n) for the weight rows from 0 on
  Dtype dtype;
  Dtype bias_dtype;
  std::int64_t n;
  std::int64_t first_row = 0;  // the weight row that y's first column is for
};

struct Problem {
  Weight weight;
  Activation activation;
  Output output;
};

struct Kernels {
  // Largest magnitude; NaN if any number is NaN.
  float (*amax)(const void* x, Dtype dtype, std::int64_t count);
  // x / scale rounded to the e4m3 grid, times the power of two `factor`, as exact bf16. The scale is that of a group of
  // such numbers (`group_scale`).
  void (*quantize_values)(const void* x, Dtype dtype, std::int64_t count, float scale, float factor,
                          std::uint16_t* values);
  // The same, as e4m3 codes.
  void (*quantize_codes)(const void* x, Dtype dtype, std::int64_t count, float scale, std::uint8_t* codes);
  // x * factor as the exact sum of `terms` bf16, term t at values + t * term_stride. With `finite` false only
  // infinities and NaN are kept, as the first term.
  void (*split_values)(const void* x, Dtype dtype, std::int64_t count, float factor, bool finite, int terms,
                       std::uint16_t* values, std::int64_t term_stride);
  // code * scale, rounded once to dtype.
  void (*dequantize)(const std::uint8_t* codes, std::int64_t count, float scale, Dtype dtype, void* out);
  // glu(gate, up) in fp32, rounded once to dtype; the same bits on every instruction set.
  void (*glu_product)(const void* gate, const void* up, const Glu& glu, Dtype dtype, std::int64_t count, void* out);
  // The sum of `count` rows, each times its weight, in their order in fp32, rounded once to dtype; the same bits on
  // every instruction set.
  void (*weighted_sum)(const float* const* rows, const float* weights, std::int64_t count, std::int64_t columns,
                       Dtype dtype, void* out);
  // `linear` decodes weights as code * 2^weight_exponent: activations or their scales must make up for it.
  int weight_exponent;
  // y for the weight rows of panels [begin, end); `scratch` is 64-byte aligned.
  void (*linear)(const Problem& problem, std::int64_t begin, std::int64_t end, void* scratch);
  // Bytes of `scratch` that `linear` needs.
  std::size_t scratch_bytes;
  // The most rows of `activation` that `linear` takes; the caller splits longer batches.
  std::int64_t max_rows;
  // Up to this many rows of `activation`, `linear` decodes weights in registers and uses them at once; more share
  // tiles. A row has the same bits either way.
  std::int64_t register_rows;
  // At least `count` multiply-adds of the kind that `linear` does, from registers, as fast as the processor can: what
  // a benchmark measures `linear` against. Null where nobody measures that.
  void (*multiply_add)(std::int64_t count);
};

extern const Kernels kPortableKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx2IntelKernels;
extern const Kernels kAvx512fKernels;
extern const Kernels kAvx512Kernels;
extern const Kernels kAvx512Zen4Kernels;
extern const Kernels kAvx512IntelKernels;
extern const Kernels kAmxKernels;
#elif defined(__aarch64__)
extern const Kernels kNeonKernels;
extern const Kernels kNeonBf16Kernels;
#endif

}  // namespace qwen3_fp8_ascend::cpu
