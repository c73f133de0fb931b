"""The CPU backend: C++ kernels that decode e4m3 weights in registers (csrc/cpu), one byte a weight.

The library holds one level of kernels per instruction set and uses the best that the machine has;
`QWEN3_FP8_ASCEND_CPU_ISA` lowers it.
"""

from __future__ import annotations

import functools
import logging
import math
import mmap
import os
import platform
from collections.abc import Iterable
from pathlib import Path

import torch

from qwen3_fp8_ascend import torch_range
from qwen3_fp8_ascend.backends import cpu_fakes
from qwen3_fp8_ascend.backends.registry import Backend, PackedWeight
from qwen3_fp8_ascend.format import SMALLEST_BLOCK, Activation, BlockGrid, BlockSize, ceil_div
from qwen3_fp8_ascend.glu import Glu

logger = logging.getLogger(__name__)

ENVIRONMENT_VARIABLE = "QWEN3_FP8_ASCEND_CPU_ISA"

LIBRARY = Path(__file__).resolve().parent.parent / "_cpu.so"

ISAS_OF_ARCHITECTURE = {
    "x86_64": ("portable", "avx2", "avx512f", "avx512", "amx"),
    "aarch64": ("portable", "neon", "neon_bf16"),
}
"""Levels of kernels from lowest to highest; a machine that has one has those before it.

avx512f needs F, BW, VL and DQ (Skylake-SP, Cascade Lake, Ice Lake; of Intel's processors all without AMX take it);
avx512 adds VBMI, VBMI2 and BF16 (Zen 4 and later); amx adds AMX-BF16 (Sapphire Rapids and later).
neon is what every AArch64 processor has; neon_bf16 adds the bf16 instructions of Armv8.6 (Graviton 3, Kunpeng 920B).
"""


def _architecture() -> str:
    """The processor's architecture under the name that Linux has for it."""
    machine = platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(machine, machine)


ISAS = ISAS_OF_ARCHITECTURE.get(_architecture(), ("portable",))
"""The levels of this machine's architecture (`Isa` in csrc/cpu/isa.h)."""

PANEL_ROWS = SMALLEST_BLOCK.n
"""Weight rows that are laid out together; csrc/cpu/kernels.h draws the packed layout."""

HUGE_PAGE = 1 << 21

QUANTIZATIONS = {Activation.W8A16: 0, Activation.W8A8: 1, Activation.W8A8_UE8M0: 2}
"""`Quantization` in csrc/cpu/kernels.h."""

_OPS = torch.ops.qwen3_fp8_ascend


@functools.cache
def unusable() -> str | None:
    """Load the library and choose the instruction set; the reason why not, or None."""
    if not LIBRARY.is_file():
        return (
            f"the C++ library {LIBRARY.name} was not built; reinstall with a C++ compiler present: "
            "pip install --no-build-isolation --force-reinstall --no-deps qwen3-fp8-ascend"
        )
    if torch_range.is_too_old(torch.__version__):
        return f"its library is for torch {torch_range.DESCRIBED}, and this is torch {torch.__version__}"
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        return (
            f"the C++ library {LIBRARY.name} cannot be loaded ({error}); it is for torch {torch_range.DESCRIBED} "
            f"(here: {torch.__version__}) and the processor type it was built for"
        )
    try:
        cpu_fakes.register()
    except RuntimeError as error:  # torch's way of saying that the library has no such operator
        return f"the C++ library {LIBRARY.name} is older than this package ({error}); install it again, or `make venv`"
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_after_fork)
    return _choose_isa()


def _after_fork() -> None:
    """Keep torch from waiting for OpenMP threads that a fork did not take along (csrc/cpu/parallel.cpp)."""
    if _OPS.cpu_threads_lost():
        torch.set_num_threads(1)
        logger.info("torch is set to one thread in this forked process: OpenMP would wait for its parent's")


def _choose_isa() -> str | None:
    """Lower the instruction set if the environment asks for it; the reason why that cannot be, or None."""
    forced = os.environ.get(ENVIRONMENT_VARIABLE)
    if not forced:
        return None
    if forced not in isas():
        known = any(forced in levels for levels in ISAS_OF_ARCHITECTURE.values())
        problem = "not available" if known else "unknown"
        return f"{ENVIRONMENT_VARIABLE}={forced!r} is {problem}; this machine has {', '.join(isas())}"
    set_isa(forced)
    return None


def isas() -> tuple[str, ...]:
    """The instruction sets that this machine can run, from lowest to highest."""
    return ISAS[: _OPS.cpu_best_isa() + 1]


def levels() -> dict[str, dict[str, str]]:
    """The same, and the environment that holds a process to each."""
    return {name: {ENVIRONMENT_VARIABLE: name} for name in isas()}


def isa() -> str:
    """The instruction set in use."""
    return ISAS[_OPS.cpu_current_isa()]


def set_isa(name: str) -> None:
    """Use another instruction set from now on, in the whole process; meant for tests and benchmarks.

    Raises:
        RuntimeError: this machine does not have it.
        ValueError: there is no such level.
    """
    _OPS.cpu_set_isa(ISAS.index(name))


def register_rows(name: str) -> int:
    """Up to this many bf16 rows, `block_linear` on an instruction set decodes weights in registers; more share tiles.

    In W8A8 a row of x is one such row; in W8A16 it is one in bf16, two in fp16, three in fp32.
    """
    return _OPS.cpu_register_rows(ISAS.index(name))


