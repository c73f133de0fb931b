// The kernels for AVX-512 (F, BW, VL, DQ, VBMI, VBMI2, BF16): Zen 4 and later, Sapphire Rapids and later.
#include "linear_avx512.h"

namespace qwen3_fp8_ascend::cpu {
namespace {

// With two sums for each row, this many leave registers for four decoded weights and the decoder's constants.
constexpr int kRegisterRows = 12;

// The processor's own prefetching ends with a page, which is one chunk of a panel: two of them are asked for ahead.
// Less than one is slower than nothing.
constexpr int kAhead = 2 * kChunk * kPanelRows;

void linear(const Problem& problem, std::int64_t begin, std::int64_t end, void* scratch) {
  if (problem.path == Path::registers) {
    linear_in_registers<kRegisterRows, 1, kAhead>(problem, begin, end, TableDecoder(kDecodeTables));
  } else {
    linear_in_tiles(problem, begin, end, *static_cast<Avx512Scratch*>(scratch));
  }
}

}  // namespace

constexpr Kernels kAvx512Kernels = [] {
  Kernels kernels = run_kernels();
  kernels.linear = linear;
  kernels.scratch_bytes = sizeof(Avx512Scratch);
  kernels.max_rows = kMostTileRows;
  kernels.register_rows = kRegisterRows;
  kernels.paths_agree = true;
  return kernels;
}();

}  // namespace qwen3_fp8_ascend::cpu
