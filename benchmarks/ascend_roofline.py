"""Predicts the time of Qwen3-8B's linears, and of Qwen3-30B-A3B's experts, on Ascend. Every number is predicted.

    python -m benchmarks.ascend_roofline

Reads benchmarks/results/triton_hivm.csv (`make triton-tables`), which was counted in compiled code. A linear goes
through stages: weights from HBM, lanes into the vector cores, decoding, decoded weights out to L2, from L2 into the
cube, products out and back for their scales, the cube itself. Three predictions:

overlapped   all stages run at once, so the slowest one decides: the upper bound.
calibrated   0.82 of that. A published W4A16 kernel with the same round trip through L2 reached 1.48 times FP16 on
             910B; this model's overlapped prediction for it is 1.81.
serial L2    the vector cores' stores and the cube's loads take turns: the lower bound.

BF16 is at its own limit: HBM or the cube. Assumptions beside the chips' figures: HBM and L2 sustain them, kernels
are captured in a graph, and the extra kernel that prepares activations costs a fixed time (--fixed-us).
Above one row tile (m > 64) weights are decoded once for each tile; decoding them once into an fp16 scratch for the
stock matmul, at three bytes of HBM a weight, is predicted as well, with what normalising its operands and taking its
result back to size read and write of activations and results. "best" is the better of the two.

Experts: both grouped linears of a layer, whose tiles are decoded as a linear's are. Tokens go anywhere, so a batch
meets the number of experts that is expected, each with a tile of rows; BF16 reads just those experts. The list of rows
is walked by every core, at an assumed 20 cycles an expert.
"""

from __future__ import annotations

import argparse
import csv
import re
from dataclasses import dataclass
from pathlib import Path

from benchmarks.documents import insert_table
from benchmarks.shapes import EXPERTS, QWEN3_8B
from qwen3_fp8_ascend.triton_kernels.configuration import architecture, grouped_shape, linear_shape

ROOT = Path(__file__).resolve().parent.parent
COUNTS = ROOT / "benchmarks" / "results" / "triton_hivm.csv"
DOCUMENT = ROOT / "docs" / "triton.md"

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
EXPERT_ROWS = (1, 16, 64)
WALK_CYCLES = 20  # assumed: loading, clamping and counting an expert's end on the scalar unit
GIB = 2**30
L2_WRITE_BYTES_PER_CYCLE = 86  # platform_config tables of CANN 8.1, per AI core
CUBE_LOAD = 135 * GIB  # GM to L1 per cube core, PTO-ISA's model calibrated on 910B3
VECTOR_LOAD = 100.9 * GIB  # GM to UB per vector core, the same
CALIBRATION = 1.48 / 1.81
ACTIVATION_BYTES = 16  # beside the scratch: quantized 2 + 2, scaled in fp32 2 + 4, to fp16 4 + 2
RESULT_BYTES = 8  # the product to bf16 2 + 2, times a power of two 2 + 2


@dataclass(frozen=True)
class Chip:
    """Figures of one die. flops: fp16, derived from cores and clock. `counts`: whose compiled code is counted."""

    name: str
    cube_cores: int
    hertz: float
    hbm: float
    flops: float
    vector_cores_used: int
    counts: str
    remark: str = ""


CHIPS = (
    Chip("Ascend910B3", 20, 1.8e9, 1.6e12, 295e12, 40, "Ascend910B3"),
    Chip("Ascend910_9392", 24, 1.85e9, 1.6e12, 364e12, 48, "Ascend910_9392", "one die of two"),
    Chip(
        "Ascend950PR_9589",
        32,
        1.65e9,
        1.6e12,
        433e12,
        32,
        "Ascend910B3",
        "910B's counts and rates, one vector core a pair; its native FP8 matmul is the better path",
    ),
)


@dataclass(frozen=True)
class Prediction:
    """Seconds for one linear, and the stage that decides the overlapped time."""

    overlapped: float
    calibrated: float
    serial: float
    scratch: float
    bf16: float
    limit: str

    @property
    def best(self) -> float:
        return min(self.overlapped, self.scratch)


