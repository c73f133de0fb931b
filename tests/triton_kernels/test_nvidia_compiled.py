"""The kernels for NVIDIA GPUs compiled to machine code without a GPU, for every line of the table of shapes."""

# ruff: noqa: E402 (the skips come before the imports that would fail)

import itertools
import os
import re
import subprocess
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="upstream Triton lives in .venv-triton: `make test-triton`")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("an interpreted kernel cannot be compiled", allow_module_level=True)
if "ascend" in triton.backends.backends:
    pytest.skip("this is triton-ascend, not upstream Triton", allow_module_level=True)

import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from qwen3_fp8_ascend.backends.nvidia import launch
from qwen3_fp8_ascend.triton_kernels.nvidia import dequantize, grouped_linear, linear, quantize, shapes

CAPABILITIES = (80, 89, 90, 100)
WHOLE = (80, 90)
"""Those on which the short form compiles every tile: of one that decodes e4m3 itself, and of the one with tiles of its
own. The others share their tiles with the first: there the largest, which take what there is, and the smallest."""


def on_every_gpu(cases, short, whole=WHOLE):
    """Parameters (*case, capability): on GPUs that are not in `whole` the short form has the cases in `short`."""
    return [
        pytest.param(*case, capability, marks=[] if capability in whole or case in short else pytest.mark.long)
        for case, capability in itertools.product(cases, CAPABILITIES)
    ]


CODES, SCALE, SPANS = {"codes_ptr": "*u8"}, {"w_scale_ptr": "*fp32", "x_scale_ptr": "*fp32"}, {"spans_ptr": "*i32"}
OPERANDS = {"w8a8": ("*fp16", tl.float16), "bf16": ("*bf16", tl.bfloat16), "fp32": ("*fp32", tl.bfloat16)}
"""What x is by the time it is multiplied. fp16 as it is differs from W8A8 in a scale that is not there."""


