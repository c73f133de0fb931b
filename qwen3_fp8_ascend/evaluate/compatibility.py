"""What documents say has run on a GPU or an NPU: written from result files, between marks in their text.

`<!-- ran: npu/Ascend910B/ascendc -->not run<!-- end -->` is about chips of that kind whose names begin so ("*": all of
them) and a backend or "serve"; `<!-- ran: npu -->` about the kind as a whole. After `ran?` nothing is written where
nothing has run, because the text behind it says what was shown instead. `make report` renews them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen3_fp8_ascend.evaluate.results import Result, chip_of

MARK = re.compile(r"<!-- ran(?P<silent>\??): (?P<key>.+?) -->.*?<!-- end -->")
SERVE = "serve"
FORMS = {
    "en": {"none": "not run", "run": "run {date}", "failed": "run {date}, failed", "separator": "; "},
    "zh": {"none": "未运行", "run": "已运行 {date}", "failed": "已运行 {date}，失败", "separator": "；"},
}
WHOLE = {
    "en": {
        "npu": "**Nothing has run on an NPU.**",
        "gpu": "**Nothing has run on a GPU.**",
        "some": "Run on {chips}.",
    },
    "zh": {
        "npu": "**还没有任何部分在 NPU 上运行过。**",
        "gpu": "**还没有任何部分在 GPU 上运行过。**",
        "some": "已在 {chips} 上运行。",
    },
}


@dataclass(frozen=True)
class Run:
    """A backend, or the server ("serve"), on a device; `good` is false if a result says that it was wrong there."""

    chip: str
    device: str
    what: str
    date: str
    good: bool = True


def runs(results: Mapping[str, Sequence[Result]]) -> list[Run]:
    """What result files show, on GPUs and NPUs."""
    return [run for kind, found in results.items() for result in found for run in _runs(kind, result)]


def _runs(kind: str, result: Result) -> Iterator[Run]:
    date = result["provenance"]["date"]
    if kind == "precision":
        for row in result["rows"]:
            made = row["made"]
            what = made.get("backend") or (SERVE if "vLLM of the server" in made else None)
            if what is not None:
                yield from _run(made.get("device"), what, made["date"])
    elif kind == "linears":
        for name in {row["name"] for row in result["rows"]}:
            yield from _run(result["device"], name, date)
    elif kind == "validate":
        device = result["device"]
        # A backend whose linears are right has failed all the same if another step found it wrong.
        wrong = {s["step"].split("/")[1] for s in result["steps"] if "/" in s["step"] and _is_wrong(s)}
        for step in result["steps"]:
            check, _, rest = step["step"].partition("/")
            good = step["outcome"] == "finished" and not step["failed"]
            if check in ("linear", "prefill") and step["cases"]:
                backend = rest.partition("/")[0]
                yield from _run(device["name"], backend, date, good and backend not in wrong, device["kind"])
            if check == "model" and "vllm" in step["values"]:
                yield from _run(device["name"], SERVE, date, good, device["kind"])
    else:
        yield from _run(result["provenance"].get("npu"), SERVE, date)


def _is_wrong(step: Mapping[str, Any]) -> bool:
    return bool(step["failed"]) or step["outcome"] not in ("finished", "out of time")


def _run(device: str | None, what: str, date: str, good: bool = True, kind: str | None = None) -> Iterator[Run]:
    chip = {"cuda": "gpu"}.get(kind, kind) if kind else chip_of(device or "not said")
    if device and chip in ("gpu", "npu") and not what.startswith("reference"):
        yield Run(chip, device, what, date, good)


def renew(text: str, found: Sequence[Run], language: str) -> str:
    """A document with what is between its marks written anew."""

    def between(mark: re.Match[str]) -> str:
        kind, _, rest = mark["key"].partition("/")
        opening = f"<!-- ran{mark['silent']}: {mark['key']} -->"
        if not rest:
            return f"{opening}{_whole(kind, found, language)}<!-- end -->"
        prefix, _, what = rest.rpartition("/")
        names = tuple("" if name == "*" else name for name in prefix.split(","))
        these = [run for run in found if run.chip == kind and run.device.startswith(names) and run.what == what]
        return f"{opening}{_cell(these, bool(mark['silent']), language)}<!-- end -->"

    return MARK.sub(between, text)


def _cell(these: Sequence[Run], silent: bool, language: str) -> str:
    form = FORMS[language]
    if not these:
        return "" if silent else form["none"]
    newest = max(run.date for run in these)
    good = all(run.good for run in these if run.date == newest)
    return form["run" if good else "failed"].format(date=newest) + (form["separator"] if silent else "")


def _whole(kind: str, found: Sequence[Run], language: str) -> str:
    chips = sorted({run.device for run in found if run.chip == kind})
    return WHOLE[language]["some"].format(chips=", ".join(chips)) if chips else WHOLE[language][kind]


def documents(output: Path) -> Iterable[Path]:
    """The documents with such marks, for a report that is written to docs/."""
    candidates = [*output.glob("*.md"), *(output.parent.glob("README*.md") if output.name == "docs" else ())]
    return sorted(path for path in candidates if MARK.search(path.read_text(encoding="utf-8")))


def language_of(path: Path) -> str:
    """By the file's name."""
    return "zh" if path.name.endswith(".zh.md") else "en"
