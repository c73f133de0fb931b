"""The Triton kernels on an Ascend NPU or an NVIDIA GPU (or, with TRITON_INTERPRET=1, on a CPU, for tests).

Weights stay at one byte, as lanes of two codes, plus one fp32 scale per row and K block. FP8 tensors are seen as
int8 the moment they arrive: A2 and A3 can neither cast nor copy them. A launch allocates, computes shapes on the
host and never waits for the device, so it can be captured in a CUDA or ACL graph; `pack` does wait.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from typing import Any

import torch

from qwen3_fp8_ascend import reference
from qwen3_fp8_ascend.backends import prefill
from qwen3_fp8_ascend.backends.operators import torch_operator
from qwen3_fp8_ascend.backends.registry import Backend, PackedWeight
from qwen3_fp8_ascend.errors import BlockFp8Error
from qwen3_fp8_ascend.format import DEFAULT_BLOCK, Activation, BlockGrid, BlockSize, ceil_div
from qwen3_fp8_ascend.triton_kernels.configuration import (
    INTERPRETER,
    N_ALIGNMENT,
    Architecture,
    LinearShape,
    architecture,
    check_index_range,
    linear_shape,
)

KEEPS_SUBNORMALS_VARIABLE = "QWEN3_FP8_ASCEND_TRITON_SUBNORMALS"
"""1 or 0: whether the device's fp16 arithmetic keeps subnormals; unset, each device is asked once, when first used."""

_BLOCK = DEFAULT_BLOCK.k
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

_CODE_VALUES, _SCALED, _RESIDUAL = 0, 1, 2  # `triton_kernels.group_quantize`, which needs Triton to be imported


@functools.cache
def _unusable() -> str | None:
    # A folder that happens to be called `triton` on sys.path is a package too, but an empty one.
    if importlib.util.find_spec("triton") is None or importlib.util.find_spec("triton.language") is None:
        return "triton is not installed (triton-ascend on an NPU)"
    if _INTERPRETED:
        return None
    try:
        _chip(_current_device_type())
    except BlockFp8Error as error:
        return str(error).replace("\n", ";")
    return None


def _unsupported(block: BlockSize) -> str | None:
    if block != DEFAULT_BLOCK:
        return f"its kernels are written for blocks of {DEFAULT_BLOCK}, not {block}"
    return None


def _device_module(device_type: str) -> Any:
    """torch.cuda or torch.npu; the latter is there once torch_npu has been imported."""
    if device_type == "npu":
        importlib.import_module("torch_npu")
    return getattr(torch, device_type)


def _has_npu() -> bool:
    return importlib.util.find_spec("torch_npu") is not None and _device_module("npu").is_available()


def _current_device_type() -> str:
    if _INTERPRETED:
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    if _has_npu():
        return "npu"
    raise BlockFp8Error("there is neither an NVIDIA GPU nor an Ascend NPU that torch can see")


@functools.cache
def _chip(device_type: str) -> Architecture:
    if device_type == "cpu":
        return INTERPRETER
    if device_type == "cuda":
        major, minor = torch.cuda.get_device_capability()
        return architecture(f"cuda:{major}{minor}")
    return architecture(_device_module(device_type).get_device_name())


@functools.cache
def _cores(device_type: str, index: int | None) -> tuple[int, int]:
    """How many programs the persistent grids of cube and of vector kernels have: one per core."""
    if device_type == "cpu":
        return 2, 2
    if device_type == "cuda":
        count = torch.cuda.get_device_properties(index).multi_processor_count
        return count, 4 * count
    from triton.runtime.driver import driver

    properties = driver.active.utils.get_device_properties(index)
    return properties["num_aicore"], properties["num_vectorcore"]


@functools.cache
def _kernels() -> Any:
    """The kernel modules, imported when something is launched, since they need Triton."""
    from types import SimpleNamespace

    from qwen3_fp8_ascend.triton_kernels import block_dequantize, block_linear, group_quantize, lanes

    return SimpleNamespace(
        quantize=group_quantize.group_quantize_kernel,
        values=group_quantize.group_values_kernel,
        dequantize=block_dequantize.block_dequantize_kernel,
        packed_dequantize=block_dequantize.packed_dequantize_kernel,
        linear=block_linear.block_linear_kernel,
        pack_lanes=lanes.pack_lanes,
        dot_type=block_linear.tl.float32 if _INTERPRETED else block_linear.tl.float16,
    )


