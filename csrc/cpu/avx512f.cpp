// The kernels for AVX-512 without bf16 instructions (F, BW, VL, DQ): Skylake-SP, Cascade Lake, Ice Lake. They have the
// bits of AVX2's.
#include "linear_fma.h"

namespace qwen3_fp8_ascend::cpu {
namespace {

// These are Intel's: avx2.cpp says what that means. Four groups of weights are a whole chunk. Between few rows, which
// need as many for the multiplier to be busy, and long batches, which then read their activations once instead of
// twice, two groups are faster.
struct Intel {
  static constexpr std::int64_t kRowsWithoutKeeping = kTileRows<2>;
  static constexpr std::int64_t kLongBatch = 41;
  static constexpr std::int64_t kPanelsTogether = 8;
  static constexpr std::int64_t kPanelsOfOneRow = 8;
  static constexpr std::int64_t kEarlyChunks = 2;
  static constexpr std::int64_t kLaterSteps = 0;
  static constexpr int kPlaces = 2;
  static constexpr bool kTakesSubnormals = false;
};

}  // namespace

constexpr Kernels kAvx512fKernels = kernels_for<Intel>();

}  // namespace qwen3_fp8_ascend::cpu
