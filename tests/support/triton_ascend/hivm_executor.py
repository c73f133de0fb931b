"""Runs the module that BiShengIR hands to hivmc on x86: after the memory plan, the core split and all flags.

UB, L1 and L0C are byte arrays that kernels address as the memory plan says, filled with a pattern before each block.
A block of a mixed kernel runs as three threads, one cube core and two vector cores, which wait for one another
through the cross-core flags in the module: a missing flag is a deadlock that is reported, a surplus one an error.

Limits: blocks run one after another. Within a core everything runs in program order, so flags between the pipes
of one core are not tried. Arithmetic is numpy's and x86's. The 910B generation only: 950 has another vector unit.
"""

from __future__ import annotations

import ctypes
import itertools
import re
import struct
import threading
from collections import Counter
from typing import Any

from tests.support.triton_ascend.compiler import run_passes
from tests.support.triton_ascend.hivm_intrinsics import allow, intrinsic
from tests.support.triton_ascend.native import NativeModule, kernel_arguments, memref_arguments, to_llvm_ir

L1_BYTES, L0C_BYTES, UB_BYTES = 512 << 10, 128 << 10, 192 << 10
CHIP_BYTES = L1_BYTES + L0C_BYTES + 2 * UB_BYTES
SPACE_START = {"cbuf": 0, "cc": L1_BYTES}  # UB's start depends on the vector core
POISON = 0xCB
DEADLOCK_S = 5.0

_TO_LLVM = (
    "builtin.module(expand-strided-metadata,lower-affine,arith-expand,convert-scf-to-cf,finalize-memref-to-llvm,"
    "convert-func-to-llvm,convert-cf-to-llvm,convert-index-to-llvm,convert-arith-to-llvm,reconcile-unrealized-casts)"
)
_CALLBACKS = {
    "machine_block": ("() -> i64", ctypes.CFUNCTYPE(ctypes.c_int64)),
    "machine_sub_block": ("() -> i64", ctypes.CFUNCTYPE(ctypes.c_int64)),
    "machine_ub_start": ("() -> index", ctypes.CFUNCTYPE(ctypes.c_int64)),
    "machine_set": ("(i64) -> ()", ctypes.CFUNCTYPE(None, ctypes.c_int64)),
    "machine_wait": ("(i64) -> ()", ctypes.CFUNCTYPE(None, ctypes.c_int64)),
}
_SCALARS = {
    "i1": ctypes.c_bool,
    "i8": ctypes.c_int8,
    "i16": ctypes.c_int16,
    "i32": ctypes.c_int32,
    "i64": ctypes.c_int64,
    "index": ctypes.c_int64,
    "f32": ctypes.c_float,
    "f16": ctypes.c_float,  # in the low half of the register
    "bf16": ctypes.c_float,
}


class ExecutionError(RuntimeError):
    """The kernel did something that the machine would not allow, or waited for a flag that never came."""


class _Core(threading.local):
    block = 0
    kind = "vector"
    sub_block = 0