def _linear_options(chip: Architecture, device_type: str) -> dict[str, Any]:
    options: dict[str, Any] = dict(chip.linear_options)
    if device_type == "npu":
        options["enable_auto_bind_sub_block"] = chip.bind_sub_block
    return options


@functools.cache
def keeps_subnormals(device_type: str, index: int | None) -> bool:
    """Whether this device decodes e4m3 subnormals exactly in the cheaper form.

    What a device is known to do is in its configuration; otherwise the cheaper form decodes all codes on it once,
    through the cube as well, and is used only if every one comes out right. The variable
    `QWEN3_FP8_ASCEND_TRITON_SUBNORMALS` decides instead of either.
    """
    forced = os.environ.get(KEEPS_SUBNORMALS_VARIABLE)
    if forced is not None:
        if forced not in ("0", "1"):
            raise BlockFp8Error(f"{KEEPS_SUBNORMALS_VARIABLE} is 0 or 1", got=repr(forced))
        return forced == "1"
    known = _chip(device_type).keeps_subnormals
    if known is not None:
        return known
    return _probe_subnormals(torch.device(device_type if index is None else f"{device_type}:{index}"))


def _probe_subnormals(device: torch.device) -> bool:
    """Multiply all finite codes by 1 with the cheaper form, in both halves of the lanes, and compare on the host."""
    codes = torch.arange(256, dtype=torch.uint8, device="cpu")
    codes[(codes & 0x7F) == 0x7F] = 0
    weight = codes.view(torch.int8).repeat(2 * _BLOCK, 1)  # (256, 256): each row holds every code once
    values = torch.eye(2 * _BLOCK, dtype=torch.float16, device=device)
    ones = torch.ones(2, 2 * _BLOCK, device=device)
    lanes = _kernels().pack_lanes(weight).to(device)
    chip = _chip(device.type)
    cut = linear_shape(2 * _BLOCK, 2 * _BLOCK, 2, _cores(device.type, device.index)[0], chip, True)
    out = _launch_linear(values, ones, lanes, ones, cut, torch.float32, subnormals=True)
    return torch.equal(out[0].cpu(), codes.view(torch.float8_e4m3fn).float()[:, None].expand(-1, 2 * _BLOCK))


def _check_operand(what: str, tensor: torch.Tensor, dtypes: tuple[torch.dtype, ...], device: torch.device) -> None:
    if tensor.dtype not in dtypes:
        raise BlockFp8Error(f"{what} has the wrong dtype", expected=" or ".join(map(str, dtypes)), got=tensor.dtype)
    if tensor.device != device:
        raise BlockFp8Error(f"{what} is on the wrong device", expected=device, got=tensor.device)
    if device.type in ("cuda", "npu") and device.index != (current := _device_module(device.type).current_device()):
        raise BlockFp8Error(
            f"{what} is not on the current device, on which Triton launches",
            expected=f"{device.type}:{current}",
            got=device,
            fix=f"call it within torch.{device.type}.device({device.index})",
        )
    if tensor.dim() != 2:
        raise BlockFp8Error(f"{what} has two dimensions", got=tuple(tensor.shape))
    check_index_range(what, tensor.numel())


def _check_packed(lanes: torch.Tensor, w_scale: torch.Tensor, k: int) -> None:
    """Refuse operands of the operator that `_pack` did not make."""
    pairs = ceil_div(k, 2 * _BLOCK)
    n = w_scale.shape[-1]
    shapes = {"lanes": (pairs, n, _BLOCK), "w_scale": (2 * pairs, n)}
    for (what, shape), tensor, dtype in zip(
        shapes.items(), (lanes, w_scale), (torch.int16, torch.float32), strict=True
    ):
        if tuple(tensor.shape) != shape or tensor.dtype != dtype or not tensor.is_contiguous() or n % N_ALIGNMENT:
            raise BlockFp8Error(
                f"{what} is not a packed weight's",
                where="triton_block_linear",
                expected=f"contiguous {dtype} {shape}, rows a multiple of {N_ALIGNMENT}",
                got=f"{'' if tensor.is_contiguous() else 'strided '}{tensor.dtype} {tuple(tensor.shape)}",
                fix="pass the tensors of ops.pack_weight(..., backend='triton') for this k",
            )


