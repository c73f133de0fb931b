"""Comparisons as tables (Markdown, terminal) and as one HTML page with plots."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qwen3_fp8_ascend.errors import BlockFp8Error

Row = Mapping[str, Any]


def _number(value: float | None, form: str) -> str:
    return "—" if value is None else format(value, form)


def _layers(row: Row) -> float | None:
    return row["layers"] and row["layers"]["cosine"]


COLUMNS: dict[str, Callable[[Row], str]] = {
    "cosine": lambda r: _number(r["cosine"], ".7f"),
    "p99 rel": lambda r: _number(r["p99_rel"], ".2e"),
    "max rel": lambda r: _number(r["max_rel"], ".2e"),
    "layers' cosine": lambda r: _number(_layers(r), ".7f"),
    "KL mean": lambda r: ("≥ " if r["kl_from"] != "all logits" else "") + _number(r["kl_mean"], ".2e"),
    "KL p99": lambda r: _number(r["kl_p99"], ".2e"),
    "top-1": lambda r: _number(r["top1_agreement"], ".2%"),
    "greedy": lambda r: _number(r["greedy_match"], ".2%"),
    "perplexity": lambda r: f"{r['perplexity']:.4f} / {r['perplexity_reference']:.4f}",
}
"""Columns of the table and what each shows of a row."""


def cells(document: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table; the last row is the noise floor if there is one."""
    rows = [[f"{r['name']} vs {r['against']}", *(show(r) for show in COLUMNS.values())] for r in document["rows"]]
    floor = document["floor"]
    if floor is not None:
        rows.append([f"noise floor: {floor['name']} vs {floor['against']}", *(f(floor) for f in COLUMNS.values())])
    return ["comparison", *COLUMNS], rows


def markdown(document: Mapping[str, Any]) -> str:
    """The table in Markdown, with what made it below."""
    facts = document["provenance"]
    made = f"{facts['cpu']}, {facts['cores']} cores, {facts['date']}, commit {facts['commit']}"
    return f"{markdown_table(*cells(document))}\n\n`{document['command']}` — {made}\n"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Header, rule and rows of a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plotting(name: str) -> Any:
    """matplotlib's pyplot, drawing the same bytes from the same numbers.

    Raises:
        BlockFp8Error: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        fix = "pip install 'qwen3-fp8-ascend[bench]', or leave out what draws"
        raise BlockFp8Error("plots need matplotlib", fix=fix) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = name
    return pyplot


def plot(document: Mapping[str, Any]) -> bytes:
    """Mean KL of each comparison, and the largest relative error layer by layer, as SVG.

    Raises:
        BlockFp8Error: matplotlib is not installed.
    """
    pyplot = plotting("precision")
    rows = [*document["rows"], *([document["floor"]] if document["floor"] is not None else [])]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 3.6), layout="constrained")
    names = [f"{row['name']}\nvs {row['against']}" for row in rows]
    colours = [f"C{i}" for i in range(len(rows))]
    left.barh(range(len(rows)), [max(row["kl_mean"], 1e-14) for row in rows], color=colours)
    left.set_yticks(range(len(rows)), names, fontsize=7)
    left.invert_yaxis()
    left.set_xscale("log")
    left.set_xlabel("KL divergence, mean, nats a token")
    for row, name, colour in zip(rows, names, colours, strict=True):
        if row["layer_rel"]:
            right.plot(range(1, len(row["layer_rel"]) + 1), row["layer_rel"], color=colour, label=name)
    right.set_yscale("log")
    right.set_xlabel("layer")
    right.set_ylabel("largest relative error of an output")
    if right.get_legend_handles_labels()[0]:
        right.legend(fontsize=6)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    return buffer.getvalue()


def page(document: Mapping[str, Any]) -> str:
    """One HTML page with the table and the plots inside it."""
    header, rows = cells(document)

    def line(cell: str, values: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{cell}>{html.escape(v)}</{cell}>" for v in values) + "</tr>"

    picture = base64.b64encode(plot(document)).decode()
    facts = "".join(line("td", [key, str(value)]) for key, value in document["provenance"].items())
    style = "body{font-family:sans-serif;margin:2em}td,th{border:1px solid #ccc;padding:.3em .6em;text-align:right}"
    style += "table{border-collapse:collapse}td:first-child,th:first-child{text-align:left}"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Precision</title><style>{style}</style>'
        f"<h1>Precision</h1><table>{line('th', header)}{''.join(line('td', row) for row in rows)}</table>"
        f'<p><img alt="KL divergence and relative errors by layer" src="data:image/svg+xml;base64,{picture}"></p>'
        f"<h2>Made by</h2><p><code>{html.escape(document['command'])}</code></p><table>{facts}</table></html>\n"
    )
