"""MLIR in the LLVM dialect to machine code in this process, with the calls back into Python that it needs."""

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm
from triton._C.libtriton import ir
from triton._C.libtriton import llvm as triton_llvm


def to_llvm_ir(module: str) -> str:
    """LLVM IR of a module that is entirely in the LLVM dialect."""
    with tempfile.NamedTemporaryFile("w", suffix=".mlir") as file:
        file.write(module)
        file.flush()
        context = ir.context()
        ir.load_dialects(context)
        parsed = ir.parse_mlir_module(file.name, context)
        parsed.context = context  # keeps it alive
        return str(triton_llvm.to_module(parsed, triton_llvm.context()))


class NativeModule:
    """LLVM IR compiled for this machine; `symbols` are C functions that it may call.

    MCJIT resolves names in one table per process, so two modules may not need different functions under one name.
    """

    def __init__(self, llvm_ir: str, symbols: dict[str, Any] | None = None) -> None:
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        self._kept = dict(symbols or {})
        for name, function in self._kept.items():
            llvm.add_symbol(name, ctypes.cast(function, ctypes.c_void_p).value)
        module = llvm.parse_assembly(llvm_ir)
        module.verify()
        # Hardly optimized: that would take longer than the kernels run here.
        machine = llvm.Target.from_default_triple().create_target_machine(
            opt=1, cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten()
        )
        self._engine = llvm.create_mcjit_compiler(module, machine)
        self._engine.finalize_object()

    def function(self, name: str, result: Any, arguments: list[Any]) -> Callable[..., Any]:
        """A function of the module, called through ctypes."""
        return ctypes.CFUNCTYPE(result, *arguments)(self._engine.get_function_address(name))

    def address(self, name: str) -> int:
        """Where a global of the module lies."""
        return int(self._engine.get_global_value_address(name))


def memref_arguments(pointer: int, elements: int) -> tuple[list[Any], list[Any]]:
    """A one-dimensional memref as MLIR passes it: allocated, aligned, offset, size, stride."""
    return [pointer, pointer, 0, elements, 1], [ctypes.c_void_p] * 2 + [ctypes.c_int64] * 3


def kernel_arguments(values: tuple[Any, ...]) -> tuple[list[Any], list[Any]]:
    """A kernel's own arguments: tensors as memrefs, floats as f32, everything else as i32."""
    flat: list[Any] = []
    types: list[Any] = []
    for value in values:
        if hasattr(value, "data_ptr"):
            assert value.is_contiguous()
            more, more_types = memref_arguments(value.data_ptr(), value.numel())
            flat += more
            types += more_types
        elif isinstance(value, float):
            flat.append(value)
            types.append(ctypes.c_float)
        else:
            flat.append(int(value))
            types.append(ctypes.c_int32)
    return flat, types
