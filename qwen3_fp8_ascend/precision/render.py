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


def _layers(row: Row, key: str) -> float | None:
    return row["layers"] and row["layers"][key]


def _divergence(row: Row, key: str) -> str:
    # From the most probable tokens alone it is a lower bound.
    return ("" if row["kl_from"] == "all logits" else "≥ ") + _number(row[key], ".1e")


METRICS: dict[str, Callable[[Row], str]] = {
    "logits: cosine, mean": lambda r: _number(r["cosine"], ".7f"),
    "logits: cosine, smallest": lambda r: _number(r["min_cosine"], ".7f"),
    "logits: relative error, p99": lambda r: _number(r["p99_rel"], ".1e"),
    "logits: relative error, max": lambda r: _number(r["max_rel"], ".1e"),
    "layers' outputs: cosine, mean": lambda r: _number(_layers(r, "cosine"), ".7f"),
    "layers' outputs: relative error, p99": lambda r: _number(_layers(r, "p99_rel"), ".1e"),
    "layers' outputs: relative error, max": lambda r: _number(_layers(r, "max_rel"), ".1e"),
    "KL divergence, mean, nats": lambda r: _divergence(r, "kl_mean"),
    "KL divergence, p99, nats": lambda r: _divergence(r, "kl_p99"),
    "log-probability off by, mean, nats": lambda r: _number(r["logprob_distance"], ".1e"),
    "top-1 agreement": lambda r: _number(r["top1_agreement"], ".2%"),
    "greedy tokens equal": lambda r: _number(r["greedy_match"], ".2%"),
    "greedy continuations equal": lambda r: _number(r["greedy_prompts"], ".2%"),
    "perplexity": lambda r: _number(r["perplexity"], ".6g"),
    "perplexity of the reference": lambda r: _number(r["perplexity_reference"], ".6g"),
}
"""Lines of the table and what each shows of a comparison."""

WITHIN = {True: "met", False: "missed", None: "—"}


def title(document: Mapping[str, Any]) -> str:
    """Which checkpoint, and against what everything in the table is compared."""
    return f"{document['reference']['model']}: against {document['reference']['name']}"