def empty_bytes(shape: tuple[int, ...]) -> torch.Tensor:
    """Uninitialised bytes on 2 MiB pages where the system has them: without, reading weights is half as fast."""
    size = math.prod(shape)
    if size < HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=torch.uint8)
    # Only whole, aligned 2 MiB ranges become huge pages, so the codes start at one; what lies before is never touched.
    memory = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    offset = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % HUGE_PAGE
    return torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=offset).view(shape)


def _panel_table(grid: BlockGrid) -> torch.Tensor:
    """First row, rows and scale row of each panel, and room for a mark that `cpu_pack` sets."""
    rows = [
        (span.start + first, min(PANEL_ROWS, span.rows - first), span.scale_row, 0)
        for span in grid.spans()
        for first in range(0, span.rows, PANEL_ROWS)
    ]
    return torch.tensor(rows, dtype=torch.int32).reshape(-1, 4)


def pack(weight: torch.Tensor, scale: torch.Tensor, grid: BlockGrid) -> tuple[torch.Tensor, ...]:
    panels = _panel_table(grid)
    codes = empty_bytes((panels.shape[0], ceil_div(grid.k, 4) * 4, PANEL_ROWS))
    _OPS.cpu_pack(weight, panels, codes)
    return codes, scale.clone(), panels


def linear(x: torch.Tensor, packed: PackedWeight, bias: torch.Tensor | None, activation: Activation) -> torch.Tensor:
    codes, scales, panels = packed.tensors
    grid = packed.grid
    quantization = QUANTIZATIONS[activation]
    return _OPS.cpu_block_linear(x, codes, scales, panels, bias, grid.n, grid.k, grid.block.k, quantization)


def pack_experts(weights: Iterable[torch.Tensor], scales: torch.Tensor, grid: BlockGrid) -> tuple[torch.Tensor, ...]:
    """All experts in one piece of memory, filled one by one."""
    panels = _panel_table(grid).repeat(scales.shape[0], 1, 1)
    codes = empty_bytes((*panels.shape[:2], ceil_div(grid.k, 4) * 4, PANEL_ROWS))
    for expert, weight in enumerate(weights):
        _OPS.cpu_pack(weight, panels[expert], codes[expert])
    return codes, scales.clone(), panels


def grouped_linear(
    x: torch.Tensor, packed: PackedWeight, ends: torch.Tensor, activation: Activation, dtype: torch.dtype
) -> torch.Tensor:
    grid = packed.grid
    quantization = QUANTIZATIONS[activation]
    x = x.to(dtype)  # the kernel's results have x's dtype; as fp32, x has the same codes
    return _OPS.cpu_grouped_linear(x, *packed.grouped_tensors, ends, grid.n, grid.k, grid.block.k, quantization)


def glu_product(h: torch.Tensor, glu: Glu) -> torch.Tensor:
    return _OPS.cpu_glu_product(h, *glu.numbers)


def block_experts(
    x: torch.Tensor,
    w13: PackedWeight,
    w2: PackedWeight,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    activation: Activation,
    glu: Glu,
) -> torch.Tensor:
    tensors = *w13.grouped_tensors, *w2.grouped_tensors, topk_weights, topk_ids
    quantization = QUANTIZATIONS[activation]
    return _OPS.cpu_block_experts(x, *tensors, w2.k, w2.grid.block.k, quantization, *glu.numbers)


def quantize_activation(x: torch.Tensor, block_k: int, activation: Activation) -> tuple[torch.Tensor, torch.Tensor]:
    return _OPS.cpu_quantize_activation(x, block_k, QUANTIZATIONS[activation])


def dequantize_weight(weight: torch.Tensor, scale: torch.Tensor, grid: BlockGrid, dtype: torch.dtype) -> torch.Tensor:
    blocks = torch.arange(grid.scale_shape[0], dtype=torch.int32)
    rows = blocks.repeat_interleave(torch.tensor([span.rows for span in grid.spans()]), output_size=grid.n)
    # A copy, because the scale of a tensor over a buffer may start at an address that is no multiple of 4.
    return _OPS.cpu_dequantize_weight(weight, scale.clone(), rows, grid.block.k, dtype)


def plan() -> tuple[tuple[str, str], ...]:
    limit = register_rows(isa())
    if limit == 0:
        return (("any", f"decoded into tiles ({isa()})"),)
    return ((f"m <= {limit}", f"decoded in registers ({isa()})"), (f"m > {limit}", f"decoded into tiles ({isa()})"))


def unsupported(block: BlockSize) -> str | None:
    if block.n < SMALLEST_BLOCK.n or block.k % SMALLEST_BLOCK.k:
        rows, columns = SMALLEST_BLOCK
        return f"needs blocks of at least {rows} rows and a multiple of {columns} columns, not {block}"
    return None


BACKEND = Backend(
    name="cpu",
    summary="C++ kernels for AMX, AVX-512, AVX2, NEON or any processor; weights decoded in registers",
    computes=frozenset(Activation),
    device_types=frozenset({"cpu"}),
    unusable=unusable,
    pack=pack,
    linear=linear,
    quantize_activation=quantize_activation,
    dequantize_weight=dequantize_weight,
    pack_experts=pack_experts,
    grouped_linear=grouped_linear,
    glu_product=glu_product,
    block_experts=block_experts,
    unsupported=unsupported,
    detail=isa,
    plan=plan,
    levels=levels,
    checks_operands=True,
)
