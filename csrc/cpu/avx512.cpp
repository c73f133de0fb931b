// The kernels for AVX-512 (F, BW, VL, DQ, VBMI, VBMI2, BF16): Zen 4 and later, Sapphire Rapids and later.
//
// Cores differ in what is cheap. There are two tables of kernels, with the same bits (`kernels_of` chooses).
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
  static constexpr int kAhead = 2 * kChunk * kPanelRows;
  static constexpr int kEarlyLines = 0;

  template <class Body>
  static void with_decoder(const Weight&, std::int64_t, std::int64_t, const Body& body) {
    body(TableDecoder(kDecodeTables));
  }
};

// Intel's: byte permutations are several operations, so that arithmetic decodes; pages that are far ahead come no
// sooner than half a page does; but the processor's own prefetching, which ends with a page, is set going on each
// of them early. Few rows take two panels together: the memory then has two places to read from.
struct Intel {
  static constexpr int kWeightExponent = ArithmeticDecoder::kExponent;
  static constexpr int kPairedRows = 4;  // four sums for each row
  static constexpr int kAhead = kChunk * kPanelRows / 2;
  static constexpr int kEarlyLines = 2;

  template <class Body>
  static void with_decoder(const Weight& weight, std::int64_t begin, std::int64_t end, const Body& body) {
    with_scaled_decoder(weight, begin, end, body);
  }
};

template <class Core>
void linear(const Problem& problem, std::int64_t begin, std::int64_t end, void* scratch) {
  Core::with_decoder(problem.weight, begin, end, [&](const auto& decode) {
    if (problem.activation.rows > kRegisterRows) {
      linear_in_tiles(problem, begin, end, decode, *static_cast<Avx512Scratch*>(scratch));
      return;
    }
    if constexpr (Core::kPairedRows > 0) {
      if (problem.activation.rows <= Core::kPairedRows) {
        linear_in_registers<Core::kPairedRows, 2, Core>(problem, begin, end, decode);
        return;
      }
    }
    linear_in_registers<kRegisterRows, 1, Core>(problem, begin, end, decode);
  });
}

template <class Core>
constexpr Kernels kernels_for() {
  Kernels kernels = run_kernels();
  kernels.weight_exponent = Core::kWeightExponent;
  kernels.linear = linear<Core>;
  kernels.scratch_bytes = sizeof(Avx512Scratch);
  kernels.max_rows = kMostTileRows;
  kernels.register_rows = kRegisterRows;
  kernels.multiply_add = multiply_add;
  return kernels;
}

}  // namespace

constexpr Kernels kAvx512Kernels = kernels_for<Zen>();
constexpr Kernels kAvx512IntelKernels = kernels_for<Intel>();

}  // namespace qwen3_fp8_ascend::cpu
