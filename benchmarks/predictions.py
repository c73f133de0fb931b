"""What models of the chips predict of Qwen3-8B's linears, for `validate` to put beside what it measures.

    python -m benchmarks.predictions

Writes qwen3_fp8_ascend/evaluate/validate/predictions.json from `benchmarks.ascend_roofline`, which works on counts of
compiled code, and from the table of `benchmarks.ascendc_estimate` in docs/ascendc.md, which takes ten minutes to make.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from benchmarks.ascend_roofline import CHIPS, ROOT, predict, read_counts
from benchmarks.shapes import QWEN3_8B
from qwen3_fp8_ascend.evaluate.validate.checks import DECODE_ROWS
from qwen3_fp8_ascend.evaluate.validate.times import PREDICTIONS, ROWS

FIXED_SECONDS = 2e-6
"""An extra kernel for each linear, as `ascend_roofline` assumes."""
ESTIMATED = re.compile(r"^\| (\w+) \| (\d+) \| block_linear \| [\d.]+ \|[^|]*\| [\d.]+ \| ([\d.]+) \|", re.MULTILINE)


def lines() -> Iterator[dict[str, Any]]:
    """One for each chip, backend, layer and number of rows: BF16's time over the backend's."""
    counts = read_counts()
    for chip in CHIPS:
        for layer, shape in QWEN3_8B.items():
            for rows in ROWS:
                found = predict(chip, rows, shape, counts, True, FIXED_SECONDS)
                fused = rows <= DECODE_ROWS
                ratio = found.bf16 / (found.overlapped if fused else found.scratch)
                source = f"benchmarks.ascend_roofline, {'overlapped' if fused else 'scratch + matmul'}"
                for backend in ("triton",) if fused else ("triton", "ascendc"):
                    yield _line(chip.name, backend, layer, rows, ratio, source)
    text = (ROOT / "docs" / "ascendc.md").read_text(encoding="utf-8")
    for layer, rows, ratio in ESTIMATED.findall(text):
        if int(rows) in ROWS:
            yield _line("Ascend910B3", "ascendc", layer, int(rows), float(ratio), "benchmarks.ascendc_estimate")


def _line(chip: str, backend: str, layer: str, rows: int, ratio: float, source: str) -> dict[str, Any]:
    return {
        "chip": chip,
        "backend": backend,
        "layer": layer,
        "m": rows,
        "over_bf16": round(ratio, 2),
        "source": source,
    }


def text() -> str:
    """The file."""
    each = ",\n  ".join(map(json.dumps, lines()))
    return f'{{"made_by": "python -m benchmarks.predictions", "lines": [\n  {each}\n]}}\n'


if __name__ == "__main__":
    PREDICTIONS.write_text(text(), encoding="utf-8")
