"""Reads a module of HIVM: what it does per step of its loops, what memory it takes, whether it fell back to scalars.

A vector operation is one 256-byte repeat of a vector instruction: 128 lanes of 16 bits, or 64 of 32.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

REPEAT_BYTES = 256
ELEMENT_BYTES = {"i8": 1, "i16": 2, "f16": 2, "bf16": 2, "i32": 4, "f32": 4, "i64": 8}

# 910B: cycles a repeat, and the fixed cost of an instruction (PTO-ISA's cost model, calibrated on 910B3).
CYCLES_ONE_OPERAND, CYCLES_TWO_OPERANDS, CYCLES_DIVISION, CYCLES_FIXED = 1, 2, 4, 30

_MEMREF = re.compile(r"memref<([^,>]*)")
_SPACE = re.compile(r"address_space<(\w+)>")


@dataclass(frozen=True)
class Call:
    """A call of a library function: its largest operand, and in how many loops it stands."""

    name: str
    elements: int
    element: str
    depth: int

    @property
    def bytes(self) -> int:
        return self.elements * ELEMENT_BYTES[self.element]

    @property
    def is_vector(self) -> bool:
        return self.name.startswith(("v", "reduce_", "enablevc_reduce_"))

    @property
    def repeats(self) -> float:
        return self.bytes / REPEAT_BYTES

    @property
    def cycles(self) -> float:
        """Estimated cycles of a vector instruction."""
        if self.name.startswith("vdiv"):
            each = CYCLES_DIVISION
        elif "s_vs_" in self.name or self.name.startswith(("vcast", "vabs")):
            each = CYCLES_ONE_OPERAND
        else:
            each = CYCLES_TWO_OPERANDS
        return self.repeats * each + CYCLES_FIXED


@dataclass
class CoreReport:
    """The code of one kind of core. Calls under a condition that the compiler marks unlikely are left out."""

    name: str
    calls: list[Call] = field(default_factory=list)
    scalar_accesses: list[str] = field(default_factory=list)
    shared: bool = True

    def loop_calls(self) -> list[Call]:
        return [call for call in self.calls if call.depth]


@dataclass
class HivmReport:
    """cores: by function name. memory: bytes used of UB, L1 (cbuf) and L0C (cc), per core function."""

    cores: dict[str, CoreReport]
    memory: dict[str, dict[str, int]]

    @property
    def vector(self) -> CoreReport:
        return next(core for name, core in self.cores.items() if not name.endswith("_mix_aic"))

    @property
    def cube(self) -> CoreReport | None:
        return next((core for name, core in self.cores.items() if name.endswith("_mix_aic")), None)

    @property
    def scalar_fallbacks(self) -> list[str]:
        """Loops that touch single elements of UB: what BiShengIR makes of an operation it cannot vectorize."""
        return [line for core in self.cores.values() for line in core.scalar_accesses]

    @property
    def peak_memory(self) -> dict[str, int]:
        peak: dict[str, int] = {}
        for spaces in self.memory.values():
            for space, used in spaces.items():
                peak[space] = max(peak.get(space, 0), used)
        return peak


@dataclass(frozen=True)
class DecodeCost:
    """Vector operations per 256 weights in the inner loop of a linear, as one vector core executes them.

    decode: on the 16-bit tile that holds weights; scale: on the products; moved: bytes per weight over each path.
    cycles: an estimate for one vector core per 256 weights.
    """

    weights_per_step: int
    decode: float
    scale: float
    cycles: float
    moved: dict[str, float]


def read_hivm(module: str) -> HivmReport:
    """Parse the text of a HIVM module."""
    cores: dict[str, CoreReport] = {}
    memory: dict[str, dict[str, int]] = {}
    core: CoreReport | None = None
    types: dict[str, str] = {}
    constants: dict[str, int] = {}
    stack: list[tuple[str, int]] = []
    for line in module.split("\n"):
        text = line.strip()
        if match := re.match(r"func\.func @(\w+)\(", text):
            if "infer_" not in match[1]:
                core = cores[match[1]] = CoreReport(match[1])
                memory[core.name] = {}
                types, constants = {}, {}
            stack = [("func", 0)]
            continue
        if core is None or text.startswith("func.func private"):
            continue
        depth = sum(kind == "for" for kind, _ in stack)
        if match := re.match(r"(%[^\s:]+)(?::\d+)? = ", text):
            types.pop(match[1], None)  # names are reused from one region to the next
        if match := re.match(r"(%\S+) = arith\.constant (-?\d+) : i64", text):
            constants[match[1]] = int(match[2])
        elif match := re.match(r"(%\S+) = hivm\.hir\.pointer_cast\((%\S+?)\) : (.*)", text):
            types[match[1]] = _shape(match[3])
            space = _SPACE.search(match[3])
            assert space is not None
            elements, element = _elements(_shape(match[3]))
            if match[2] in constants:  # 950's modules compute some addresses
                end = constants[match[2]] + elements * ELEMENT_BYTES[element]
                memory[core.name][space[1]] = max(memory[core.name].get(space[1], 0), end)
        elif match := re.match(r"(?:func\.)?call @(\w+)\((.*?)\) :", text):
            operands = [types[name] for name in match[2].split(", ") if name in types]
            if operands:
                elements, element = max((_elements(operand) for operand in operands), key=lambda pair: pair[0])
                core.calls.append(Call(match[1], elements, element, depth))
        elif re.match(r"(%\S+ = )?memref\.(load|store) ", text):
            if depth and "address_space<ub>" in text:
                core.scalar_accesses.append(text)
        elif (match := re.match(r"(%\S+) = memref\.cast %\S+ : (.*) to ", text)) or (
            match := re.match(r"(%\S+) = .*(memref<.*)$", text)
        ):
            types[match[1]] = _shape(match[2])
        if text.startswith("}"):
            _, first = stack.pop() if stack else ("", 0)
            if "unlikely_condition" in text:
                del core.calls[first:]
            if "limit_sub_block_id0" in text:
                core.shared = False
            if not stack:
                core = None
                continue
        if text.endswith("{"):
            stack.append(("for" if "scf.for" in text else "other", len(core.calls)))
    return HivmReport(cores, memory)


def decode_cost(report: HivmReport) -> DecodeCost:
    """Count a linear's inner loop.

    Raises:
        ValueError: the work is not shared between the vector cores, or there is no loop that loads weights.
    """
    vector, cube = report.vector, report.cube
    if not vector.shared:
        raise ValueError("only one of the two vector cores does the work")
    calls = vector.loop_calls()
    loads = [call for call in calls if call.name.startswith("load_gm_to_ubuf") and call.element in ("i16", "i8")]
    if len(loads) != 1 or cube is None:
        raise ValueError(f"expected one load of weights in a cube-and-vector kernel, found {len(loads)}")
    weights = loads[0].elements
    inner = [call for call in calls if call.depth == loads[0].depth]  # the loops over K; what stands outside is rare
    operations = [call for call in inner if call.is_vector]
    decode = [call for call in operations if call.elements == weights and call.element in ("i16", "f16")]
    scale = [call for call in operations if call not in decode]
    moved = {"vector loads": 0.0, "vector stores": 0.0, "cube loads": 0.0, "cube stores": 0.0}
    for call in inner:
        if call.name.startswith("load_gm_to_ubuf"):
            moved["vector loads"] += call.bytes / weights
        elif call.name.startswith("store_ubuf_to_gm") and call.element == "f16":
            moved["vector stores"] += call.bytes / weights
    deepest = max(call.depth for call in cube.calls)
    for call in cube.calls:
        if call.depth != deepest:
            continue
        if call.name.startswith("nd2nz"):
            moved["cube loads"] += call.bytes / (2 * weights)
        elif call.name.startswith("fixpipe") and call.element == "f32":
            moved["cube stores"] += call.bytes / (2 * weights)
    units = weights / 256
    return DecodeCost(
        weights,
        sum(call.repeats for call in decode) / units,
        sum(call.repeats for call in scale) / units,
        sum(call.cycles for call in operations) / units,
        moved,
    )


def _shape(text: str) -> str:
    match = _MEMREF.findall(text)
    return match[-1] if match else ""


def _elements(shape: str) -> tuple[int, str]:
    """Number of elements and element type of "64x128xf16"; 0 where a size is not static."""
    *sizes, element = shape.split("x") if shape else ["", "i8"]
    count = 1
    for size in sizes:
        count *= int(size) if size.isdigit() else 0
    return count, element
