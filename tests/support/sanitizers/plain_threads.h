// torch::stable::parallel_for with threads of our own, for ThreadSanitizer: it knows std::thread, but takes every hand-over
// of GNU's OpenMP runtime, which is not built with it, for a race. Included before everything else (-include).
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <thread>
#include <vector>

// Regions that ran in two or more threads: what the tests ask to know that there was something to see.
extern "C" {
__attribute__((visibility("default"), used)) inline std::atomic<std::int64_t> plain_threads_regions{0};
__attribute__((visibility("default"), used)) inline std::int64_t count_threaded_regions() {
  return plain_threads_regions.load();
}
}

namespace qwen3_fp8_ascend::cpu {

// The parts that torch would make: as many as there are threads, none smaller than `grain`.
template <class Body>
void parallel_in_plain_threads(std::int64_t count, std::int64_t grain, const Body& body) {
  const std::int64_t most = std::min<std::int64_t>(torch::stable::get_num_threads(), (count + grain - 1) / grain);
  const std::int64_t part = (count + most - 1) / most;
  std::vector<std::exception_ptr> errors(static_cast<std::size_t>(most));
  const auto run = [&](std::int64_t index) {
    try {
      const std::int64_t begin = index * part;
      const std::int64_t end = std::min(begin + part, count);
      if (begin < end) body(begin, end);
    } catch (...) {
      errors[static_cast<std::size_t>(index)] = std::current_exception();
    }
  };
  std::vector<std::thread> threads;
  for (std::int64_t index = 1; index < most; ++index) threads.emplace_back(run, index);
  if (most > 1) plain_threads_regions.fetch_add(1);
  run(0);
  for (std::thread& thread : threads) thread.join();
  for (const std::exception_ptr& error : errors) {
    if (error) std::rethrow_exception(error);
  }
}

}  // namespace qwen3_fp8_ascend::cpu
