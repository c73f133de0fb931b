"""The result files that a report is made of; each names its kind, the machine, the date, the commit, the command."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from qwen3_fp8_ascend.errors import BlockFp8Error

VERSION = 1
MADE_BY = {
    "verify": "scripts/verify_qwen3-8b-fp8.sh --output FILE",
    "precision": "qwen3-fp8-ascend eval-precision compare ... --output FILE",
    "linears": "qwen3-fp8-ascend eval-precision linears ... --output FILE",
    "throughput": "qwen3-fp8-ascend bench serving ... --output FILE",
}
"""Kinds of result files and the commands that write them."""

_NEEDED = {
    "verify": ("server", "answers"),
    "precision": ("reference", "rows", "floor", "command"),
    "linears": ("model", "activation", "rows", "command"),
    "throughput": ("rows", "command"),
}
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
    facts = result.get("provenance") or {}
    missing = [key for key in _NEEDED[kind] if key not in result]
    missing += [f"provenance.{key}" for key in PROVENANCE if key not in facts]
    if missing:
        fix = "a number without its machine, date, commit and command is not published: make the result again"
        raise BlockFp8Error("a result is incomplete", where=path, expected=", ".join(missing), got="nothing", fix=fix)
    return result


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