class _Translation:
    """HIVM text as plain MLIR: memory spaces become offsets into one array, HIVM operations calls."""

    def __init__(self, hivm: str) -> None:
        self.library: dict[str, list[str]] = {}
        self.kernels: list[str] = []
        self.workspace_function: str | None = None
        self._fresh = itertools.count()
        lines = [self._line(line) for line in hivm.split("\n")]
        self.text = "\n".join(re.sub(r" \{hivm\.[^}]*\}", "", line) for line in lines if line is not None)
        if left := set(re.findall(r"(?:hivm|hacc|hfusion)\.[\w.]+", self.text)):
            raise NotImplementedError(f"HIVM operations that the executor does not know: {sorted(left)}")

    @staticmethod
    def _without_spaces(text: str) -> str:
        return re.sub(r",? ?#hivm\.address_space<\w+>", "", text)

    def _line(self, line: str) -> str | None:
        text = line.strip()
        if text.startswith("module"):
            declared = "\n".join(
                f"func.func private @{name}{kind} attributes {{llvm.emit_c_interface}}"
                for name, (kind, _) in _CALLBACKS.items()
            )
            return f"module {{\nmemref.global @machine_memory : memref<{CHIP_BYTES}xi8> = uninitialized\n{declared}"
        if text.startswith("func.func"):
            return self._function(text)
        if text.startswith("annotation.") or re.match(
            r"hivm\.hir\.(set_flag|wait_flag|pipe_barrier|set_mask_norm|set_ffts_base_addr)", text
        ):
            return None
        if match := re.match(r"(%\S+) = hivm\.hir\.get_(sub_)?block_idx", text):
            return f"{match[1]} = func.call @machine_{match[2] or ''}block() : () -> i64"
        if match := re.match(r"hivm\.hir\.sync_block_(set|wait)\[.*?\] flag = (\S+)", text):
            return self._flag(match[1], match[2])
        if "hivm.hir.pointer_cast" in text:
            return self._pointer(text)
        text = self._without_spaces(line)
        if match := re.match(r"\s*(%\S+) = hivm\.hir\.bitcast (%\S+) : (.*) -> (.*)", text):
            return f"{match[1]} = builtin.unrealized_conversion_cast {match[2]} : {match[3]} to {match[4]}"
        return text

    def _function(self, text: str) -> str:
        plain = re.sub(r" \{(?:hacc|tt|hivm)[^{}]*\}", "", self._without_spaces(text))
        match = re.search(r"func\.func (private )?@(\w+)\((.*?)\)( -> [^ ]+)?( attributes.*| \{)?$", plain)
        if match is None:
            raise NotImplementedError(f"a function the executor cannot read: {text[:200]}")
        private, name, arguments, result = match[1], match[2], match[3], match[4] or ""
        if private:
            self.library[name] = _split(arguments)
            return f"func.func private @{name}({arguments}){result} attributes {{llvm.emit_c_interface}}"
        body = f"func.func @{name}({arguments}){result} {{"
        if "infer_workspace" in name:
            self.workspace_function = name
        elif "infer_" not in name:
            self.kernels.append(name)
            body += (
                f"\n%machine = memref.get_global @machine_memory : memref<{CHIP_BYTES}xi8>"
                "\n%ub_start = func.call @machine_ub_start() : () -> index"
            )
        return body

    def _flag(self, action: str, flag: str) -> str:
        if flag.startswith("%"):
            return f"func.call @machine_{action}({flag}) : (i64) -> ()"
        value = f"%flag{next(self._fresh)}"
        return f"{value} = arith.constant {flag} : i64\nfunc.call @machine_{action}({value}) : (i64) -> ()"

    def _pointer(self, text: str) -> str:
        match = re.match(r"(%\S+) = hivm\.hir\.pointer_cast\((%\S+?)\) : (.*)", text)
        space = re.search(r"address_space<(\w+)>", text)
        if match is None or space is None:
            raise NotImplementedError(f"a pointer the executor cannot read: {text[:200]}")
        i = next(self._fresh)
        if space[1] == "ub":
            lines, start = [], "%ub_start"
        else:
            start = f"%start{i}"
            lines = [f"{start} = arith.constant {SPACE_START[space[1]]} : index"]
        lines += [
            f"%address{i} = arith.index_cast {match[2]} : i64 to index",
            f"%place{i} = arith.addi %address{i}, {start} : index",
            f"{match[1]} = memref.view %machine[%place{i}][] : memref<{CHIP_BYTES}xi8> to "
            + self._without_spaces(match[3]),
        ]
        return "\n".join(lines)


def _split(arguments: str) -> list[str]:
    """The types of an argument list, split at the commas that are not inside brackets."""
    parts, depth, current = [], 0, ""
    for character in arguments + ",":
        if character == "," and depth == 0:
            parts.append(current.strip())
            current = ""
            continue
        depth += (character in "<[") - (character in ">]")
        current += character
    return [part for part in parts if part]


