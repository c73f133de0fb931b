// torch.ops.qwen3_fp8_ascend.cpu_read: reads a weight's bytes and does nothing with them. The memory's limit, which
// the benchmark measures the kernels against.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <cstdint>
#include <cstring>

#include "checks.h"
#include "parallel.h"

namespace qwen3_fp8_ascend::cpu {
namespace {

constexpr std::int64_t kChunk = 4096;
constexpr std::int64_t kLine = 64;
constexpr std::int64_t kMostAhead = 1 << 20;

// Independent sums and prefetching keep enough loads in flight; at any vector width this waits for memory only.
std::uint64_t xor_words(const std::uint8_t* bytes, std::int64_t size, std::int64_t ahead) {
  constexpr int kLanes = 32;
  std::uint64_t sums[kLanes] = {};
  for (std::int64_t at = 0; at < size; at += sizeof(sums)) {
    for (std::int64_t line = 0; line < static_cast<std::int64_t>(sizeof(sums)); line += kLine) {
      __builtin_prefetch(bytes + at + line + ahead);
    }
    std::uint64_t words[kLanes];
    std::memcpy(words, bytes + at, sizeof(words));
    for (int lane = 0; lane < kLanes; ++lane) sums[lane] ^= words[lane];
  }
  std::uint64_t all = 0;
  for (const std::uint64_t sum : sums) all ^= sum;
  return all;
}

// The xor of the words of all whole chunks, read by all threads. `ahead` is how many bytes ahead they are prefetched:
// the processor's own prefetching ends with a page, and what is best beside it differs between processors.
std::int64_t cpu_read(torch::stable::Tensor bytes, std::int64_t ahead) {
  require(ahead >= 0 && ahead <= kMostAhead, "ahead must be within 0..", kMostAhead, ", got ", ahead);
  require(bytes.is_cpu() && bytes.is_contiguous() && bytes.element_size() == 1,
          "cpu_read needs a contiguous tensor of bytes on the CPU");
  require_memory(bytes, "bytes", bytes.numel());
  const auto* data = static_cast<const std::uint8_t*>(bytes.const_data_ptr());
  const std::int64_t chunks = bytes.numel() / kChunk;
  std::atomic<std::uint64_t> all{0};
  parallel(chunks, 64, [&](std::int64_t begin, std::int64_t end) {
    const std::uint64_t sum = xor_words(data + begin * kChunk, (end - begin) * kChunk, ahead);
    all.fetch_xor(sum, std::memory_order_relaxed);
  });
  return static_cast<std::int64_t>(all.load());
}

}  // namespace
}  // namespace qwen3_fp8_ascend::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(qwen3_fp8_ascend, m) { m.def("cpu_read(Tensor bytes, int ahead=8192) -> int"); }

STABLE_TORCH_LIBRARY_IMPL(qwen3_fp8_ascend, CPU, m) { m.impl("cpu_read", TORCH_BOX(&qwen3_fp8_ascend::cpu::cpu_read)); }
