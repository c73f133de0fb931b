// Which instruction set this machine has, and which one is used.
#pragma once

#include "kernels.h"

namespace qwen3_fp8_ascend::cpu {

// Each level includes those before it.
enum class Isa : int { portable = 0, avx2 = 1, avx512 = 2, amx = 3 };

// The highest level that processor and operating system support.
Isa best_isa();

// The level in use: best_isa() unless lowered by set_isa.
Isa current_isa();

// Uses `isa` from now on, in every thread; it must not be above best_isa().
void set_isa(Isa isa);

const Kernels& kernels_of(Isa isa);

}  // namespace qwen3_fp8_ascend::cpu
