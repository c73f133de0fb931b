"""Every kernel in every variant that is launched on Ascend, with the constants of the static configuration."""

from __future__ import annotations

import triton.language as tl

from benchmarks.triton_folded import block_linear_folded_kernel
from qwen3_fp8_ascend.triton_kernels.block_dequantize import block_dequantize_kernel, packed_dequantize_kernel
from qwen3_fp8_ascend.triton_kernels.block_grouped_linear import block_grouped_linear_kernel
from qwen3_fp8_ascend.triton_kernels.block_linear import block_linear_kernel
from qwen3_fp8_ascend.triton_kernels.configuration import (
    ASCEND_A2_A3,
    ROW_TILES,
    Architecture,
    architecture,
    column_tile,
)
from qwen3_fp8_ascend.triton_kernels.group_quantize import (
    CODE_VALUES,
    CODE_VALUES_UE8M0,
    RESIDUAL,
    SCALED,
    group_quantize_kernel,
    group_values_kernel,
)
from tests.support.triton_ascend.compiler import KernelCase, compile_to_hivm, lower_to_linalg

ASCEND_ARCHITECTURES = ("Ascend910B1", "Ascend910B3", "Ascend910B4", "Ascend910_9392", "Ascend950PR_9589")
CUBE_CORES = {
    "Ascend910B1": 24,
    "Ascend910B3": 20,
    "Ascend910B4": 20,
    "Ascend910_9392": 24,
    "Ascend950PR_9589": 32,
}
_CONSTANT = "constexpr"


def quantize_case(x: str, cores: int, configuration: Architecture = ASCEND_A2_A3, ue8m0: bool = False) -> KernelCase:
    """`group_quantize_kernel` for an activation type ("bf16", "fp16", "fp32")."""
    return KernelCase(
        f"group_quantize[{x}{',ue8m0' if ue8m0 else ''}]",
        group_quantize_kernel,
        {"x_ptr": f"*{x}", "codes_ptr": "*i8", "scale_ptr": "*fp32", "groups": "i32"}
        | dict.fromkeys(("UE8M0", "ROWS", "CORES"), _CONSTANT),
        {"UE8M0": ue8m0, "ROWS": configuration.quantize_rows, "CORES": cores},
    )


def values_case(x: str, kind: int, cores: int, configuration: Architecture = ASCEND_A2_A3) -> KernelCase:
    """`group_values_kernel` for an activation type and kind."""
    name = {
        CODE_VALUES.value: "codes",
        CODE_VALUES_UE8M0.value: "codes-ue8m0",
        SCALED.value: "scaled",
        RESIDUAL.value: "residual",
    }[kind]
    return KernelCase(
        f"group_values[{name},{x}]",
        group_values_kernel,
        {"x_ptr": f"*{x}", "values_ptr": "*fp16", "scale_ptr": "*fp32"}
        | dict.fromkeys(("m", "m_padded", "x_blocks", "k_blocks"), "i32")
        | dict.fromkeys(("KIND", "ROWS", "CORES"), _CONSTANT),
        {"KIND": kind, "ROWS": configuration.value_rows, "CORES": cores},
    )


def dequantize_case(
    out: str, keeps_subnormals: bool, cores: int, configuration: Architecture = ASCEND_A2_A3
) -> KernelCase:
    """`block_dequantize_kernel` to a floating type."""
    return KernelCase(
        f"block_dequantize[{out},{_form(keeps_subnormals)}]",
        block_dequantize_kernel,
        {"codes_ptr": "*i8", "scale_ptr": "*fp32", "out_ptr": f"*{out}", "n": "i32", "k_blocks": "i32"}
        | dict.fromkeys(("ROWS", "KEEPS_SUBNORMALS", "CORES"), _CONSTANT),
        {"ROWS": configuration.dequantize_rows, "KEEPS_SUBNORMALS": keeps_subnormals, "CORES": cores},
    )


def packed_dequantize_case(
    out: str, keeps_subnormals: bool, cores: int, configuration: Architecture = ASCEND_A2_A3
) -> KernelCase:
    """`packed_dequantize_kernel` to a floating type."""
    return KernelCase(
        f"packed_dequantize[{out},{_form(keeps_subnormals)}]",
        packed_dequantize_kernel,
        {"lanes_ptr": "*i16", "scale_ptr": "*fp32", "out_ptr": f"*{out}"}
        | dict.fromkeys(("n", "k_blocks", "groups"), "i32")
        | dict.fromkeys(("ROWS", "KEEPS_SUBNORMALS", "CORES"), _CONSTANT),
        {"ROWS": configuration.packed_rows, "KEEPS_SUBNORMALS": keeps_subnormals, "CORES": cores},
    )


