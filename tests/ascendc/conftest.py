"""Compiles the kernels against the emulator, once a session and only when something changed, and runs them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from qwen3_fp8_ascend.backends import ascendc
from qwen3_fp8_ascend.format import Activation, BlockGrid

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "csrc" / "ascend"
EMULATOR = ROOT / "tests" / "support" / "ascendc_emulator"
CACHE = ROOT / ".cache" / "ascendc"

W8A8 = ascendc.ACTIVATIONS[Activation.W8A8]
"""As the kernels have it."""

KERNELS = ("group_quantize", "block_dequantize", "block_linear", "block_grouped_linear", "block_gemv")
DTYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
WARNINGS = ("-std=c++17", "-Wall", "-Wextra", "-Werror")
SANITIZERS = ("-Og", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
"""With what optimization they compile fastest among those that run fast."""
FAULT_STATUS = 3
FLAG_COUNTING = ("every-core", "arrivals")
"""How cross-core flags are counted: each core of the group once for each set, or so many sets from whichever cores.

The documentation says the first; whether a core's next set can stand in for another core's is said nowhere.
"""
BUILDS_KEPT = 12


class EmulatorFault(Exception):
    """The emulator objects to what a kernel does; `name` is the fault's."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(message)
        self.name = name


def machine_flags() -> tuple[str, ...]:
    """Hardware conversion between half and float where this machine has it; without, the emulator is slow but right."""
    cpuinfo = Path("/proc/cpuinfo")
    return ("-mf16c",) if cpuinfo.exists() and " f16c" in cpuinfo.read_text() else ()


def sanitized_environment() -> dict[str, str]:
    """For programs that sanitizers watch.

    vLLM's CPU platform preloads libraries into whatever this process starts, and AddressSanitizer must come first.
    A run ends with its process, and kernels allocate nothing: the search for leaks took as long as a small run.
    """
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    return environment | {"ASAN_OPTIONS": "detect_leaks=0"}


def _compile(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[-6000:]}"


def compiler() -> str:
    found = shutil.which("g++")
    if found is None:
        pytest.skip("no g++: the kernels cannot be compiled for the emulator")
    return found


def check_syntax(arguments: Sequence[str]) -> None:
    _compile([compiler(), "-fsyntax-only", *arguments])


def build(
    name: str,
    sources: Sequence[Path],
    *,
    flags: Sequence[str],
    include: Sequence[Path],
    root: Path = SOURCES,
    depends: Sequence[Path] = (),
) -> Path:
    """What `flags` make of `sources`, cached by their content, that of all headers and of `depends`.

    The sources are one translation unit: the emulator's templates, most of the work, are compiled once, not once each.
    """
    command = [compiler(), *flags, *(f"-I{path}" for path in include)]
    digest = hashlib.sha256(" ".join(flags).encode())
    for file in sorted({*sources, *depends, *root.rglob("*.h"), *EMULATOR.glob("*.h")}):
        digest.update(file.read_bytes())
    folder = CACHE / f"{name}-{digest.hexdigest()[:16]}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(CACHE / f"{name}.lock"):  # files of tests run in processes of their own, beside each other
        return _built(folder, name, command, sources)


