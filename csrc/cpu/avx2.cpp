// The kernels for AVX2, FMA and F16C: any x86-64 server since 2013.
//
// Cores differ in what is cheap. There are two tables of kernels, with the same bits (`kernels_of` chooses).
#include "linear_fma.h"

namespace qwen3_fp8_ascend::cpu {
namespace {

// Batches of at most kRowsWithoutKeeping rows widen a strip anew in each tile. In longer ones the first tile keeps what
// it widened, as fp32. AMD's cores convert beside their multipliers, and storing and loading costs more until tiles are
// many. Few rows ask for codes in L2 first: what is asked for into L1 far ahead has left it when it is needed.
// Multipliers take subnormal numbers as fast as others (measured on a Zen 4; Intel's take an assist for each).
struct Zen {
  static constexpr std::int64_t kRowsWithoutKeeping = 32;
  static constexpr std::int64_t kLongBatch = kNever;
  static constexpr std::int64_t kPanelsTogether = 4;
  static constexpr std::int64_t kPanelsOfOneRow = 2;
  static constexpr std::int64_t kEarlyChunks = 0;
  static constexpr std::int64_t kLaterSteps = 2;
  static constexpr int kPlaces = 1;
  static constexpr bool kTakesSubnormals = true;
};

// Intel's convert where they multiply. Their own prefetching ends with a page, which a chunk of a panel is: it is set
// going on a page two chunks of all panels before. Memory that is read at two places comes faster.
struct Intel {
  static constexpr std::int64_t kRowsWithoutKeeping = kTileRows<2>;
  static constexpr std::int64_t kLongBatch = kNever;
  static constexpr std::int64_t kPanelsTogether = 8;
  static constexpr std::int64_t kPanelsOfOneRow = 8;
  static constexpr std::int64_t kEarlyChunks = 2;
  static constexpr std::int64_t kLaterSteps = 0;
  static constexpr int kPlaces = 2;
  static constexpr bool kTakesSubnormals = false;
};

}  // namespace

constexpr Kernels kAvx2Kernels = kernels_for<Zen>();
constexpr Kernels kAvx2IntelKernels = kernels_for<Intel>();

}  // namespace qwen3_fp8_ascend::cpu
