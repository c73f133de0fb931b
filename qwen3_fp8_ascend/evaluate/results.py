"""The result files that a report is made of; each names its kind, the machine, the date, the commit, the command."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from qwen3_fp8_ascend.errors import BlockFp8Error
from qwen3_fp8_ascend.evaluate import throughput
from qwen3_fp8_ascend.evaluate.precision import compare, linears
from qwen3_fp8_ascend.provenance import server_device

VERSION = 1
MADE_BY = {
    "verify": "scripts/verify_qwen3-8b-fp8.sh --output FILE",
    "precision": "scripts/eval_precision.sh --fp8 FOLDER",
    "linears": "qwen3-fp8-ascend eval-precision linears FOLDER --output FILE",
    "throughput": "qwen3-fp8-ascend bench serving ... --output FILE",
    "validate": "qwen3-fp8-ascend validate --output FILE",
}
"""Kinds of result files and the commands that write them."""

CHIPS = ("cpu", "gpu", "npu")

_NEEDED = {
    "verify": ("server", "answers"),
    "precision": ("reference", "rows", "floor", "bound", "command"),
    "linears": ("model", "activation", "dtype", "device", "rows", "bound", "command"),
    "throughput": ("rows", "command"),
    "validate": ("device", "verdict", "facts", "steps", "command"),
}
_ROWS: dict[str, tuple[str, tuple[str, ...]]] = {
    "verify": ("answers", ("prompt", "text", "verdict")),
    "precision": ("rows", tuple(field.name for field in fields(compare.Row))),
    "linears": ("rows", tuple(field.name for field in fields(linears.Judged))),
    "throughput": ("rows", tuple(field.name for field in fields(throughput.Row))),
    "validate": ("steps", ("step", "outcome", "cases", "failed", "skipped", "failures", "worst", "values", "seconds")),
}
"""Where each kind keeps its rows, and what a row has."""

PROVENANCE = ("cpu", "cores", "date", "commit", "command")

Result = dict[str, Any]


def read_results(paths: Iterable[Path]) -> dict[str, list[Result]]:
    """Results by kind, in the order of the files; a folder stands for the *.json files in it, by name.

    Raises:
        BlockFp8Error: a file cannot be read, is no result, or was written by another version.
    """
    found: dict[str, list[Result]] = {kind: [] for kind in MADE_BY}
    for path in _files(paths):
        result = read_result(path)
        found[result["kind"]].append(result)
    return found


def read_result(path: Path) -> Result:
    """One result file.

    Raises:
        BlockFp8Error: as `read_results`.
    """
    expected = f"a result of {', '.join(MADE_BY)}, version {VERSION}"
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        fix = "copy the file again, or make the result again"
        raise BlockFp8Error("a result cannot be read", where=path, expected=expected, got=error, fix=fix) from error
    kind = result.get("kind") if isinstance(result, dict) else None
    if kind not in MADE_BY:
        fix = "leave the file out; results are written with --output"
        raise BlockFp8Error("this is no result", where=path, expected=expected, got=f"kind {kind!r}", fix=fix)
    if result.get("version") != VERSION:
        fix = f"make it again with this package: {MADE_BY[kind]}"
        raise BlockFp8Error("a result of another version", where=path, got=result.get("version"), fix=fix)
    missing = [key for key in _NEEDED[kind] if key not in result]
    missing += _missing("provenance", result.get("provenance"), PROVENANCE)
    where, keys = _ROWS[kind]
    rows = result.get(where)
    if not isinstance(rows, list) or not rows:
        missing.append(where)
    else:
        missing += [name for number, row in enumerate(rows) for name in _missing(f"{where}[{number}]", row, keys)]
    if missing:
        fix = "a number without its machine, date, commit and command is not published: make the result again"
        some = ", ".join(missing[:8]) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
        raise BlockFp8Error("a result is incomplete", where=path, expected=some, got="nothing", fix=fix)
    return result


def _missing(where: str, value: object, keys: Iterable[str]) -> list[str]:
    return [f"{where}.{key}" for key in keys if not isinstance(value, dict) or key not in value]


def runs_by_chip(result: Result) -> dict[str, list[str]]:
    """The dates of what was measured, by kind of chip.

    Questions and loads are put to a server; they count for the NPU or GPU of the machine that asked if it has one,
    since a server there uses it. Runs of `eval-precision` say themselves what they were computed on; the reference that
    they are compared with does not count.
    """
    facts = result["provenance"]
    if result["kind"] == "precision":
        runs = [(row["made"].get("device", "cpu"), row["made"]["date"]) for row in result["rows"]]
    elif result["kind"] == "validate":
        runs = [(result["device"]["kind"], facts["date"])]
    elif result["kind"] == "linears":
        runs = [(result["device"], facts["date"])]
    else:
        runs = [(server_device(facts) or "cpu", facts["date"])]
    dates: dict[str, list[str]] = {chip: [] for chip in CHIPS}
    for device, date in runs:
        chip = chip_of(device)
        if chip is not None and date not in dates[chip]:
            dates[chip].append(date)
    return dates


def chip_of(device: str) -> str | None:
    """cpu, gpu or npu by the name of a device; None if nobody said what a server computed on."""
    if device == "not said":
        return None
    if device == "cpu":
        return "cpu"
    return "npu" if device == "npu" or device.startswith("Ascend") else "gpu"


def _files(paths: Iterable[Path]) -> Sequence[Path]:
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(path.glob("*.json"))
            if not inside:
                raise BlockFp8Error("the folder has no results", where=path, expected="*.json", fix="give another one")
            files += inside
        else:
            files.append(path)
    return files
