"""What the library functions that HIVM calls do, in numpy, for the 910B generation (memory-based vector unit).

A function is recognised by its name, which spells operation, rank and element types. One that is not here is an
error, never a guess. Semantics follow the Ascend C instructions of the same names; NaN goes through min and max
as the operands' own order would not have it (numpy's way), which no device has confirmed.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

ELEMENT: dict[str, np.dtype[Any]] = {
    "float": np.dtype(np.float32),
    "half": np.dtype(np.float16),
    "bfloat16_t": np.dtype(np.uint16),  # as its bits
    "int32_t": np.dtype(np.int32),
    "int16_t": np.dtype(np.int16),
    "int8_t": np.dtype(np.int8),
}
FLOATING = ("float", "half", "bfloat16_t")

ROUND_TO_NEAREST_EVEN, ROUND_TO_ZERO = 0, 4

_BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "max": np.maximum,
    "min": np.minimum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "shl": np.left_shift,
    "shr": np.right_shift,
}


class OutOfBounds(RuntimeError):
    """A kernel touched memory that is neither an argument, nor the workspace, nor the chip's."""


_allowed: list[tuple[int, int]] = []


def allow(ranges: list[tuple[int, int]]) -> None:
    """Set the address ranges, first byte and end, that library functions may touch; for the whole process."""
    _allowed[:] = ranges


def view(descriptor: int, rank: int, element: str) -> Array:
    """The memory behind an MLIR memref descriptor: allocated, aligned, offset, sizes, strides."""
    dtype = ELEMENT[element]
    fields = (ctypes.c_int64 * (3 + 2 * rank)).from_address(descriptor)
    shape, strides = fields[3 : 3 + rank], [s * dtype.itemsize for s in fields[3 + rank : 3 + 2 * rank]]
    if 0 in shape:
        return np.empty(shape, dtype)
    extent = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) + dtype.itemsize
    start = fields[1] + fields[2] * dtype.itemsize
    if not any(first <= start and start + extent <= end for first, end in _allowed):
        raise OutOfBounds(f"{extent} bytes at {start:#x}, shape {tuple(shape)} of {element}")
    memory = (ctypes.c_char * extent).from_address(start)
    return np.ndarray(tuple(shape), dtype, memoryview(memory), 0, tuple(strides))


def read(descriptor: int, rank: int, element: str) -> Array:
    """A copy of a memref's elements; bf16 as fp32."""
    array = view(descriptor, rank, element)
    if element == "bfloat16_t":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.copy()


def write(descriptor: int, rank: int, element: str, values: Any) -> None:
    """Store into a memref, rounding to nearest even where the element is narrower."""
    target = view(descriptor, rank, element)
    if element == "bfloat16_t":
        values = to_bfloat16(values)
    target[...] = np.broadcast_to(np.asarray(values).astype(target.dtype), target.shape)


def to_bfloat16(values: Any) -> Array:
    """bf16 bits of fp32 numbers, to nearest even; a NaN stays one."""
    exact = np.ascontiguousarray(values, np.float32)
    bits = exact.view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(exact), np.uint16(0x7FC0), rounded)


def _from_fractals(tile: Array) -> Array:
    """A matrix out of the cube's layout: (column blocks, row blocks, rows, columns) -> (rows, columns)."""
    column_blocks, row_blocks, rows, columns = tile.shape
    return tile.transpose(1, 2, 0, 3).reshape(row_blocks * rows, column_blocks * columns)


