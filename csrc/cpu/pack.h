// Laying out a weight once, at load time.
#pragma once

#include "kernels.h"

namespace qwen3_fp8_ascend::cpu {

// Permutes weight (n, k) into codes (panel_count, k padded to 4, 32), the layout of Weight::codes, and notes in
// `panels` which of them hold NaN.
void pack_weight(const std::uint8_t* weight, std::int64_t k, Panel* panels, std::int64_t panel_count,
                 std::uint8_t* codes);

}  // namespace qwen3_fp8_ascend::cpu