def linear_case(
    block_m: int, keeps_subnormals: bool, cores: int, out: str = "fp32", split_k: int = 1, block_n: int = 0
) -> KernelCase:
    """`block_linear_kernel`; the same for w8a8 and w8a16, whose activations differ before it."""
    block_n = block_n or column_tile(block_m, ASCEND_A2_A3, keeps_subnormals)
    return KernelCase(
        f"block_linear[m{block_m},n{block_n},{_form(keeps_subnormals)}]",
        block_linear_kernel,
        _linear_signature(out) | dict.fromkeys(("BLOCK_M", "BLOCK_N", "SPLIT_K", *_LINEAR_CONSTANTS), _CONSTANT),
        {"BLOCK_M": block_m, "BLOCK_N": block_n, "SPLIT_K": split_k}
        | {"KEEPS_SUBNORMALS": keeps_subnormals, "DOT": tl.float16, "CORES": cores},
    )


def grouped_linear_case(
    block_m: int, keeps_subnormals: bool, cores: int, out: str = "fp32", block_n: int = 0
) -> KernelCase:
    """`block_grouped_linear_kernel`."""
    block_n = block_n or column_tile(block_m, ASCEND_A2_A3, keeps_subnormals)
    pointers = {"a_ptr": "*fp16", "a_scale_ptr": "*fp32", "lanes_ptr": "*i16", "w_scale_ptr": "*fp32"}
    return KernelCase(
        f"block_grouped_linear[m{block_m},n{block_n},{_form(keeps_subnormals)}]",
        block_grouped_linear_kernel,
        pointers
        | {"ends_ptr": "*i64", "out_ptr": f"*{out}"}
        | dict.fromkeys(("m", "m_padded", "n", "k_blocks", "groups"), "i32")
        | dict.fromkeys(("BLOCK_M", "BLOCK_N", *_LINEAR_CONSTANTS), _CONSTANT),
        {"BLOCK_M": block_m, "BLOCK_N": block_n}
        | {"KEEPS_SUBNORMALS": keeps_subnormals, "DOT": tl.float16, "CORES": cores},
    )


def folded_case(block_m: int, keeps_subnormals: bool, cores: int, out: str = "fp32") -> KernelCase:
    """`block_linear_folded_kernel`."""
    return KernelCase(
        f"block_linear_folded[m{block_m},n128,{_form(keeps_subnormals)}]",
        block_linear_folded_kernel,
        _linear_signature(out) | dict.fromkeys(("BLOCK_M", *_LINEAR_CONSTANTS), _CONSTANT),
        {"BLOCK_M": block_m, "KEEPS_SUBNORMALS": keeps_subnormals, "DOT": tl.float16, "CORES": cores},
    )


_LINEAR_CONSTANTS = ("KEEPS_SUBNORMALS", "DOT", "CORES")


def _linear_signature(out: str) -> dict[str, str]:
    pointers = {"a_ptr": "*fp16", "a_scale_ptr": "*fp32", "lanes_ptr": "*i16", "w_scale_ptr": "*fp32"}
    return pointers | {"out_ptr": f"*{out}"} | dict.fromkeys(("m", "n", "k_blocks"), "i32")


def _form(keeps_subnormals: bool) -> str:
    return "subnormals" if keeps_subnormals else "no-subnormals"


def all_cases(architecture_name: str) -> list[KernelCase]:
    """Every kernel and variant as launched on a chip."""
    configuration = architecture(architecture_name)
    cube = CUBE_CORES[architecture_name]
    vector = 2 * cube
    cases = [quantize_case(x, vector, configuration) for x in ("bf16", "fp16", "fp32")]
    cases += [quantize_case("bf16", vector, configuration, ue8m0=True)]
    cases += [values_case("bf16", CODE_VALUES_UE8M0.value, vector, configuration)]
    cases += [values_case(x, CODE_VALUES.value, vector, configuration) for x in ("bf16", "fp16", "fp32")]
    cases += [values_case(x, SCALED.value, vector, configuration) for x in ("bf16", "fp16", "fp32")]
    cases += [values_case("fp32", RESIDUAL.value, vector, configuration)]
    for keeps in (False, True):
        for out in ("bf16", "fp16", "fp32"):
            cases += [dequantize_case(out, keeps, vector, configuration)]
            cases += [packed_dequantize_case(out, keeps, vector, configuration)]
        for block_m in sorted({*ROW_TILES, configuration.large_rows}):
            block_n = column_tile(block_m, configuration, keeps)
            cases += [linear_case(block_m, keeps, cube, "bf16", block_n=block_n)]
            cases += [grouped_linear_case(block_m, keeps, cube, "bf16", block_n=block_n)]
            if block_m <= 64:
                cases += [folded_case(block_m, keeps, cube, "bf16")]
    return cases


def one_of_each(architecture_name: str) -> list[KernelCase]:
    """The last variant of each kernel for a chip: the largest tile, with subnormals."""
    return list({case.name.partition("[")[0]: case for case in all_cases(architecture_name)}.values())


def compile_case(case: KernelCase, architecture_name: str, ir_version: str) -> str:
    """HIVM of a case with the options its architecture is configured for."""
    return compile_to_hivm(
        lower_to_linalg(case, architecture_name),
        architecture_name,
        ir_version,
        bind_sub_block=architecture(architecture_name).bind_sub_block,
    )