class HivmKernel:
    """A kernel as hivmc would get it, callable with a grid and torch CPU tensors.

    `calls` counts the library functions called, over all blocks and cores.
    """

    def __init__(self, hivm: str) -> None:
        translation = _Translation(hivm)
        self.calls: Counter[str] = Counter()
        self._core = _Core()
        self._flags: Counter[tuple[str, int, int]] = Counter()
        self._changed = threading.Condition()
        self._failure: BaseException | None = None
        symbols: dict[str, Any] = {
            "_mlir_ciface_machine_block": _CALLBACKS["machine_block"][1](lambda: self._core.block),
            "_mlir_ciface_machine_sub_block": _CALLBACKS["machine_sub_block"][1](lambda: self._core.sub_block),
            "_mlir_ciface_machine_ub_start": _CALLBACKS["machine_ub_start"][1](
                lambda: L1_BYTES + L0C_BYTES + UB_BYTES * self._core.sub_block
            ),
            "_mlir_ciface_machine_set": _CALLBACKS["machine_set"][1](self._set),
            "_mlir_ciface_machine_wait": _CALLBACKS["machine_wait"][1](self._wait),
        }
        for name, arguments in translation.library.items():
            symbols[f"_mlir_ciface_{name}"] = self._callback(name, arguments)
        self._module = NativeModule(to_llvm_ir(run_passes(translation.text, _TO_LLVM)), symbols)
        self.kernels = translation.kernels
        self.mixed = len(self.kernels) > 1
        size = translation.workspace_function
        self.workspace_bytes = self._module.function(size, ctypes.c_int64, [])() if size else 0
        self._memory = self._module.address("machine_memory")

    def _callback(self, name: str, arguments: list[str]) -> Any:
        ranks: list[int | None] = []
        types: list[Any] = []
        halves = [(i, kind) for i, kind in enumerate(arguments) if kind in ("f16", "bf16")]
        for kind in arguments:
            if kind.startswith("memref<"):
                ranks.append(kind[7:].split(",")[0].rstrip(">").count("x"))
                types.append(ctypes.c_void_p)
            else:
                ranks.append(None)
                types.append(_SCALARS[kind])
        function = intrinsic(name, ranks)

        def call(*values: Any) -> None:
            if self._failure is not None:
                return
            try:
                given = list(values)
                for i, kind in halves:
                    given[i] = _half(given[i], kind)
                self.calls[name] += 1
                function(*given)
            except BaseException as error:  # an exception cannot cross machine code
                self._fail(error)

        return ctypes.CFUNCTYPE(None, *types)(call)

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self._failure = self._failure or error
            self._changed.notify_all()

    def _set(self, flag: int) -> None:
        """The cube core signals both vector cores; a vector core signals the cube core, which waits for both."""
        core = self._core
        with self._changed:
            if core.kind == "cube":
                self._flags.update([("vector", 0, flag), ("vector", 1, flag)])
            else:
                self._flags[("cube", core.sub_block, flag)] += 1
            self._changed.notify_all()

    def _wait(self, flag: int) -> None:
        core = self._core
        wanted = [("cube", 0, flag), ("cube", 1, flag)] if core.kind == "cube" else [("vector", core.sub_block, flag)]
        with self._changed:
            came = self._changed.wait_for(
                lambda: self._failure is not None or all(self._flags[key] > 0 for key in wanted), DEADLOCK_S
            )
            if self._failure is not None:
                return
            if not came:
                self._failure = ExecutionError(
                    f"deadlock: {core.kind} core {core.sub_block} waits for flag {flag}, which nobody sets"
                )
                self._changed.notify_all()
                return
            self._flags.subtract(wanted)

    def __call__(self, grid: tuple[int, ...], *arguments: Any) -> None:
        """Run every block.

        Raises:
            ExecutionError: a deadlock, or flags left over at the end of a block.
            OutOfBounds: memory was touched that is not the kernel's.
        """
        grid = (*grid, 1, 1)[:3]
        blocks = grid[0] * grid[1] * grid[2]
        workspace = ctypes.create_string_buffer(max(1, self.workspace_bytes) * blocks + 64)
        lock, types = memref_arguments(0, 0)
        space, _ = memref_arguments(ctypes.addressof(workspace), len(workspace))
        flat, flat_types = kernel_arguments(arguments)
        ranges = [(self._memory, self._memory + CHIP_BYTES)]
        ranges.append((ctypes.addressof(workspace), ctypes.addressof(workspace) + len(workspace)))
        for tensor in (value for value in arguments if hasattr(value, "data_ptr")):
            ranges.append((tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size()))
        allow(ranges)
        values = [0, *lock, *space, *flat, *grid]
        kinds = [ctypes.c_int64, *types, *types, *flat_types, *([ctypes.c_int32] * 3)]
        functions = {name: self._module.function(name, None, kinds) for name in self.kernels}
        self._failure = None

        def run(name: str, block: int, kind: str, sub_block: int) -> None:
            self._core.block, self._core.kind, self._core.sub_block = block, kind, sub_block
            functions[name](*values)

        for block in range(blocks):
            self._flags.clear()
            ctypes.memset(self._memory, POISON, CHIP_BYTES)
            jobs = []
            for name in self.kernels:
                if name.endswith("_mix_aic"):
                    jobs.append((name, block, "cube", 0))
                else:
                    jobs += [(name, block, "vector", i) for i in range(2 if self.mixed else 1)]
            threads = [threading.Thread(target=run, args=job) for job in jobs]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            if self._failure is not None:
                raise self._failure
            if left := {key: count for key, count in self._flags.items() if count}:
                raise ExecutionError(f"block {block} ended with cross-core flags nobody waited for: {left}")


def _half(value: float, kind: str) -> float:
    """A 16-bit float that arrived in the low half of a float register."""
    bits = int.from_bytes(bytes(ctypes.c_float(value))[:2], "little")
    if kind == "bf16":
        return ctypes.c_float.from_buffer_copy((bits << 16).to_bytes(4, "little")).value
    return float(struct.unpack("<e", bits.to_bytes(2, "little"))[0])