_ACTIVATIONS = (torch.bfloat16, torch.float16, torch.float32)


def _as_int8(codes: torch.Tensor) -> torch.Tensor:
    return codes.view(torch.int8)


def _quantize_activation(x: torch.Tensor, block_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    _check_operand("the activation", x, _ACTIVATIONS, x.device)
    if block_k != _BLOCK:
        raise BlockFp8Error(
            "the Triton kernels quantize groups of one size",
            expected=_BLOCK,
            got=block_k,
            fix="choose the backend `cpu` or `reference`",
        )
    m, k = x.shape
    groups = ceil_div(k, _BLOCK)
    padded = torch.nn.functional.pad(x, (0, groups * _BLOCK - k)).contiguous()
    check_index_range("the activation", padded.numel())
    codes = torch.empty(padded.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty(m, groups, dtype=torch.float32, device=x.device)
    if m * groups:
        rows = _chip(x.device.type).quantize_rows
        cores = min(_cores(x.device.type, x.device.index)[1], ceil_div(m * groups, rows))
        _kernels().quantize[(cores,)](padded, codes, scale, m * groups, ROWS=rows, CORES=cores)
    return codes[:, :k].contiguous().view(torch.float8_e4m3fn), scale


def _dequantize_weight(weight: torch.Tensor, scale: torch.Tensor, grid: BlockGrid, dtype: torch.dtype) -> torch.Tensor:
    codes = _as_int8(weight)
    _check_operand("the weight", codes, (torch.int8,), weight.device)
    _check_operand("the weight's scale", scale, (torch.float32,), weight.device)
    k_blocks = ceil_div(grid.k, _BLOCK)
    padded = torch.nn.functional.pad(codes, (0, k_blocks * _BLOCK - grid.k)).contiguous()
    check_index_range("the weight", padded.numel())
    out = torch.empty(padded.shape, dtype=dtype, device=weight.device)
    chip, device = _chip(weight.device.type), weight.device
    vector_cores = _cores(device.type, device.index)[1]
    row = scale_row = 0
    for width, scale_rows in zip(grid.widths, grid.scale_rows, strict=True):
        tiles = ceil_div(width, chip.dequantize_rows) * k_blocks
        if tiles:
            cores = min(vector_cores, tiles)
            _kernels().dequantize[(cores,)](
                padded[row : row + width],
                scale[scale_row : scale_row + scale_rows].contiguous(),
                out[row : row + width],
                width,
                k_blocks,
                ROWS=chip.dequantize_rows,
                KEEPS_SUBNORMALS=keeps_subnormals(device.type, device.index),
                CORES=cores,
            )
        row += width
        scale_row += scale_rows
    return out[:, : grid.k].contiguous()


def _pack(weight: torch.Tensor, scale: torch.Tensor, grid: BlockGrid) -> tuple[torch.Tensor, ...]:
    """Lanes and row scales, padded with zeros to whole tiles; and, at load, the question about subnormals.

    Shapes: -> lanes (k_padded / 256, n_padded, 128) int16, scales (k_padded / 128, n_padded) fp32, the powers of two
        that normalise the weight for many rows (2,) fp32.
    """
    codes = _as_int8(weight)
    _check_operand("the weight", codes, (torch.int8,), weight.device)
    _check_operand("the weight's scale", scale, (torch.float32,), weight.device)
    n_pad = -grid.n % N_ALIGNMENT
    k_pad = -grid.k % (2 * _BLOCK)
    check_index_range("the packed weight", (grid.n + n_pad) * (grid.k + k_pad))
    lanes = _kernels().pack_lanes(torch.nn.functional.pad(codes, (0, k_pad, 0, n_pad)))
    rows = reference.row_scales(scale, grid).T
    scales = torch.nn.functional.pad(rows, (0, n_pad, 0, 2 * lanes.shape[0] - rows.shape[0])).contiguous()
    keeps_subnormals(weight.device.type, weight.device.index)
    return lanes, scales, prefill.powers_of_weight(scale)


def _unpack_dequantize(lanes: torch.Tensor, scale: torch.Tensor, out: torch.Tensor) -> None:
    """Write a packed weight's values into a scratch.

    Shapes: lanes and scale as `_pack` returns them, out (n_padded, k_padded), bf16, fp16 or fp32, contiguous.
    Semantics: code * scale, rounded once to out's dtype.
    """
    pairs, n, _ = lanes.shape
    chip, device = _chip(lanes.device.type), lanes.device
    cores = min(_cores(device.type, device.index)[1], n // chip.packed_rows * pairs)
    _kernels().packed_dequantize[(cores,)](
        lanes,
        scale,
        out,
        n,
        2 * pairs,
        ROWS=chip.packed_rows,
        KEEPS_SUBNORMALS=keeps_subnormals(device.type, device.index),
        CORES=cores,
    )


def _values(x: torch.Tensor, kind: int, k_blocks: int, m_padded: int) -> tuple[torch.Tensor, torch.Tensor]:
    """fp16 values and scales of an activation, padded as the linear kernel wants them."""
    m, k = x.shape
    chip = _chip(x.device.type)
    padded = torch.nn.functional.pad(x, (0, -k % _BLOCK)).contiguous()
    values = torch.empty(m_padded, k_blocks * _BLOCK, dtype=torch.float16, device=x.device)
    scale = torch.empty(k_blocks, m_padded, dtype=torch.float32, device=x.device)
    check_index_range("the activation", values.numel())
    rows = chip.value_rows
    cores = min(_cores(x.device.type, x.device.index)[1], m_padded // rows * k_blocks)
    _kernels().values[(cores,)](
        padded, values, scale, m, m_padded, padded.shape[1] // _BLOCK, k_blocks, KIND=kind, ROWS=rows, CORES=cores
    )
    return values, scale


def _launch_linear(
    values: torch.Tensor,
    a_scale: torch.Tensor,
    lanes: torch.Tensor,
    w_scale: torch.Tensor,
    cut: LinearShape,
    dtype: torch.dtype,
    subnormals: bool,
) -> torch.Tensor:
    """Partial sums of x @ W.T over `cut.split_k` stretches of K.

    Shapes: values, a_scale, lanes and w_scale as the kernel's -> (split_k, m_padded, n_padded), in `dtype` if that is
        all there is to add up, else in fp32.
    """
    k_blocks, n = w_scale.shape
    # The interpreter truncates where a device rounds, so it writes fp32.
    stored = torch.float32 if cut.split_k > 1 or _INTERPRETED else dtype
    check_index_range("the output", cut.split_k * cut.m_padded * n)
    out = torch.empty(cut.split_k, cut.m_padded, n, dtype=stored, device=values.device)
    device = values.device
    tiles = cut.m_padded // cut.block_m * (n // cut.block_n) * cut.split_k
    cores = min(_cores(device.type, device.index)[0], tiles)
    _kernels().linear[(cores,)](
        values,
        a_scale,
        lanes,
        w_scale,
        out,
        cut.m_padded,
        n,
        k_blocks,
        BLOCK_M=cut.block_m,
        BLOCK_N=cut.block_n,
        SPLIT_K=cut.split_k,
        KEEPS_SUBNORMALS=subnormals,
        DOT=_kernels().dot_type,
        CORES=cores,
        **_linear_options(_chip(device.type), device.type),
    )
    return out


HAND_OVER_ROWS = 64
"""On an NPU, most rows of x for the fused kernel. From 64 rows on the prediction for it is slower than the stock BF16
product (docs/triton.md), since partial products cross L2 with the rows, while the scratch costs one decode."""


def _through_scratch(
    x: torch.Tensor,
    lanes: torch.Tensor,
    w_scale: torch.Tensor,
    powers: torch.Tensor,
    n: int,
    w8a8: bool,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Decode the weight into a scratch, then the stock product; `prefill` says what is rounded."""
    pairs, rows, _ = lanes.shape
    weight = prefill.scratch(rows, 2 * pairs * _BLOCK, x)
    _unpack_dequantize(lanes, w_scale * powers[0], weight)
    if w8a8:
        m, k_blocks = x.shape[0], ceil_div(x.shape[1], _BLOCK)
        row_tile = _chip(x.device.type).value_rows
        values, scale = _values(x, _CODE_VALUES, k_blocks, ceil_div(m, row_tile) * row_tile)
        operand, grow = prefill.normalise_groups(values[:m].unflatten(1, (k_blocks, _BLOCK)), scale.T[:m], x)
    else:
        operand, grow = prefill.normalise_rows(x)
    return prefill.multiply(operand, weight, n, grow * powers[1], bias, x.dtype)


def _fake_linear(
    x: torch.Tensor,
    lanes: torch.Tensor,
    w_scale: torch.Tensor,
    powers: torch.Tensor,
    n: int,
    w8a8: bool,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    return x.new_empty(x.shape[0], n)


@torch_operator(_fake_linear)
def triton_block_linear(
    x: torch.Tensor,
    lanes: torch.Tensor,
    w_scale: torch.Tensor,
    powers: torch.Tensor,
    n: int,
    w8a8: bool,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """x @ W.T + bias of a packed weight.

    Shapes: x (m, k), lanes, w_scale and powers as `_pack` returns them, bias (n,) -> (m, n) in x.dtype.
    """
    _check_operand("the activation", x, _ACTIVATIONS, lanes.device)
    _check_packed(lanes, w_scale, x.shape[1])
    m = x.shape[0]
    k_blocks, n_padded = w_scale.shape
    device = lanes.device
    if device.type == "npu" and m > HAND_OVER_ROWS and k_blocks and prefill.fits(n_padded, k_blocks * _BLOCK):
        return _through_scratch(x, lanes, w_scale, powers, n, w8a8, bias)
    subnormals = keeps_subnormals(device.type, device.index)
    cores = _cores(device.type, device.index)[0]
    cut = linear_shape(m, n_padded, k_blocks, cores, _chip(device.type), subnormals)
    # fp16 cannot hold fp32 activations: what it loses is multiplied separately.
    exact = not w8a8 and x.dtype == torch.float32
    kinds = (_CODE_VALUES,) if w8a8 else (_SCALED, _RESIDUAL) if exact else (_SCALED,)
    # Sums that a bias is still added to are not rounded before: then the kernel writes fp32.
    stored = x.dtype if bias is None else torch.float32
    total: torch.Tensor | None = None
    for kind in kinds:
        values, a_scale = _values(x, kind, k_blocks, cut.m_padded)
        out = _launch_linear(values, a_scale, lanes, w_scale, cut, stored, subnormals)
        part = out[0] if cut.split_k == 1 else out.sum(0)
        total = part if total is None else total + part
    assert total is not None
    total = total[:m, :n]
    if bias is not None:
        total = total + bias.float()
    return total.to(x.dtype).clone(memory_format=torch.contiguous_format)


def _linear(x: torch.Tensor, packed: PackedWeight, bias: torch.Tensor | None, activation: Activation) -> torch.Tensor:
    return triton_block_linear(x, *packed.tensors, packed.n, activation is Activation.W8A8, bias)


def _plan() -> tuple[tuple[str, str], ...]:
    if _current_device_type() != "npu":
        return (("any", "fused kernel, exact"),)
    return (
        (f"m <= {HAND_OVER_ROWS}", "fused kernel, exact"),
        (f"m > {HAND_OVER_ROWS}", prefill.PLAN),
    )


BACKEND = Backend(
    name="triton",
    summary="Triton kernels for Ascend A2/A3/A5 and NVIDIA; never run on an NPU so far",
    computes=frozenset(Activation),
    device_types=frozenset({"npu", "cuda", "cpu"} if _INTERPRETED else {"npu", "cuda"}),
    unusable=_unusable,
    pack=_pack,
    linear=_linear,
    quantize_activation=_quantize_activation,
    dequantize_weight=_dequantize_weight,
    unsupported=_unsupported,
    plan=_plan,
)