def read_counts(kernel: str = "block_linear", path: Path = COUNTS) -> dict[tuple[str, int, bool], dict[str, float]]:
    """A kernel's counts of the newest compiler by (chip, BLOCK_M, whether the decode uses subnormals).

    Raises:
        SystemExit: the table is not there.
    """
    if not path.exists():
        raise SystemExit(f"{path} is missing: run `make triton-tables`")
    out: dict[tuple[str, int, bool], dict[str, float]] = {}
    with path.open() as file:
        for row in csv.DictReader(file):
            match = re.fullmatch(kernel + r"\[m(\d+),n\d+,(subnormals|no-subnormals)\]", row["kernel"])
            if match and row["vector_cycles_per_256"]:
                numbers = {key: float(row[key]) for key in row if key.endswith(("_256", "_bytes")) and row[key]}
                out[row["architecture"], int(match[1]), match[2] == "subnormals"] = numbers
    return out


def stages_of(
    chip: Chip, count: dict[str, float], weights: float, repeated: float, cube_s: float, waves: float
) -> dict[str, float]:
    """Seconds that each stage takes for weights that are read once and decoded `repeated / weights` times."""
    return {
        "HBM": weights * (1 + 4 / 128) / chip.hbm,
        "vector load": repeated * count["vector_loads_bytes"] / (chip.vector_cores_used * VECTOR_LOAD) * waves,
        "decode": repeated / 256 * count["vector_cycles_per_256"] / (chip.vector_cores_used * chip.hertz) * waves,
        "L2 write": repeated
        * (count["vector_stores_bytes"] + count["cube_stores_bytes"])
        / (chip.cube_cores * L2_WRITE_BYTES_PER_CYCLE * chip.hertz)
        * waves,
        "cube load": repeated * count["cube_loads_bytes"] / (chip.cube_cores * CUBE_LOAD) * waves,
        "cube": cube_s * waves,
    }


def in_turn(stages: dict[str, float]) -> float:
    """The slowest stage where the two passages through L2 take turns."""
    return max(stages["HBM"], stages["decode"], stages["L2 write"] + stages["cube load"], stages["cube"])


