"""Triton source to the last module BiShengIR makes, without CANN, an NPU or torch_npu.

triton-ascend lowers to linalg; `bishengir-compile` of the wheel `ascendnpu-ir` runs every HFusion and HIVM pass
and then calls CANN's `hivmc` to make machine code. A recorder stands in hivmc's place and keeps its input.
Reaching it means that all passes ran: fusion, the split into cube and vector cores, cross-core flags and the memory
plan (UB, L1 and L0 suffice). What is not shown: machine code, timing, the hardware's own numerics.
"""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend

IR_VERSIONS = ("1.1.0", "1.2.0")
TIME_LIMIT_S = 120

_RECORDER = """#!/bin/sh
if [ "$1" = "--version" ]; then echo "hivmc 0.1.0 (recorder)"; exit 0; fi
cp "$1" "$HIVMC_RECORD"
exit 3
"""


class CompileError(RuntimeError):
    """A pass refused the kernel; the message is the compiler's."""


@dataclass(frozen=True)
class KernelCase:
    """A kernel with the types and constants it is compiled for.

    `signature` names every argument in order: a Triton type, or "constexpr" for those in `constants`.
    """

    name: str
    function: Any
    signature: dict[str, str]
    constants: dict[str, Any]


def tool(name: str, ir_version: str) -> Path:
    """An executable of the wheel `ascendnpu-ir`, which is unpacked beside this environment's site-packages.

    Raises:
        FileNotFoundError: that version is not there.
    """
    root = Path(os.environ.get("ASCENDNPU_IR_ROOT", Path(sys.prefix) / "ascendnpu-ir"))
    path = root / ir_version / "ascendnpuir" / "bin" / name
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: run `make test-triton-ascend`, or set ASCENDNPU_IR_ROOT")
    if not os.access(path, os.X_OK):
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def is_950(architecture: str) -> bool:
    """Whether a target name is of the Ascend 950 family, which has a compiler of its own."""
    return architecture.startswith(("Ascend950", "Ascend910_95"))


_linalg: dict[tuple[Any, str, str, bool], str] = {}


def lower_to_linalg(case: KernelCase, architecture: str) -> str:
    """The kernel as linalg on tensors: triton-ascend's last own stage ("ttadapter"), made once for a family of chips.

    Raises:
        CompileError: the kernel leaves the subset that triton-ascend accepts.
    """
    key = (case.function, repr(case.signature), repr(case.constants), is_950(architecture))
    if key not in _linalg:
        _linalg[key] = _lower(case, architecture)
    return _linalg[key]


def _lower(case: KernelCase, architecture: str) -> str:
    target = GPUTarget("npu", architecture, 0)
    backend = make_backend(target)
    options = backend.parse_options({"compile_on_910_95": True} if is_950(architecture) else {})
    source = ASTSource(fn=case.function, signature=case.signature, constants=case.constants)
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    stages: dict[str, Any] = {}
    backend.add_stages(stages, options)
    metadata = {"hash": "offline", "target": target, **options.__dict__}
    try:
        module = source.make_ir(options, backend.get_codegen_implementation(), backend.get_module_map(), context)
        linalg: str = stages["ttadapter"](stages["ttir"](module, metadata), metadata)
    except subprocess.CalledProcessError as error:
        raise CompileError(f"{case.name}: triton-adapter-opt: {error.stderr.decode(errors='replace')}") from None
    return linalg


def compile_to_hivm(
    linalg: str, architecture: str, ir_version: str, *, multi_buffer: bool = True, bind_sub_block: bool = True
) -> str:
    """The module that `bishengir-compile` hands to hivmc.

    Raises:
        CompileError: a pass failed, for instance because UB overflows.
    """
    suffix = "-a5" if is_950(architecture) else ""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("hivmc", "hivmc-a5"):
            recorder = Path(folder, name)
            recorder.write_text(_RECORDER)
            recorder.chmod(0o755)
        source, record = Path(folder, "kernel.mlir"), Path(folder, "record.mlir")
        source.write_text(re.sub(r', mix_mode\s*=\s*"[^"]*"', "", linalg))
        run = subprocess.run(
            [
                tool(f"bishengir-compile{suffix}", ir_version),
                source,
                f"--target={architecture}",
                f"--enable-auto-multi-buffer={multi_buffer}",
                f"--enable-auto-bind-sub-block={bind_sub_block}",
                "--enable-hfusion-compile=true",
                "--enable-hivm-compile=true",
                "--enable-triton-kernel-compile=true",
                "-o",
                Path(folder, "kernel.o"),
            ],
            capture_output=True,
            text=True,
            timeout=TIME_LIMIT_S,
            env={**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "HIVMC_RECORD": str(record)},
        )
        if not record.exists():
            raise CompileError(f"bishengir-compile {ir_version} for {architecture}: {run.stderr[:4000]}")
        return record.read_text()


def run_passes(module: str, pipeline: str, ir_version: str = IR_VERSIONS[-1]) -> str:
    """Upstream MLIR passes, which `bishengir-opt` carries along.

    Raises:
        CompileError: a pass failed.
    """
    run = subprocess.run(
        [tool("bishengir-opt", ir_version), "-", f"--pass-pipeline={pipeline}"],
        input=module,
        capture_output=True,
        text=True,
        timeout=TIME_LIMIT_S,
    )
    if run.returncode:
        raise CompileError(run.stderr[:4000])
    return run.stdout
