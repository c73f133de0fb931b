// Forks. A child has one thread, the one that called fork(), and GNU's OpenMP runtime still counts on the threads that
// this one had in the parent: the next parallel region would wait for them for ever. No call tells whether it had any,
// so whoever comes out of a fork does without. Threads that a child starts are new to the runtime and get their own.
#include "parallel.h"

#include <torch/csrc/stable/ops.h>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace qwen3_fp8_ascend::cpu {
namespace {

thread_local bool forked = false;

#if defined(__unix__) || defined(__APPLE__)
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] { forked = true; });
#endif

}  // namespace

bool threads_lost() { return forked; }

std::int64_t thread_count() { return torch::stable::get_num_threads(); }

void parallel_parts(std::int64_t count, std::int64_t grain, Part part, const void* body) {
  torch::stable::parallel_for(0, count, grain, [&](std::int64_t begin, std::int64_t end) { part(body, begin, end); });
}

}  // namespace qwen3_fp8_ascend::cpu
