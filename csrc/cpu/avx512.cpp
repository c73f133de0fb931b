// The kernels for AVX-512 (F, BW, VL, DQ, VBMI, VBMI2, BF16): Zen 4 and later, Sapphire Rapids and later.
#include "linear_avx512.h"

namespace qwen3_fp8_ascend::cpu {

const Kernels kAvx512Kernels = {
    amax,
    quantize_values,
    quantize_codes,
    split_values,
    dequantize,
    0,
    linear_avx512,
    sizeof(Avx512Scratch),
    480,
    kMaxRegisterRows,
    true,
};

}  // namespace qwen3_fp8_ascend::cpu
