"""The page that a person reads, in two languages: the templates have the words, this has the numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qwen3_fp8_ascend.evaluate import templates

SUFFIXES = {"en": ".md", "zh": ".zh.md"}


def render(results: Sequence[Mapping[str, Any]], language: str) -> str:
    """Results of `validate`, one after another."""
    return templates.render(f"validation.{language}.md", results=[_values(result) for result in results])


def _values(result: Mapping[str, Any]) -> dict[str, Any]:
    facts, steps = result["facts"], result["steps"]
    values = {step["step"]: step["values"] for step in steps}
    return {
        "device": result["device"]["name"],
        "verdict": result["verdict"],
        "made": result["provenance"],
        "machine": {**facts["machine"], **{name: of for name, of in facts["packages"].items() if of}},
        "ascend": facts["ascend"] if result["device"]["kind"] == "npu" else {},
        "libraries": {name: of["compilers"] for name, of in facts["native libraries"].items() if of},
        "backends": [(b["name"], b["detail"] or "", b["reason"] or "") for b in facts["backends"]],
        "steps": [_step(step) for step in steps],
        "failures": [failure for step in steps for failure in step["failures"]],
        "ended": [step for step in steps if step["outcome"] != "finished"],
        "probes": [(probe, what, _figure(of)) for probe, found in _of(values, "probes") for what, of in found.items()],
        "times": [_time(line) for _, found in _of(values, "times") for line in found["lines"]],
        "not_timed": {name: why for _, found in _of(values, "times") for name, why in found["not timed"].items()},
        "model": [(case, what, _figure(of)) for case, found in _of(values, "model") for what, of in found.items()],
        "seconds": f"{sum(step['seconds'] for step in steps):.0f}",
    }


def _of(values: Mapping[str, Any], step: str) -> list[tuple[str, Any]]:
    return list(values.get(step, {}).items())


def _step(step: Mapping[str, Any]) -> dict[str, Any]:
    worst = max(step["worst"].items(), key=lambda item: item[1]["share"], default=None)
    return {
        "name": step["step"],
        "outcome": "failed" if step["failed"] and step["outcome"] == "finished" else step["outcome"],
        "cases": str(step["cases"]),
        "failed": str(step["failed"]),
        "skipped": "; ".join(f"{count}: {reason}" for reason, count in step["skipped"].items()),
        "worst": f"{worst[0]} {_figure(worst[1]['value'])}" if worst else "",
        "limit": f"{worst[1]['limit']:.2g}" if worst else "",
        "case": f"`{worst[1]['case'].removeprefix(step['step'] + '/')}`" if worst else "",
        "seconds": f"{step['seconds']:.0f}",
    }


def _time(line: Mapping[str, Any]) -> list[str]:
    ratios = (line["of_copy"], line["over_bf16"], line.get("predicted_over_bf16"))
    shown = [line["layer"], str(line["m"]), line["contender"], line["computes"], line["clock"]]
    shown += [f"{line[key]:.1f}" for key in ("median_us", "p20_us", "p80_us")]
    return shown + ["" if ratio is None else f"{ratio:.2f}" for ratio in ratios]


def _figure(value: Any) -> str:
    return "NaN" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)
