// torch.ops.qwen3_fp8_ascend.cpu_multiply_add: multiply-adds that wait for nothing. The multiplier's limit, which the
// benchmark measures the kernels against.
#include <torch/csrc/stable/library.h>

#include <cstdint>

#include "isa.h"
#include "parallel.h"
#include "require.h"

namespace qwen3_fp8_ascend::cpu {
namespace {

constexpr std::int64_t kAtOnce = 1 << 16;
constexpr std::int64_t kMost = std::int64_t{1} << 40;

// At least `count` multiply-adds, by all threads, with the instructions of the current level.
void cpu_multiply_add(std::int64_t count) {
  require(count >= 0 && count <= kMost, "count must be within 0..", kMost, ", got ", count);
  const Kernels& kernels = kernels_of(current_isa());
  require(kernels.multiply_add != nullptr, "the instruction set in use has no such loop: see cpu_has_multiply_add");
  parallel(ceil_div(count, kAtOnce), 1,
           [&](std::int64_t begin, std::int64_t end) { kernels.multiply_add((end - begin) * kAtOnce); });
}

bool cpu_has_multiply_add() { return kernels_of(current_isa()).multiply_add != nullptr; }

}  // namespace
}  // namespace qwen3_fp8_ascend::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(qwen3_fp8_ascend, m) {
  m.def("cpu_multiply_add(int count) -> ()");
  m.def("cpu_has_multiply_add() -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(qwen3_fp8_ascend, CompositeExplicitAutograd, m) {
  m.impl("cpu_multiply_add", TORCH_BOX(&qwen3_fp8_ascend::cpu::cpu_multiply_add));
  m.impl("cpu_has_multiply_add", TORCH_BOX(&qwen3_fp8_ascend::cpu::cpu_has_multiply_add));
}