def _built(folder: Path, name: str, command: list[str], sources: Sequence[Path]) -> Path:
    executable = folder / name
    if executable.exists():
        return executable
    stale = sorted(CACHE.glob(f"{name}-*"), key=lambda path: path.stat().st_mtime, reverse=True)[BUILDS_KEPT:]
    for old in stale:
        shutil.rmtree(old, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    unit = folder / "unit.cpp"
    unit.write_text("".join(f'#include "{source.resolve()}"\n' for source in sources))
    linked = folder / f"{name}.part"
    _compile([*command, str(unit), "-o", str(linked), "-pthread"])
    linked.replace(executable)
    return executable


@dataclass(frozen=True)
class Emulator:
    """Runs kernels of one executable; tensors go through files in `folder`."""

    executable: Path
    folder: Path
    flags: str = FLAG_COUNTING[0]

    def run(self, kernel: str, outputs: dict[str, tuple[tuple[int, ...], torch.dtype]], **arguments: object) -> dict:
        """The outputs by name, and the emulator's counters under "counters"."""
        command = [str(self.executable), kernel]
        for key, value in arguments.items():
            if isinstance(value, torch.Tensor):
                path = self.folder / key
                path.write_bytes(value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
                value = path
            command.append(f"{key}={value}")
        command += [f"{name}={self.folder / name}" for name in outputs]
        done = subprocess.run(command, capture_output=True, text=True, env=sanitized_environment())
        if done.returncode == FAULT_STATUS:
            first, _, rest = done.stderr.partition("\n")
            raise EmulatorFault(first.removeprefix("fault "), rest)
        assert done.returncode == 0, done.stderr[-6000:]
        results: dict = {"counters": json.loads(done.stdout)}
        for name, (shape, dtype) in outputs.items():
            data = bytearray((self.folder / name).read_bytes())
            results[name] = torch.frombuffer(data, dtype=torch.uint8).view(dtype).view(shape)
        return results

    def quantize(
        self, x: torch.Tensor, cores: int = 3, activation: int = W8A8
    ) -> tuple[torch.Tensor, torch.Tensor, dict]:
        rows, columns = x.shape
        out = self.run(
            "group_quantize",
            {"codes": ((rows, columns), torch.uint8), "scale": ((rows, -(-columns // 128)), torch.float32)},
            rows=rows, columns=columns, dtype=DTYPES[x.dtype], cores=cores, activation=activation, x=x,
        )  # fmt: skip
        return out["codes"], out["scale"], out["counters"]

    def dequantize(
        self, tensors: Sequence[torch.Tensor], n: int, k: int, dtype: torch.dtype, cores: int = 3
    ) -> tuple[torch.Tensor, dict]:
        packed, scale, spans = tensors
        out = self.run(
            "block_dequantize", {"out": ((n, k), dtype)},
            n=n, k=k, dtype=DTYPES[dtype], cores=cores, packed=packed, scale=scale, spans=spans,
        )  # fmt: skip
        return out["out"], out["counters"]

    def linear(
        self, kernel: str, x: torch.Tensor, tensors: Sequence[torch.Tensor], n: int, *,
        bias: torch.Tensor | None = None, activation: int = W8A8, cores: int = 3, chip: str = "910B3",
    ) -> tuple[torch.Tensor, dict]:  # fmt: skip
        packed, scale, spans = tensors
        given = {} if bias is None else {"bias": bias, "bias_dtype": DTYPES[bias.dtype]}
        out = self.run(
            kernel, {"out": ((x.shape[0], n), x.dtype)},
            m=x.shape[0], n=n, k=x.shape[1], dtype=DTYPES[x.dtype], cores=cores, chip=chip, flags=self.flags,
            activation=activation, x=x, packed=packed, scale=scale, spans=spans, **given,
        )  # fmt: skip
        return out["out"], out["counters"]

    def grouped_linear(
        self, x: torch.Tensor, tensors: Sequence[torch.Tensor], ends: torch.Tensor, n: int, *,
        activation: int = W8A8, cores: int = 3, chip: str = "910B3",
    ) -> tuple[torch.Tensor, dict]:  # fmt: skip
        packed, scale, spans = tensors
        out = self.run(
            "block_grouped_linear", {"out": ((x.shape[0], n), x.dtype)},
            m=x.shape[0], n=n, k=x.shape[1], dtype=DTYPES[x.dtype], cores=cores, chip=chip, flags=self.flags,
            activation=activation, x=x, packed=packed, scale=scale, spans=spans, ends=ends,
        )  # fmt: skip
        return out["out"], out["counters"]


@pytest.fixture(scope="session")
def kernels_executable() -> Path:
    sources = [*(SOURCES / "kernels" / f"{name}.cpp" for name in KERNELS), Path(__file__).parent / "run_kernel.cpp"]
    return build("run_kernel", sources, flags=(*WARNINGS, *SANITIZERS, *machine_flags()), include=(EMULATOR, SOURCES))


@pytest.fixture
def emulator(kernels_executable: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Emulator:
    """Counts flags as documented, or as an indirect parameter out of `FLAG_COUNTING` says."""
    return Emulator(kernels_executable, tmp_path, getattr(request, "param", FLAG_COUNTING[0]))


@dataclass(frozen=True)
class Weight:
    """A block-FP8 weight, packed for the kernels."""

    codes: torch.Tensor
    scale: torch.Tensor
    grid: BlockGrid

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return ascendc.pack(self.codes, self.scale, self.grid)


def finite_codes(n: int, k: int, generator: torch.Generator) -> torch.Tensor:
    """Uniformly random codes without NaN: every exponent occurs, subnormals and +-448 too."""
    codes = torch.randint(0, 256, (n, k), dtype=torch.uint8, generator=generator)
    return torch.where((codes & 0x7F) == 0x7F, codes & 0x80, codes).view(torch.float8_e4m3fn)


def random_weight(widths: Sequence[int], k: int, seed: int = 0, spread: float = 4.0) -> Weight:
    """Codes over the whole range; scales over 2^+-spread."""
    generator = torch.Generator().manual_seed(seed)
    grid = BlockGrid(tuple(widths), k)
    exponent = (torch.rand(grid.scale_shape, generator=generator) * 2 - 1) * spread
    return Weight(finite_codes(grid.n, k, generator), torch.exp2(exponent - 6), grid)


def random_activation(m: int, k: int, dtype: torch.dtype, seed: int = 1) -> torch.Tensor:
    """Normal numbers with outlier channels and rows of very different size, as real activations have."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=generator)
    x[:, :: max(k // 7, 1)] *= 40
    return (x * torch.exp2(torch.randint(-6, 6, (m, 1), generator=generator).float())).to(dtype)


def relative_error(got: torch.Tensor, oracle: torch.Tensor) -> float:
    return float((got.double() - oracle).norm() / oracle.norm())
