"""What documents say has run where: written from result files, between marks in their text.

`<!-- ran: npu/Ascend910B/ascendc -->not run<!-- end -->` is about chips of that kind whose names begin so ("*": all of
them) and a backend or "serve"; a CPU's are its instruction sets. `<!-- ran: npu -->` is about the kind as a whole,
`<!-- held: quantize,linear/cpu -->` about where checks of `validate` have held for a backend. After `ran?` and `held?`
nothing is written where nothing has run, because the text behind it says what was shown instead. `make report` renews
them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen3_fp8_ascend.evaluate.results import Result, chip_of
from qwen3_fp8_ascend.provenance import server_device

MARK = re.compile(r"<!-- (?P<about>ran|held)(?P<silent>\??): (?P<key>.+?) -->.*?<!-- end -->")
SERVE = "serve"
LINEAR = "linear"
CHECKS = ("quantize", "dequantize", LINEAR, "prefill", "experts", "nonfinite")
"""Those of `validate` that claims are made of."""

FORMS = {
    "en": {
        "none": "not run",
        "run": "run {date}",
        "failed": "run {date}, failed",
        "lower": ", on a processor that has more",
        "held": "run: {chips}",
        "wrong": "{chip} (failed)",
        "separator": "; ",
    },
    "zh": {
        "none": "未运行",
        "run": "已运行 {date}",
        "failed": "已运行 {date}，失败",
        "lower": "（在指令集更多的处理器上）",
        "held": "已运行：{chips}",
        "wrong": "{chip}（失败）",
        "separator": "；",
    },
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
    """A backend, or the server ("serve"), on a device; `good` is false if a result says that it was wrong there.

    device: its name; a CPU's is its instruction set. check: of `CHECKS`, or None if the result is of another kind.
    lower: a processor that has more was held to that instruction set.
    """

    chip: str
    device: str
    what: str
    date: str
    good: bool = True
    check: str | None = None
    lower: bool = False


def runs(results: Mapping[str, Sequence[Result]]) -> list[Run]:
    """What result files show."""
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
        yield from _validated(result, date)
    else:
        yield from _run(server_device(result["provenance"]), SERVE, date)


def _run(device: str | None, what: str, date: str) -> Iterator[Run]:
    chip = chip_of(device or "not said")
    if device and chip in ("gpu", "npu") and not what.startswith("reference"):
        yield Run(chip, device, what, date)


def _validated(result: Result, date: str) -> Iterator[Run]:
    kind, device = result["device"]["kind"], result["device"]["name"]
    chip = {"cuda": "gpu"}.get(kind, kind)
    # A backend whose linears are right has failed all the same if another step found it wrong.
    wrong = {step["step"].split("/")[1] for step in result["steps"] if "/" in step["step"] and _is_wrong(step)}
    served_by = None
    for step in result["steps"]:
        check, _, rest = step["step"].partition("/")
        name = rest.partition("/")[0]
        backend, _, level = name.partition(":")
        if chip == "cpu" and backend:
            if not step.get("uses"):  # the specification
                continue
            device = step["uses"]
            served_by = served_by or device
        if step["outcome"] == "out of time" and not step["failed"]:
            continue
        good = step["outcome"] == "finished" and not step["failed"]
        if check in CHECKS and step["cases"] > sum(step["skipped"].values()) and not backend.startswith("reference"):
            whole = check in (LINEAR, "prefill")
            yield Run(chip, device, backend, date, good and not (whole and name in wrong), check, bool(level))
        if check == "model" and "vllm" in step["values"]:
            yield Run(chip, served_by or device, SERVE, date, good)


def _is_one_of(run: Run, names: Sequence[str]) -> bool:
    """Whether a run's device has one of these names: an instruction set's, the beginning of a chip's, or "*"."""
    named = run.device in names if run.chip == "cpu" else run.device.startswith(tuple(names))
    return named or "*" in names


def _is_wrong(step: Mapping[str, Any]) -> bool:
    return bool(step["failed"]) or step["outcome"] not in ("finished", "out of time")


def renew(text: str, found: Sequence[Run], language: str) -> str:
    """A document with what is between its marks written anew."""

    def between(mark: re.Match[str]) -> str:
        about, key, silent = mark["about"], mark["key"], bool(mark["silent"])
        kind, _, rest = key.partition("/")
        if about == "held":
            checks = set(kind.split(","))
            new = _held([run for run in found if run.check in checks and run.what == rest], checks, silent, language)
        elif not rest:
            new = _whole(kind, found, language)
        else:
            prefix, _, what = rest.rpartition("/")
            names = prefix.split(",")
            on = [run for run in found if run.chip == kind and _is_one_of(run, names) and run.what == what]
            # Of a backend, its linears are what it is for.
            new = _cell([run for run in on if run.check in (None, LINEAR, "prefill")], silent, language)
        return f"<!-- {about}{mark['silent']}: {key} -->{new}<!-- end -->"

    return MARK.sub(between, text)


def _cell(these: Sequence[Run], silent: bool, language: str) -> str:
    form = FORMS[language]
    if not these:
        return "" if silent else form["none"]
    these = [run for run in these if not run.lower] or these
    newest = max(run.date for run in these)
    good = all(run.good for run in these if run.date == newest)
    text = form["run" if good else "failed"].format(date=newest) + (form["lower"] if these[0].lower else "")
    return text + (form["separator"] if silent else "")


def _held(these: Sequence[Run], checks: set[str], silent: bool, language: str) -> str:
    """The devices on which all of these checks were run, by their newest results."""
    form = FORMS[language]
    chips = []
    for device in dict.fromkeys(run.device for run in these):
        on = [run for run in these if run.device == device]
        if {run.check for run in on} != checks:
            continue
        newest = max(run.date for run in on)
        good = all(run.good for run in on if run.date == newest)
        chips.append(device if good else form["wrong"].format(chip=device))
    if not chips:
        return "" if silent else form["none"]
    return form["held"].format(chips=", ".join(chips)) + (form["separator"] if silent else "")


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
