"""Instructions of the kernels' inner loops, counted in the disassembly of compiled objects.

`python -m tests.support.loop_instructions` compiles the kernels for x86-64 and AArch64 and prints the table of
docs/cpu.md. An instruction is no unit of time: the table says what there is to do for a weight, not how fast it is.
"""

from __future__ import annotations

import functools
import importlib.util
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "csrc" / "cpu"


@dataclass(frozen=True, eq=False)
class Kernel:
    """A file of kernels, and how its loops are recognised.

    architecture: as `ISA_FLAGS` of setup.py names it.
    decodes: the instructions that a decoding loop has, and the weights that each of them yields.
    product: the instruction that multiplies; products: the multiplications of a weight with a number of x in it.
    unpacks: what a loop over packed codes has beside, where a loop over decoded weights has the first instructions too.
    """

    level: str
    architecture: str
    compiler: str
    disassembler: str
    decodes: dict[str, int]
    product: str
    products: int
    unpacks: str = ""

    @property
    def source(self) -> Path:
        return SOURCES / f"{self.level}.cpp"


X86 = ("x86_64", "g++", "objdump")
ARM = ("aarch64", "aarch64-linux-gnu-g++", "aarch64-linux-gnu-objdump")
AVX2 = {"vcvtph2ps": 8, "vpslld": 16}
"""AMD's cores convert nothing for one row: half of the codes are moved up, the others are there."""
KERNELS = {
    "avx2": Kernel("avx2", *X86, AVX2, "vfmadd", 8, "vpmaddubsw"),
    "avx2, Intel's cores": Kernel("avx2", *X86, AVX2, "vfmadd", 8, "vcvtph2ps"),
    "avx512f": Kernel("avx512f", *X86, {"vcvtph2ps": 16}, "vfmadd", 16, "vpsraw"),
    "avx512": Kernel("avx512", *X86, {"vpermi2b": 32, "vpermt2b": 32}, "vdpbf16ps", 32, "vperm"),
    "neon": Kernel("neon", *ARM, {"fcvtl": 4, "fcvtl2": 4}, "fmla", 4),
    "neon_bf16": Kernel("neon_bf16", *ARM, {"tbx": 16}, "bfmmla", 16),
}


ON_STACK = re.compile(r"\[sp|\(%r[sb]p\)")
VECTOR = re.compile(r"%[xyz]mm\d|\b[vqds]\d+\b")


@dataclass(frozen=True)
class Loop:
    """An innermost loop: its instructions, and what they do in one turn."""

    instructions: tuple[str, ...]
    weights: int
    """Decoded, in a loop that decodes; else 0."""
    products: int
    stack: int
    """Accesses of vector registers to the stack: sums or weights that were spilled. (g++ 13 reads an address there.)"""

    @property
    def asked(self) -> int:
        """Cache lines that it asks for ahead."""
        return sum(text.startswith(("prefetch", "prfm")) for text in self.instructions)

    @property
    def loads(self) -> bool:
        """Whether it touches memory."""
        return any(re.search(r"[(\[]", text) for text in self.instructions)

    @property
    def per_weight(self) -> float:
        return len(self.instructions) / self.weights

    @property
    def per_product(self) -> float:
        return len(self.instructions) / self.products


def missing(kernel: Kernel) -> str | None:
    """The reason why a kernel cannot be compiled and read here, or None."""
    for program in (kernel.compiler, kernel.disassembler):
        if shutil.which(program) is None:
            return f"no {program}: apt-get install g++-aarch64-linux-gnu"
    machine = _run(kernel.compiler, "-dumpmachine").partition("-")[0]
    return None if machine == kernel.architecture else f"{kernel.compiler} compiles for {machine}"


@functools.cache
def loops(kernel: Kernel, *flags: str) -> list[Loop]:
    """The innermost loops that multiply what they load, compiled with the project's own flags and those given."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "kernel.o"
        _run(kernel.compiler, *_flags(kernel), *flags, "-fPIC", "-c", str(kernel.source), "-o", str(target))
        text = _run(kernel.disassembler, "-d", "--no-show-raw-insn", str(target))
    return [loop for loop in _innermost(text, kernel) if loop.products and loop.loads]


def decoding_loop(kernel: Kernel, *flags: str) -> Loop:
    """The loop of one row of x: codes are decoded in registers and used once. Without NaN codes it is the shortest."""
    decoding = [loop for loop in loops(kernel, *flags) if loop.weights]
    found = [loop for loop in decoding if any(text.startswith(kernel.unpacks) for text in loop.instructions)]
    least = min(loop.products / loop.weights for loop in found)
    return min((loop for loop in found if loop.products / loop.weights == least), key=lambda loop: loop.per_weight)


def tile_loop(kernel: Kernel) -> Loop:
    """The loop of many rows of x, over decoded weights."""
    return min((loop for loop in loops(kernel) if not loop.weights), key=lambda loop: loop.per_product)


def table() -> str:
    rows = [
        "| level | one row: instructions for a weight | of them products | many rows: instructions for a product of "
        "a weight and a number |",
        "|---|---|---|---|",
    ]
    for name, kernel in KERNELS.items():
        row, tile = decoding_loop(kernel), tile_loop(kernel)
        products = sum(text.startswith(kernel.product) for text in row.instructions)
        rows.append(
            f"| {name} | {row.per_weight:.2f} ({len(row.instructions)} for {row.weights}) | "
            f"{products / row.weights:.2f} | {tile.per_product:.3f} ({len(tile.instructions)} for {tile.products}) |"
        )
    return "\n".join(rows)


def _innermost(text: str, kernel: Kernel) -> list[Loop]:
    """Backward jumps within a function and what lies between, but for those around another loop."""
    found = []
    for function in re.split(r"\n[0-9a-f]+ <[^\n]*>:\n", text)[1:]:
        lines = re.findall(r"^\s*([0-9a-f]+):\s+(\S[^\n]*)$", function, re.MULTILINE)
        addresses = [int(address, 16) for address, _ in lines]
        instructions = [" ".join(instruction.split()) for _, instruction in lines]
        spans = []
        for end, instruction in enumerate(instructions):
            jump = re.match(r"(?:j[a-z]+|b\.[a-z]+|b|cbn?z [wx]\d+,|tbn?z \S+ \S+) ([0-9a-f]+) <", instruction)
            if jump and (address := int(jump.group(1), 16)) in addresses and address <= addresses[end]:
                spans.append((addresses.index(address), end))
        for start, end in spans:
            if not any(start <= s and e <= end and (s, e) != (start, end) for s, e in spans):
                found.append(_loop(instructions[start : end + 1], kernel))
    return found


def _loop(instructions: Sequence[str], kernel: Kernel) -> Loop:
    words = [instruction.split()[0] for instruction in instructions]
    return Loop(
        tuple(instructions),
        sum(kernel.decodes.get(word, 0) for word in words),
        sum(kernel.products for word in words if word.startswith(kernel.product)),
        sum(bool(ON_STACK.search(text) and VECTOR.search(text)) for text in instructions),
    )


def _flags(kernel: Kernel) -> list[str]:
    """Those of setup.py."""
    spec = importlib.util.spec_from_file_location("qwen3_fp8_ascend_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return [*module.COMMON_FLAGS, *module.ISA_FLAGS[kernel.architecture][kernel.source.name]]


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[-4000:]}"
    return done.stdout


if __name__ == "__main__":
    print(table())