def build(kernel, pointers, sizes, constants, capability, tile=None, divisible=()):
    """Compiled for operands as torch allocates them: 16 divides all addresses, and the sizes that are named."""
    types = pointers | dict.fromkeys(sizes, "i32") | dict.fromkeys(constants, "constexpr")
    places = {name: place for place, name in enumerate(kernel.arg_names)}
    aligned = {(places[name],): [["tt.divisibility", 16]] for name in (*pointers, *divisible)}
    source = ASTSource(
        fn=kernel, signature={name: types[name] for name in kernel.arg_names}, constexprs=constants, attrs=aligned
    )
    options = {} if tile is None else launch.resources(tile)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def spilled(built, folder):
    """Bytes of local memory of a thread, by the disassembler that comes with Triton."""
    file = folder / "kernel.cubin"
    file.write_bytes(built.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    text = subprocess.run([tool, "--dump-resource-usage", file], capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", text)[1])


def constants_of(tile, operand, capability):
    return {
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "W_FIRST": tile.w_first,
        "QUANTIZED": operand == "w8a8",
        "THREE": operand == "fp32",
        "WHOLE": True,
        "EVEN_K": True,
        "HARDWARE": shapes.chip(capability).hardware,
        "TYPE": OPERANDS[operand][1],
        "SCALES_EARLY": tile.scales_early,
        "DEPENDENT": shapes.chip(capability).dependent,
    }


def build_linear(tile, operand, capability, split):
    pointers = CODES | SCALE | SPANS | {"x_ptr": OPERANDS[operand][0], "bias_ptr": "*bf16", "out_ptr": "*bf16"}
    constants = {"SPLIT_K": split, "HAS_BIAS": False, "EVEN_M": True, "AHEAD": tile.ahead}
    return build(
        linear.linear_kernel,
        pointers | {"parts_ptr": "*fp32", "counters_ptr": "*i32"},
        ("m", "n", "k", "k_blocks", "x_stride", "x_scale_step"),
        constants_of(tile, operand, capability) | constants,
        capability,
        tile,
        ("n", "k", "x_stride"),
    )


MEMORY = re.compile(
    r"\b(ld\.global|ld\.volatile|st\.global|atom\.|red\.|cp\.async\.c[ag]|cp\.async\.bulk\.(?!prefetch))"
)


def check_order(ptx, capability, begins_first=False):
    """A dependent launch touches memory behind its wait alone, and others begin behind it, or first where asked."""
    lines = ptx.splitlines()
    waits, begins = (
        [number for number, line in enumerate(lines) if f"griddepcontrol.{what}" in line]
        for what in ("wait", "launch_dependents")
    )
    assert len(waits) == len(begins) == int(shapes.chip(capability).dependent)
    if waits:
        touched = next(number for number, line in enumerate(lines) if MEMORY.search(line))
        assert waits[0] < touched, f"memory is touched before the launch before has ended: {lines[touched]}"
        assert (begins[0] < waits[0]) == begins_first


def check(built, operand, capability, folder):
    chip, ptx = shapes.chip(capability), built.asm["ptx"]
    assert built.metadata.shared <= chip.shared_kib << 10, f"{built.metadata.shared} bytes of shared memory"
    check_order(ptx, capability)
    assert "mma" in ptx, "no tensor cores"
    assert ("cvt.rn.f16x2.e4m3x2" in ptx) == chip.hardware
    assert "cvt.rn.bf16.f16" not in ptx, "a conversion of a number at a time, at a quarter of the rate"
    assert ".e4m3" not in "".join(line for line in ptx.splitlines() if "mma" in line), "FP8 products are not exact"
    if operand != "fp32":  # nobody serves in fp32
        assert spilled(built, folder) == 0, "registers are spilled"


CUTS = {16: (4096, 2), 32: (4096, 4), 64: (4096, 3), 512: (4096, 1)}
"""(n, split) by tokens."""
LINEARS = [(m, n, split, operand) for m, (n, split) in CUTS.items() for operand in ("w8a8", "bf16")]
LINEARS += [(16, 24576, 1, "bf16"), (64, 24576, 1, "bf16"), (64, 24576, 1, "w8a8"), (512, 4096, 1, "fp32")]
EXTREMES = [case for case in LINEARS if case[0] == 512 or case == (16, 4096, 2, "w8a8")]


@pytest.mark.parametrize(("m", "n", "split", "operand", "capability"), on_every_gpu(LINEARS, EXTREMES))
def test_linear(m, n, split, operand, capability, tmp_path):
    tile = shapes.tile_for(m, n, shapes.chip(capability), 4 if operand == "fp32" else 2, operand == "w8a8")
    built = build_linear(tile, operand, capability, split)
    check(built, operand, capability, tmp_path)
    assert ("atom" in built.asm["ptx"]) == (split > 1)
    if split > 1:
        assert re.search(r"atom\.global\.gpu\.acq_rel\.add", built.asm["ptx"]), (
            "stretches must be seen by who adds them"
        )


GROUPED = list(itertools.product((1, 20, 64, 200), ("w8a8", "bf16")))


@pytest.mark.parametrize(
    ("rows", "operand", "capability"), on_every_gpu(GROUPED, [(1, "w8a8"), (200, "w8a8"), (200, "bf16")])
)
def test_grouped_linear(rows, operand, capability, tmp_path):
    tile = shapes.tile_for(rows, shapes.WIDE, shapes.chip(capability), 2, operand == "w8a8")
    built = build(
        grouped_linear.grouped_linear_kernel,
        CODES | SCALE | SPANS | {"x_ptr": OPERANDS[operand][0], "ends_ptr": "*i64", "out_ptr": "*bf16"},
        ("m", "n", "k", "k_blocks", "groups", "scale_rows", "n_tiles", "x_stride", "x_scale_step"),
        constants_of(tile, operand, capability) | {"GROUPS": 128},
        capability,
        tile,
        ("n", "k", "x_stride"),
    )
    check(built, operand, capability, tmp_path)


OUTS, INPUTS = ((False, 1), (False, 8), (True, 8)), ("*bf16", "*fp16", "*fp32")
QUANTIZED = [(x, *out) for x in INPUTS for out in OUTS]
ONE_OF_EACH = [(x, *out) for x, out in zip(INPUTS, OUTS, strict=True)]


@pytest.mark.parametrize(("x", "codes", "groups", "capability"), on_every_gpu(QUANTIZED, ONE_OF_EACH, whole=()))
def test_quantize_divides_exactly(x, codes, groups, capability):
    built = build(
        quantize.quantize_kernel,
        {"x_ptr": x, "out_ptr": "*u8" if codes else "*fp16", "scale_ptr": "*fp32"},
        ("m", "k", "x_stride", "out_stride", "k_blocks", "scale_token", "scale_block"),
        {"CODES": codes, "UE8M0": False, "GROUPS": groups, "DEPENDENT": shapes.chip(capability).dependent},
        capability,
    )
    check_order(built.asm["ptx"], capability, begins_first=not codes)
    assert "div.rn.f32" in built.asm["ptx"] and "div.full.f32" not in built.asm["ptx"]


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_dequantize(capability):
    built = build(
        dequantize.dequantize_kernel,
        CODES | SPANS | {"scale_ptr": "*fp32", "out_ptr": "*bf16"},
        ("k", "k_blocks"),
        {"HARDWARE": shapes.chip(capability).hardware, "BLOCK_N": 32},
        capability,
    )
    assert built.asm["cubin"]


@pytest.mark.parametrize("moved", ["a load", "the next launch"])
def test_a_launch_that_does_not_wait_is_noticed(moved):
    tile = shapes.tile_for(16, 4096, shapes.chip(90), 2, True)
    built = build_linear(tile, "w8a8", 90, split=1)
    ptx = built.asm["ptx"]
    check_order(ptx, 90)
    with pytest.raises(AssertionError):
        if moved == "a load":
            check_order("\tld.global.b32 {%r1}, [%rd1];\n" + ptx, 90)
        else:
            line = next(line for line in ptx.splitlines() if "launch_dependents" in line)
            check_order(line + "\n" + ptx.replace(line, ""), 90)


def test_a_tile_that_spills_is_noticed(tmp_path):
    tile = shapes.Tile(128, 128, warps=4, stages=2, w_first=True, programs=1)
    built = build_linear(tile, "w8a8", 90, split=1)
    with pytest.raises(AssertionError, match="spilled"):
        check(built, "w8a8", 90, tmp_path)
