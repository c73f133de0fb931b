// Starting a kernel on a stream. launch_*.asc do it on an NPU, the tests' emulator on the host.
#pragma once

#include <cstdint>

#include "../tiling.h"

namespace qwen3_fp8_ascend {

// Device addresses; `stream` is an aclrtStream.
void launch_group_quantize(uint32_t blocks, void* stream, void* x, void* codes, void* scale,
                           const QuantizeTiling& tiling);
void launch_block_dequantize(uint32_t blocks, void* stream, void* packed, void* scale, void* spans, void* out,
                             const DequantizeTiling& tiling);
void launch_block_linear(uint32_t blocks, void* stream, void* x, void* packed, void* scale, void* spans, void* bias,
                         void* out, void* workspace, const LinearTiling& tiling);
void launch_block_grouped_linear(uint32_t blocks, void* stream, void* x, void* packed, void* scale, void* spans,
                                 void* ends, void* out, void* workspace, const LinearTiling& tiling);
void launch_block_gemv(uint32_t blocks, void* stream, void* x, void* packed, void* scale, void* spans, void* bias,
                       void* out, void* workspace, const LinearTiling& tiling);

}  // namespace qwen3_fp8_ascend
