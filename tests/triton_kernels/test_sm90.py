"""The same sources compiled by upstream Triton to a Hopper cubin, without a GPU."""

# ruff: noqa: E402 (the skips come before the imports that would fail)

import os

import pytest

triton = pytest.importorskip("triton", reason="upstream Triton lives in .venv-triton: `make test-triton`")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("an interpreted kernel cannot be compiled", allow_module_level=True)
if "ascend" in triton.backends.backends:
    pytest.skip("this is triton-ascend, not upstream Triton", allow_module_level=True)

import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from qwen3_fp8_ascend.triton_kernels import block_dequantize, block_grouped_linear, block_linear, group_quantize
from qwen3_fp8_ascend.triton_kernels.configuration import NVIDIA, column_tile

POINTERS = {"a_ptr": "*fp16", "a_scale_ptr": "*fp32", "lanes_ptr": "*i16", "w_scale_ptr": "*fp32", "out_ptr": "*bf16"}


SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227}
"""Shared memory of a block, by compute capability."""


def build(kernel, pointers, sizes, constants, options=(), capability=90):
    signature = pointers | dict.fromkeys(sizes, "i32") | dict.fromkeys(constants, "constexpr")
    order = {name: signature[name] for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=order, constexprs=constants)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(options))


@pytest.mark.parametrize("block_m", [16, 32, 64])
@pytest.mark.parametrize("subnormals", [True, False])
def test_linear(block_m, subnormals):
    built = build(
        block_linear.block_linear_kernel,
        POINTERS,
        ("m", "n", "k_blocks"),
        {"BLOCK_M": block_m, "BLOCK_N": column_tile(block_m, NVIDIA, subnormals), "SPLIT_K": 2}
        | {"KEEPS_SUBNORMALS": subnormals, "DOT": tl.float16, "CORES": 132},
        NVIDIA.linear_options,
    )
    ptx = built.asm["ptx"]
    assert built.asm["cubin"] and ("wgmma" in ptx or "mma.sync" in ptx)
    assert built.metadata.shared <= 227 << 10, "more shared memory than a Hopper block has"


ON_EVERY_GPU = [
    pytest.param(block_m, capability, marks=[] if capability == 90 or block_m == 64 else pytest.mark.long)
    for block_m in (16, 32, 64)
    for capability in SHARED_KIB
]
"""In the short form the largest tile, which takes the most memory; on Hopper all."""


@pytest.mark.parametrize(("block_m", "capability"), ON_EVERY_GPU)
def test_grouped_linear(block_m, capability):
    built = build(
        block_grouped_linear.block_grouped_linear_kernel,
        POINTERS | {"ends_ptr": "*i64"},
        ("m", "m_padded", "n", "k_blocks", "groups"),
        {"BLOCK_M": block_m, "BLOCK_N": column_tile(block_m, NVIDIA, True)}
        | {"KEEPS_SUBNORMALS": True, "DOT": tl.float16, "CORES": 132},
        NVIDIA.linear_options,
        capability,
    )
    ptx = built.asm["ptx"]
    assert built.asm["cubin"] and ("wgmma" in ptx or "mma.sync" in ptx)
    assert built.metadata.shared <= SHARED_KIB[capability] << 10, built.metadata.shared
    outer = next(line for line in built.asm["ttgir"].splitlines() if "scf.for" in line)
    assert "-> (i32, i32)" in outer, "which tile is whose is no longer carried from group to group"


@pytest.mark.parametrize("ue8m0", [False, True])
@pytest.mark.parametrize("x", ["*bf16", "*fp16", "*fp32"])
def test_quantize_divides_exactly(x, ue8m0):
    built = build(
        group_quantize.group_quantize_kernel,
        {"x_ptr": x, "codes_ptr": "*i8", "scale_ptr": "*fp32"},
        ("groups",),
        {"UE8M0": ue8m0, "ROWS": NVIDIA.quantize_rows, "CORES": 528},
    )
    assert "div.rn.f32" in built.asm["ptx"] and "div.full.f32" not in built.asm["ptx"]


@pytest.mark.parametrize("kind", [0, 1, 2, 3])
def test_values(kind):
    built = build(
        group_quantize.group_values_kernel,
        {"x_ptr": "*bf16", "values_ptr": "*fp16", "scale_ptr": "*fp32"},
        ("m", "m_padded", "x_blocks", "k_blocks"),
        {"KIND": kind, "ROWS": NVIDIA.value_rows, "CORES": 528},
    )
    assert built.asm["cubin"]


@pytest.mark.parametrize("subnormals", [True, False])
def test_dequantize(subnormals):
    constants = {"KEEPS_SUBNORMALS": subnormals, "CORES": 528}
    pointers = {"scale_ptr": "*fp32", "out_ptr": "*bf16"}
    assert build(
        block_dequantize.block_dequantize_kernel,
        pointers | {"codes_ptr": "*i8"},
        ("n", "k_blocks"),
        constants | {"ROWS": NVIDIA.dequantize_rows},
    ).asm["cubin"]
    assert build(
        block_dequantize.packed_dequantize_kernel,
        pointers | {"lanes_ptr": "*i16"},
        ("n", "k_blocks", "groups"),
        constants | {"ROWS": NVIDIA.packed_rows},
    ).asm["cubin"]
