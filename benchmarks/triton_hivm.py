"""Compiles every Triton kernel for every Ascend chip and compiler version, and tabulates what the HIVM says.

    make triton-tables

writes benchmarks/results/triton_hivm.csv and the tables between the markers in docs/triton.md. Needs
triton-ascend (`.venv-triton-ascend`) and no device: everything here is counted, nothing is timed.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import Any

from benchmarks.documents import insert_table
from qwen3_fp8_ascend.triton_kernels.configuration import architecture
from tests.support.triton_ascend.cases import ASCEND_ARCHITECTURES, all_cases
from tests.support.triton_ascend.compiler import IR_VERSIONS, CompileError, compile_to_hivm, lower_to_linalg
from tests.support.triton_ascend.hivm_report import DecodeCost, decode_cost, read_hivm

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "triton_hivm.csv"
DOCUMENT = ROOT / "docs" / "triton.md"
COLUMNS = (
    *("kernel", "architecture", "ir_version", "reached_hivmc", "scalar_loops", "ub_bytes", "l1_bytes", "l0c_bytes"),
    *("decode_ops_per_256", "scale_ops_per_256", "vector_cycles_per_256"),
    *("vector_loads_bytes", "vector_stores_bytes", "cube_loads_bytes", "cube_stores_bytes"),
)


def measure(architecture_name: str) -> list[dict[str, Any]]:
    """A row for every kernel and compiler version."""
    rows = []
    for case in all_cases(architecture_name):
        linalg = lower_to_linalg(case, architecture_name)
        for version in IR_VERSIONS:
            row: dict[str, Any] = dict.fromkeys(COLUMNS, "")
            row |= {"kernel": case.name, "architecture": architecture_name, "ir_version": version}
            rows.append(row)
            try:
                hivm = compile_to_hivm(
                    linalg, architecture_name, version, bind_sub_block=architecture(architecture_name).bind_sub_block
                )
            except CompileError as error:
                print(f"{case.name} {architecture_name} {version}: {error}")
                row["reached_hivmc"] = "no"
                continue
            report = read_hivm(hivm)
            row |= {"reached_hivmc": "yes", "scalar_loops": len(report.scalar_fallbacks)}
            if not architecture_name.startswith("Ascend950"):
                for column, space in (("ub_bytes", "ub"), ("l1_bytes", "cbuf"), ("l0c_bytes", "cc")):
                    row[column] = report.peak_memory.get(space, 0)
                if "linear" in case.name:
                    row |= _costs(decode_cost(report))
    return rows


def _costs(cost: DecodeCost) -> dict[str, float]:
    return {
        "decode_ops_per_256": cost.decode,
        "scale_ops_per_256": cost.scale,
        "vector_cycles_per_256": round(cost.cycles, 2),
    } | {f"{name.replace(' ', '_')}_bytes": round(value, 4) for name, value in cost.moved.items()}


def compile_table(rows: list[dict[str, Any]]) -> str:
    """kernel x chip x compiler version: reached hivmc, and UB / L1 / L0C in KiB where the module says."""
    heads = [f"{name} {version}" for name in ASCEND_ARCHITECTURES for version in IR_VERSIONS]
    lines = ["| kernel | UB/L1/L0C (KiB, 910B3) | " + " | ".join(heads) + " |", "|---" * (len(heads) + 2) + "|"]
    names = list(dict.fromkeys(row["kernel"] for row in rows))
    found = {(row["kernel"], row["architecture"], row["ir_version"]): row for row in rows}
    for name in names:
        cells, memory = [], "-"
        for chip in ASCEND_ARCHITECTURES:
            for version in IR_VERSIONS:
                row = found.get((name, chip, version))
                if row is None:
                    cells.append("not launched")
                    continue
                cells.append("yes" if row["reached_hivmc"] == "yes" and row["scalar_loops"] == 0 else "NO")
                if chip == "Ascend910B3" and row["ub_bytes"] != "":
                    memory = "/".join(
                        str(round(int(row[column]) / 1024)) for column in ("ub_bytes", "l1_bytes", "l0c_bytes")
                    )
        lines.append(f"| {name} | {memory} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def decode_table(rows: list[dict[str, Any]]) -> str:
    """Operations and bytes of the linear kernels' inner loops on 910B3."""
    lines = [
        "| kernel (910B3) | decode ops / 256 weights | scale ops / 256 | est. cycles / 256 and vector core | "
        "bytes / weight: vector load, vector store, cube load, cube store |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        if row["architecture"] == "Ascend910B3" and row["ir_version"] == IR_VERSIONS[-1] and row["decode_ops_per_256"]:
            moved = ", ".join(f"{row[column]:.2f}" for column in COLUMNS[-4:])
            lines.append(
                f"| {row['kernel']} | {row['decode_ops_per_256']:g} | {row['scale_ops_per_256']:g} | "
                f"{row['vector_cycles_per_256']:g} | {moved} |"
            )
    lines.append("| prior art (sgl-kernel-npu softfp8_w8a16_matmul, published) | 20 | - | - | - |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-document", action="store_true", help="leave docs/triton.md as it is")
    arguments = parser.parse_args()
    rows = [row for name in ASCEND_ARCHITECTURES for row in measure(name)]
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    tables = {"compile": compile_table(rows), "decode": decode_table(rows)}
    for name, table in tables.items():
        print(table)
        if not arguments.no_document:
            insert_table(DOCUMENT, name, table)
    failed = sum(row["reached_hivmc"] != "yes" for row in rows)
    print(f"{len(rows)} modules, {failed} did not reach hivmc, {sum(bool(row['scalar_loops']) for row in rows)} scalar")
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
