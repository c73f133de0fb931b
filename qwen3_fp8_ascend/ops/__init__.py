"""The public operations: validate, choose a backend, call it."""

from qwen3_fp8_ascend.backends.registry import PackedWeight
from qwen3_fp8_ascend.ops.dense import block_linear, dequantize_weight, pack_weight, quantize_activation
from qwen3_fp8_ascend.ops.experts import block_experts, grouped_linear, pack_experts
from qwen3_fp8_ascend.ops.operands import ACTIVATION_DTYPES, SCALE_DTYPES
from qwen3_fp8_ascend.ops.values import DAMAGED, check_codes, check_scale_values, count_nan_codes

__all__ = [
    "ACTIVATION_DTYPES",
    "DAMAGED",
    "SCALE_DTYPES",
    "PackedWeight",
    "block_experts",
    "block_linear",
    "check_codes",
    "check_scale_values",
    "count_nan_codes",
    "dequantize_weight",
    "grouped_linear",
    "pack_experts",
    "pack_weight",
    "quantize_activation",
]