def cells(document: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and lines of the table: a column for each comparison, the last one for the noise floor if there is one."""
    columns = columns_of(document)
    bound = document["bound"]
    lines = [[name, *(show(column) for column in columns)] for name, show in METRICS.items()]
    reached = f"cosine ≥ {bound['cosine']} and top-1 ≥ {bound['top1']:.1%}"
    lines.append([reached, *(WITHIN[column["within"]] for column in columns)])
    names = [row["name"] for row in document["rows"]]
    return ["", *names, *(["noise floor"] if document["floor"] is not None else [])], lines


def columns_of(document: Mapping[str, Any]) -> list[Row]:
    """The comparisons and the noise floor."""
    return [*document["rows"], *([document["floor"]] if document["floor"] is not None else [])]


def made(document: Mapping[str, Any]) -> list[str]:
    """On which machine each run was made."""
    runs = {document["reference"]["name"]: document["reference"]["provenance"]}
    runs |= {row["name"]: row["made"] for row in columns_of(document)}
    return [f"{name}: {machine(facts)}" for name, facts in runs.items()]


def machine(facts: Mapping[str, Any]) -> str:
    """A machine, date and commit in a line."""
    device = facts.get("device", "cpu")
    first = [] if device == "cpu" else [device]
    return ", ".join([*first, facts["cpu"], f"{facts['cores']} cores", facts["date"], f"commit {facts['commit']}"])


def markdown(document: Mapping[str, Any]) -> str:
    """The table in Markdown, with what made it below."""
    runs = "\n".join(f"- {line}" for line in made(document))
    table = markdown_table(*cells(document))
    return f"**{title(document)}**\n\n{table}\n\n{runs}\n\n```text\n{document['command']}\n```\n"


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
    # Viewers that draw text themselves find it; the default is curves, ten times as large.
    matplotlib.rcParams["svg.fonttype"] = "none"
    matplotlib.rcParams["font.family"] = "sans-serif"
    return pyplot


FLOOR_COLOUR = "0.45"


def plot(document: Mapping[str, Any]) -> bytes:
    """Mean KL of each comparison, and the largest relative error layer by layer, as SVG.

    Raises:
        BlockFp8Error: matplotlib is not installed.
    """
    pyplot = plotting("precision")
    columns = columns_of(document)
    names = [row["name"] for row in document["rows"]]
    colours = [f"C{i}" for i in range(len(names))]
    if document["floor"] is not None:
        names, colours = [*names, "noise floor"], [*colours, FLOOR_COLOUR]
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(11, 3.4), layout="constrained", gridspec_kw={"width_ratios": (1, 1.3)}
    )
    divergences = [max(column["kl_mean"], 1e-16) for column in columns]
    bars = left.barh(range(len(names)), divergences, color=colours, height=0.6)
    left.bar_label(bars, [f"{value:.1e}" for value in divergences], padding=3, fontsize=8)
    left.set_yticks(range(len(names)), names)
    left.invert_yaxis()
    left.set_xscale("log")
    left.set_xlim(min(divergences) / 3, max(divergences) * 30)
    left.set_title("KL divergence, mean, nats a token", fontsize=10)
    for column, name, colour in zip(columns, names, colours, strict=True):
        if column["layer_rel"]:
            count = len(column["layer_rel"])
            marker = "." if count < 9 else ""
            style = "--" if name == "noise floor" else "-"
            right.plot(range(1, count + 1), column["layer_rel"], style, color=colour, label=name, marker=marker)
    if right.get_legend_handles_labels()[0]:
        right.set_yscale("log")
        right.legend(fontsize=8)
        right.grid(axis="y", alpha=0.3)
        right.xaxis.get_major_locator().set_params(integer=True)
        right.set_xlabel("layer")
    else:
        right.axis("off")
        right.text(0.5, 0.5, "no layers' outputs in these runs", ha="center")
    right.set_title("largest relative error of a token's output", fontsize=10)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title(document), fontsize=11)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    return buffer.getvalue()


STYLE = """
body { font-family: sans-serif; margin: 2em auto; max-width: 70em; padding: 0 1em; color: #222 }
table { border-collapse: collapse }
td, th { border: 1px solid #ccc; padding: .3em .7em; text-align: right; font-variant-numeric: tabular-nums }
td:first-child, th:first-child { text-align: left }
tr:nth-child(even) { background: #f6f6f6 }
img { max-width: 100% }
table.facts td { text-align: left }
pre { background: #f6f6f6; padding: .7em; white-space: pre-wrap; overflow-wrap: anywhere }
"""


def page(document: Mapping[str, Any]) -> str:
    """One HTML page with the table and the plots inside it."""
    header, lines = cells(document)

    def line(cell: str, values: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{cell}>{html.escape(v)}</{cell}>" for v in values) + "</tr>\n"

    picture = base64.b64encode(plot(document)).decode()
    heading = html.escape(title(document))
    runs = "".join(f"<li>{html.escape(run)}</li>\n" for run in made(document))
    facts = "".join(line("td", [key, str(v)]) for key, v in document["provenance"].items() if key != "command")
    return (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{heading}</title>\n<style>{STYLE}</style>\n'
        f"<h1>{heading}</h1>\n<table>\n{line('th', header)}{''.join(line('td', row) for row in lines)}</table>\n"
        f'<p><img alt="KL divergence and relative errors by layer" src="data:image/svg+xml;base64,{picture}"></p>\n'
        f"<h2>Runs</h2>\n<ul>\n{runs}</ul>\n<h2>Compared by</h2>\n<pre>{html.escape(document['command'])}</pre>\n"
        f'<table class="facts">\n{facts}</table>\n</html>\n'
    )
