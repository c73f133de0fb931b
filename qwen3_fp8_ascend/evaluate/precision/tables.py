"""Comparisons as tables: for the terminal, for Markdown, and on one HTML page with plots."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from typing import Any

from qwen3_fp8_ascend.evaluate.templates import render

Row = Mapping[str, Any]
NOISE_FLOOR = "noise floor"


def number(value: float | None, form: str) -> str:
    """A number in a format of Python's, and a dash for none."""
    return "—" if value is None else format(value, form)


def _layers(row: Row, key: str) -> float | None:
    return row["layers"] and row["layers"][key]


def _divergence(row: Row, key: str) -> str:
    # From the most probable tokens alone it is a lower bound.
    return ("" if row["kl_from"] == "all logits" else "≥ ") + number(row[key], ".1e")


METRICS: dict[str, Callable[[Row], str]] = {
    "logits: cosine, mean": lambda r: number(r["cosine"], ".7f"),
    "logits: cosine, smallest": lambda r: number(r["min_cosine"], ".7f"),
    "logits: relative error, p99": lambda r: number(r["p99_rel"], ".1e"),
    "logits: relative error, max": lambda r: number(r["max_rel"], ".1e"),
    "layers' outputs: cosine, mean": lambda r: number(_layers(r, "cosine"), ".7f"),
    "layers' outputs: relative error, p99": lambda r: number(_layers(r, "p99_rel"), ".1e"),
    "layers' outputs: relative error, max": lambda r: number(_layers(r, "max_rel"), ".1e"),
    "KL divergence, mean, nats": lambda r: _divergence(r, "kl_mean"),
    "KL divergence, p99, nats": lambda r: _divergence(r, "kl_p99"),
    "log-probability off by, mean, nats": lambda r: number(r["logprob_distance"], ".1e"),
    "top-1 agreement": lambda r: number(r["top1_agreement"], ".2%"),
    "greedy tokens equal": lambda r: number(r["greedy_match"], ".2%"),
    "greedy continuations equal": lambda r: number(r["greedy_prompts"], ".2%"),
    "perplexity": lambda r: number(r["perplexity"], ".6g"),
    "perplexity of the reference": lambda r: number(r["perplexity_reference"], ".6g"),
}
"""Lines of the table and what each shows of a comparison; `templates/metrics.zh.j2` has their names in Chinese."""

WITHIN = {True: "met", False: "missed", None: "—"}


def title(document: Mapping[str, Any]) -> str:
    """Which checkpoint, and against what everything in the table is compared."""
    return f"{document['reference']['model']}: against {document['reference']['name']}"


def cells(document: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and lines of the table: a column for each comparison, the last one for the noise floor if there is one."""
    bound = document["bound"]
    lines = [[name, *shown] for name, shown in metrics(document).items()]
    reached = f"cosine ≥ {bound['cosine']} and top-1 ≥ {bound['top1']:.1%}"
    lines.append([reached, *(WITHIN[column["within"]] for column in columns_of(document))])
    return ["", *names_of(document)], lines


def metrics(document: Mapping[str, Any]) -> dict[str, list[str]]:
    """The lines of the table by metric: what it shows of each column."""
    return {name: [show(column) for column in columns_of(document)] for name, show in METRICS.items()}


def columns_of(document: Mapping[str, Any]) -> list[Row]:
    """The comparisons and the noise floor."""
    return [*document["rows"], *([document["floor"]] if document["floor"] is not None else [])]


def names_of(document: Mapping[str, Any]) -> list[str]:
    """What the columns are called."""
    floor = [NOISE_FLOOR] if document["floor"] is not None else []
    return [*(row["name"] for row in document["rows"]), *floor]


def runs_of(document: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The facts of each run that was compared, the reference first."""
    runs = {document["reference"]["name"]: document["reference"]["provenance"]}
    return runs | {row["name"]: row["made"] for row in columns_of(document)}


def machine(facts: Mapping[str, Any]) -> str:
    """A machine, date and commit in a line."""
    device = facts.get("device", "cpu")
    first = [] if device == "cpu" else [device]
    return ", ".join([*first, facts["cpu"], f"{facts['cores']} cores", facts["date"], f"commit {facts['commit']}"])


def markdown(document: Mapping[str, Any]) -> str:
    """The table in Markdown, with what made it below."""
    return render("comparison.md", **_values(document))


def page(document: Mapping[str, Any]) -> str:
    """One HTML page with the table and the plots inside it."""
    from qwen3_fp8_ascend.evaluate.plots import plot_precision

    picture = base64.b64encode(plot_precision(document)).decode()
    return render("comparison.html", **_values(document), picture=picture, facts=document["provenance"])


def _values(document: Mapping[str, Any]) -> dict[str, Any]:
    header, lines = cells(document)
    runs = {name: machine(facts) for name, facts in runs_of(document).items()}
    return {"title": title(document), "header": header, "lines": lines, "runs": runs, "command": document["command"]}
