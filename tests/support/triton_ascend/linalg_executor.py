"""Runs the linalg form of a kernel on x86: what triton-ascend made of it, before BiShengIR.

Limits: programs run one after another; tensors live on the heap, so neither UB's size nor any memory plan is tried;
arithmetic is x86's (subnormals kept, fp16 through fp32).
"""

from __future__ import annotations

import ctypes
import itertools
import re
from typing import Any

import numpy as np

from tests.support.triton_ascend.compiler import run_passes
from tests.support.triton_ascend.native import NativeModule, kernel_arguments, memref_arguments, to_llvm_ir

ARENA_BYTES = 256 << 20

_BUFFERIZE = (
    "builtin.module(func.func(convert-elementwise-to-linalg,linalg-generalize-named-ops,"
    "linalg-fuse-elementwise-ops,canonicalize,cse),empty-tensor-to-alloc-tensor,"
    "one-shot-bufferize{allow-return-allocs-from-loops=true},convert-bufferization-to-memref,"
    "func.func(finalizing-bufferize))"
)
_TO_LLVM = (
    "builtin.module(expand-strided-metadata,convert-linalg-to-loops,convert-scf-to-cf,lower-affine,"
    "arith-expand{include-bf16=true},convert-math-to-llvm,finalize-memref-to-llvm,convert-func-to-llvm,"
    "convert-cf-to-llvm,convert-index-to-llvm,convert-arith-to-llvm,reconcile-unrealized-casts)"
)

# Nothing frees what bufferization allocates, so all of it comes from an arena that every program starts anew.
_ARENA = """
@arena_top = global i64 {base}
define ptr @arena_allocate(i64 %bytes) {{
  %here = load i64, ptr @arena_top
  %padded = add i64 %bytes, 127
  %rounded = and i64 %padded, -64
  %next = add i64 %here, %rounded
  %over = icmp ugt i64 %next, {end}
  br i1 %over, label %full, label %fits
full:
  call void @llvm.trap()
  unreachable
fits:
  store i64 %next, ptr @arena_top
  %pointer = inttoptr i64 %here to ptr
  ret ptr %pointer
}}
define void @arena_reset() {{
  store i64 {base}, ptr @arena_top
  ret void
}}
declare void @llvm.trap()
"""


class LinalgKernel:
    """A kernel in linalg form, callable with a grid and torch CPU tensors."""

    def __init__(self, linalg: str) -> None:
        match = re.search(r"func\.func @(\w+)", linalg)
        assert match is not None
        module = run_passes(linalg, _BUFFERIZE)
        # A copy between strided buffers would call into a runtime library that is not there.
        module = re.sub(
            r"memref\.copy (%\S+), (%\S+) : (memref<.*>) to (memref<.*>)",
            r"linalg.copy ins(\1 : \3) outs(\2 : \4)",
            module,
        )
        text = to_llvm_ir(run_passes(module, _TO_LLVM))
        assert "memrefCopy" not in text
        self._arena = np.zeros(ARENA_BYTES, np.uint8)
        base = (self._arena.ctypes.data + 63) & ~63
        text = text.replace("declare ptr @malloc(i64)", "").replace("@malloc", "@arena_allocate")
        self._module = NativeModule(text + _ARENA.format(base=base, end=base + ARENA_BYTES - 64))
        self._name = match[1]

    def __call__(self, grid: tuple[int, ...], *arguments: Any) -> None:
        grid = (*grid, 1, 1)[:3]
        # The first two arguments are the block lock and the workspace, which this form never touches.
        head, head_types = memref_arguments(0, 0)
        flat, types = kernel_arguments(arguments)
        kernel = self._module.function(self._name, None, head_types * 2 + types + [ctypes.c_int32] * 6)
        reset = self._module.function("arena_reset", None, [])
        for program in itertools.product(*map(range, grid)):
            reset()
            kernel(*head, *head, *flat, *grid, *program)
