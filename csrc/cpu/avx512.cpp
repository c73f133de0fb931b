// The kernels for AVX-512 (F, BW, VL, DQ, VBMI, VBMI2, BF16): Zen 4 and later, Sapphire Rapids and later.
//
// Cores differ in what is cheap. There are three tables of kernels, with the same bits (`kernels_of` chooses).
#include <algorithm>

#include "linear_avx512.h"

namespace qwen3_fp8_ascend::cpu {
namespace {

// With two sums for each row, this many leave registers for four decoded weights and the decoder's constants.
constexpr int kRegisterRows = 12;

// AMD's: a permutation of two registers of bytes is one operation, so that tables decode. The processor's own
// prefetching ends with a page, which is one chunk of a panel: two of them are asked for ahead. Less than one is slower
// than nothing.
struct Zen {
  static constexpr int kWeightExponent = 0;
  static constexpr int kPairedRows = 0;
  static constexpr int kGroupedRows = 0;
  static constexpr int kAhead = 2 * kChunk * kPanelRows;
  static constexpr int kFarAhead = 0;
  static constexpr int kEarlyLines = 0;

  template <class Body>
  static void with_decoder(const Weight&, std::int64_t, std::int64_t, const Body& body) {
    body(TableDecoder(kDecodeTables));
  }
};

// Zen 4 decodes beside its products, while stores wait for them: up to some rows, a chunk is decoded again and again
// instead of being kept. What is asked for into L1 far ahead has left it when it is needed, so that L2 is asked first.
struct Zen4 : Zen {
  static constexpr int kGroupedRows = 64;
  static constexpr int kAhead = kChunk * kPanelRows;
  static constexpr int kFarAhead = 3 * kChunk * kPanelRows;
};

// Intel's: byte permutations are several operations, so that arithmetic decodes; pages that are far ahead come no
// sooner than half a page does; but the processor's own prefetching, which ends with a page, is set going on each
// of them early. Few rows take two panels together: the memory then has two places to read from.
struct Intel {
  static constexpr int kWeightExponent = ArithmeticDecoder::kExponent;
  static constexpr int kPairedRows = 4;  // four sums for each row
  static constexpr int kGroupedRows = 0;
  static constexpr int kAhead = kChunk * kPanelRows / 2;
  static constexpr int kFarAhead = 0;
  static constexpr int kEarlyLines = 2;

  template <class Body>
  static void with_decoder(const Weight& weight, std::int64_t begin, std::int64_t end, const Body& body) {
    with_scaled_decoder(weight, begin, end, body);
  }
};

template <class Core>
void linear(const Problem& problem, std::int64_t begin, std::int64_t end, void* scratch) {
  Core::with_decoder(problem.weight, begin, end, [&](const auto& decode) {
    const std::int64_t rows = problem.activation.rows;
    auto& memory = *static_cast<Avx512Scratch*>(scratch);
    if constexpr (Core::kPairedRows > 0) {
      if (rows <= Core::kPairedRows) {
        return linear_in_registers<Core::kPairedRows, 2, Core>(problem, begin, end, decode);
      }
    }
    if (rows <= kRegisterRows) return linear_in_registers<kRegisterRows, 1, Core>(problem, begin, end, decode);
    if constexpr (Core::kGroupedRows > 0) {
      if (rows <= Core::kGroupedRows) return linear_in_groups<kRegisterRows, Core>(problem, begin, end, decode, memory);
    }
    linear_in_tiles(problem, begin, end, decode, memory);
  });
}

template <class Core>
constexpr Kernels kernels_for() {
  Kernels kernels = run_kernels();
  kernels.weight_exponent = Core::kWeightExponent;
  kernels.linear = linear<Core>;
  kernels.scratch_bytes = sizeof(Avx512Scratch);
  kernels.max_rows = kMostTileRows;
  kernels.register_rows = std::max(kRegisterRows, Core::kGroupedRows);
  kernels.multiply_add = multiply_add;
  return kernels;
}

}  // namespace

constexpr Kernels kAvx512Kernels = kernels_for<Zen>();
constexpr Kernels kAvx512Zen4Kernels = kernels_for<Zen4>();
constexpr Kernels kAvx512IntelKernels = kernels_for<Intel>();

}  // namespace qwen3_fp8_ascend::cpu
