// The one way to more threads: torch's own pool, so that a process has a single OpenMP runtime, bound as its owner
// bound it. Ranges are contiguous, and nothing computed depends on where they are cut.
#pragma once

#include <cstdint>

namespace qwen3_fp8_ascend::cpu {

// Whether the calling thread came out of a fork, which took none of its pool along: it then works alone, with the same
// results.
bool threads_lost();

// How many threads torch's pool has, the calling one among them.
std::int64_t thread_count();

using Part = void (*)(const void* body, std::int64_t begin, std::int64_t end);

// Calls part(body, begin, end) in torch's pool.
void parallel_parts(std::int64_t count, std::int64_t grain, Part part, const void* body);

// Calls body(begin, end) for parts of [0, count) of at least `grain`.
template <class Body>
void parallel(std::int64_t count, std::int64_t grain, const Body& body) {
  if (count <= 0) return;
  if (count <= grain || threads_lost()) {
    body(std::int64_t{0}, count);
  } else {
    const Part part = [](const void* of, std::int64_t begin, std::int64_t end) {
      (*static_cast<const Body*>(of))(begin, end);
    };
    parallel_parts(count, grain, part, &body);
  }
}

}  // namespace qwen3_fp8_ascend::cpu
