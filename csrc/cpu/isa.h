// Which instruction set this machine has, and which one is used.
#pragma once

#include "kernels.h"

namespace qwen3_fp8_ascend::cpu {

// The levels of this architecture; each includes those before it.
#if defined(__x86_64__)
enum class Isa : int { portable = 0, avx2 = 1, avx512f = 2, avx512 = 3, amx = 4 };
constexpr Isa kHighestIsa = Isa::amx;
#elif defined(__aarch64__)
enum class Isa : int { portable = 0, neon = 1, neon_bf16 = 2 };
constexpr Isa kHighestIsa = Isa::neon_bf16;
#else
enum class Isa : int { portable = 0 };
constexpr Isa kHighestIsa = Isa::portable;
#endif

// The highest level that processor and operating system support.
Isa best_isa();

// The level in use: best_isa() unless lowered by set_isa.
Isa current_isa();

// Uses `isa` from now on, in every thread; it must not be above best_isa().
void set_isa(Isa isa);

const Kernels& kernels_of(Isa isa);

}  // namespace qwen3_fp8_ascend::cpu