def _to_fractals(matrix: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    column_blocks, row_blocks, rows, columns = shape
    padded = np.zeros((row_blocks * rows, column_blocks * columns), dtype)
    padded[: matrix.shape[0], : matrix.shape[1]] = matrix
    return padded.reshape(row_blocks, rows, column_blocks, columns).transpose(2, 0, 1, 3)


def _copy(element: str, source_rank: int, target_rank: int) -> Callable[..., None]:
    def copy(source: int, target: int, *_: Any) -> None:
        view(target, target_rank, element)[...] = view(source, source_rank, element)

    return copy


def _fill(element: str, rank: int) -> Callable[..., None]:
    def fill(value: Any, target: int, *_: Any) -> None:
        write(target, rank, element, np.asarray(value, np.float32 if element in FLOATING else np.int64))

    return fill


def _cast(source_type: str, target_type: str, rank: int) -> Callable[..., None]:
    def cast(source: int, target: int, *rest: Any) -> None:
        mode = rest[-1]
        values = read(source, rank, source_type)
        if source_type in FLOATING and target_type not in FLOATING:
            if mode not in (ROUND_TO_NEAREST_EVEN, ROUND_TO_ZERO):
                raise NotImplementedError(f"rounding mode {mode} from {source_type} to {target_type}")
            values = (np.rint if mode == ROUND_TO_NEAREST_EVEN else np.trunc)(values).astype(np.int64)
        elif target_type in FLOATING and mode != ROUND_TO_NEAREST_EVEN:
            raise NotImplementedError(f"rounding mode {mode} from {source_type} to {target_type}")
        with np.errstate(over="ignore", invalid="ignore"):
            write(target, rank, target_type, values)

    return cast


def _binary(operation: str, element: str, rank: int, scalar: bool) -> Callable[..., None]:
    def binary(left: int, right: Any, target: int, *_: Any) -> None:
        x = read(left, rank, element)
        y = np.full((1,) * rank, right).astype(x.dtype) if scalar else read(right, rank, element)
        with np.errstate(all="ignore"):
            write(target, rank, element, _BINARY[operation](x, y))

    return binary


def _matrix_product(element: str, transposed_left: bool, transposed_right: bool) -> Callable[..., None]:
    def product(left: int, right: int, start: bool, m: int, k: int, n: int, target: int, *_: Any) -> None:
        a = _from_fractals(read(left, 4, element).astype(np.float32))
        b = _from_fractals(read(right, 4, element).astype(np.float32))
        a, b = (a.T if transposed_left else a), (b.T if transposed_right else b)
        out = view(target, 4, "float")
        added = np.zeros((out.shape[1] * out.shape[2], out.shape[0] * out.shape[3]), np.float32)
        added[:m, :n] = a[:m, :k] @ b[:k, :n]
        fractals = _to_fractals(added, out.shape, np.float32)
        out[...] = fractals if start else out + fractals

    return product


def _to_cube_layout(element: str) -> Callable[..., None]:
    def nd2nz(source: int, target: int, *_: Any) -> None:
        out = view(target, 4, element)
        out[...] = _to_fractals(view(source, 2, element), out.shape, out.dtype)

    return nd2nz


def _from_accumulator(element: str) -> Callable[..., None]:
    def fixpipe(source: int, target: int, *_: Any) -> None:
        matrix = _from_fractals(read(source, 4, "float"))
        rows, columns = view(target, 2, element).shape
        write(target, 2, element, matrix[:rows, :columns])

    return fixpipe


def _reduce_max(element: str, rank: int, target_rank: int) -> Callable[..., None]:
    def reduce(source: int, target: int, *_: Any) -> None:
        write(target, target_rank, element, read(source, rank, element).max(axis=-1, keepdims=True))

    return reduce


def _absolute(element: str, rank: int) -> Callable[..., None]:
    def absolute(source: int, target: int, *_: Any) -> None:
        write(target, rank, element, np.abs(read(source, rank, element)))

    return absolute


def intrinsic(name: str, ranks: list[int | None]) -> Callable[..., None]:
    """The function of that name; `ranks` are those of its memref arguments, None for scalars.

    Raises:
        NotImplementedError: no such function here.
    """
    types = "float|half|bfloat16_t|int32_t|int16_t|int8_t"
    rank = [r or 0 for r in ranks]
    copying = rf"(?:load_gm_to_ubuf|store_ubuf_to_gm|copy_ubuf_to_ubuf)_\dd_({types})"
    rules: list[tuple[str, Callable[[re.Match[str]], Callable[..., None]]]] = [
        (copying, lambda m: _copy(m[1], rank[0], rank[1])),
        (rf"broadcast_scalar_({types})_to_\dd", lambda m: _fill(m[1], rank[1])),
        (rf"set_l1_\dd_({types})", lambda m: _fill(m[1], rank[1])),
        (rf"vcast_({types})_to_({types})_\dd_with_(?:mode|overflow)", lambda m: _cast(m[1], m[2], rank[0])),
        (
            rf"v(add|sub|mul|div|max|min|and|or|shl|shr)s?(_vs)?_\dd_({types})",
            lambda m: _binary(m[1], m[3], rank[0], bool(m[2])),
        ),
        (rf"vabs_\dd_({types})", lambda m: _absolute(m[1], rank[0])),
        (rf"(?:enablevc_)?reduce_max_ar_({types})", lambda m: _reduce_max(m[1], rank[0], rank[1])),
        (rf"nd2nz_({types})", lambda m: _to_cube_layout(m[1])),
        (rf"mma_tile_({types})_to_float(_ta)?(_tb)?", lambda m: _matrix_product(m[1], bool(m[2]), bool(m[3]))),
        (rf"fixpipe_nz2nd_float_to_({types})_4d_to_2d", lambda m: _from_accumulator(m[1])),
    ]
    for pattern, build in rules:
        if match := re.fullmatch(pattern, name):
            return build(match)
    raise NotImplementedError(f"HIVM calls {name}, which the executor does not know")