def predict_experts(chip: Chip, m: int, subnormals: bool, fixed_s: float) -> tuple[float, float, float, float, str]:
    """Both grouped linears of a layer of Qwen3-30B-A3B: overlapped, calibrated, serial, BF16, in seconds; the limit."""
    counts = read_counts("block_grouped_linear")
    shape = EXPERTS["qwen3-30b-a3b"]
    met = shape.experts * (1 - (1 - shape.top_k / shape.experts) ** m)
    cut = grouped_shape(m * shape.top_k, shape.experts, architecture(chip.counts), subnormals)
    count = counts[chip.counts, cut.block_m, subnormals]
    walk = WALK_CYCLES * shape.experts / chip.hertz
    overlapped = calibrated = serial = bf16 = 0.0
    limit = ""
    for n, k in ((2 * shape.intermediate, shape.hidden), (shape.hidden, shape.intermediate)):
        tiles = met * (n // cut.block_n)
        waves = -(-tiles // chip.cube_cores) * chip.cube_cores / tiles
        weights = met * n * k
        stages = stages_of(chip, count, weights, weights, 2 * cut.block_m * weights / chip.flops, waves)
        limit = max(stages, key=lambda name: stages[name])
        overlapped += stages[limit] + walk + fixed_s
        calibrated += stages[limit] / CALIBRATION + walk + fixed_s
        serial += in_turn(stages) + walk + fixed_s
        bf16 += 2 * weights / chip.hbm
    return overlapped, calibrated, serial, bf16, limit


def experts_table(fixed_us: float) -> str:
    """A layer of experts by chip, form of decoding and tokens."""
    lines = [
        "| chip | decode form | tokens | experts met | BF16 us | FP8 us, overlapped | limit | **overlapped** | "
        "calibrated | serial L2 | |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    shape = EXPERTS["qwen3-30b-a3b"]
    for chip in CHIPS:
        for subnormals in (True, False):
            for m in EXPERT_ROWS:
                *seconds, bf16, limit = predict_experts(chip, m, subnormals, fixed_us * 1e-6)
                met = shape.experts * (1 - (1 - shape.top_k / shape.experts) ** m)
                ratios = [bf16 / s for s in seconds]
                lines.append(
                    f"| {chip.name} | {'subnormals' if subnormals else 'no subnormals'} | {m} | {met:.0f} | "
                    f"{bf16 * 1e6:.0f} | {seconds[0] * 1e6:.0f} | {limit} | **{ratios[0]:.2f}** | {ratios[1]:.2f} | "
                    f"{ratios[2]:.2f} | predicted |"
                )
    return "\n".join(lines)


def predict(
    chip: Chip,
    m: int,
    shape: tuple[int, int],
    counts: dict[tuple[str, int, bool], dict[str, float]],
    subnormals: bool,
    fixed_s: float,
) -> Prediction:
    """Predict one linear of m rows."""
    n, k = shape
    weights = n * k
    cut = linear_shape(m, n, k // 128, chip.cube_cores, architecture(chip.counts), subnormals)
    count = counts[chip.counts, cut.block_m, subnormals]
    tiles = cut.m_padded // cut.block_m * (n // cut.block_n) * cut.split_k
    waves = -(-tiles // chip.cube_cores) * chip.cube_cores / tiles  # idle cores in the last round
    repeated = cut.m_padded // cut.block_m * weights
    stages = stages_of(chip, count, weights, repeated, 2 * cut.m_padded * weights / chip.flops, waves)
    limit = max(stages, key=lambda name: stages[name])
    # BF16 reads its weights once; the cube is fed at CUBE_LOAD too.
    bf16 = max(2 * weights / chip.hbm, 2 * weights / (chip.cube_cores * CUBE_LOAD), 2 * m * weights / chip.flops)
    return Prediction(
        stages[limit] + fixed_s,
        stages[limit] / CALIBRATION + fixed_s,
        in_turn(stages) + fixed_s,
        bf16 + (weights * 3 + m * (k * ACTIVATION_BYTES + n * RESULT_BYTES)) / chip.hbm + fixed_s,
        bf16,
        limit,
    )


def table(fixed_us: float) -> str:
    """Ratios FP8 / BF16 over the four linears of a layer, by chip, form and m."""
    counts = read_counts()
    lines = [
        "| chip | decode form | m | BF16 us a layer | FP8 us, overlapped | limit | **overlapped** | calibrated | "
        "serial L2 | scratch + matmul | best | |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for chip in CHIPS:
        for subnormals in (True, False):
            for m in ROWS:
                each = [predict(chip, m, shape, counts, subnormals, fixed_us * 1e-6) for shape in QWEN3_8B.values()]
                bf16 = sum(p.bf16 for p in each)
                overlapped = sum(p.overlapped for p in each)
                scratch = sum(p.scratch for p in each)
                ratios = [
                    overlapped,
                    sum(p.calibrated for p in each),
                    sum(p.serial for p in each),
                    scratch,
                    sum(p.best for p in each),
                ]
                lines.append(
                    f"| {chip.name} | {'subnormals' if subnormals else 'no subnormals'} | {m} | {bf16 * 1e6:.0f} | "
                    f"{overlapped * 1e6:.0f} | {each[2].limit} | **{bf16 / ratios[0]:.2f}** | "
                    + " | ".join(f"{bf16 / ratio:.2f}" for ratio in ratios[1:])
                    + " | predicted |"
                )
    remarks = "; ".join(f"{chip.name}: {chip.remark}" for chip in CHIPS if chip.remark)
    return "\n".join(lines) + f"\n\nRemarks: {remarks}. Ratios are BF16 time over FP8 time; above 1 FP8 is faster."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fixed-us", type=float, default=2.0, help="extra kernel per linear, microseconds (2)")
    parser.add_argument("--update-document", action="store_true", help="write the table into docs/triton.md")
    arguments = parser.parse_args()
    text = table(arguments.fixed_us)
    of_experts = experts_table(arguments.fixed_us)
    print(text, of_experts, sep="\n\n")
    if arguments.update_document:
        insert_table(DOCUMENT, "roofline", text)
        insert_table(DOCUMENT, "roofline experts", of_experts)


if __name__ == "__main__":
    main()
