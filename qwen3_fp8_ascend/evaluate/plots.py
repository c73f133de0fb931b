"""The pictures of the report, as SVG: the same bytes from the same numbers."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from qwen3_fp8_ascend.errors import BlockFp8Error
from qwen3_fp8_ascend.evaluate.precision.tables import NOISE_FLOOR, columns_of, names_of, title

FLOOR_COLOUR = "0.45"


def plot_precision(document: Mapping[str, Any]) -> bytes:
    """Mean KL of each comparison, and the largest relative error layer by layer.

    Raises:
        BlockFp8Error: matplotlib is not installed.
    """
    pyplot = _plotting("precision")
    columns, names = columns_of(document), names_of(document)
    colours = [FLOOR_COLOUR if name == NOISE_FLOOR else f"C{i}" for i, name in enumerate(names)]
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
            style = "--" if name == NOISE_FLOOR else "-"
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
    return _svg(pyplot, figure)


def plot_throughput(document: Mapping[str, Any]) -> bytes:
    """Time per output token of each configuration.

    Raises:
        BlockFp8Error: matplotlib is not installed.
    """
    pyplot = _plotting("throughput")
    rows = document["rows"]
    names = list(dict.fromkeys(row["configuration"] for row in rows))
    loads = list(dict.fromkeys((str(row["request_rate"]), str(row["concurrency"])) for row in rows))
    found = {(row["configuration"], str(row["request_rate"]), str(row["concurrency"])): row["tpot_ms"] for row in rows}
    figure, axes = pyplot.subplots(figsize=(7, 3.2), layout="constrained")
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        values = [found.get((name, *load), 0) for load in loads]
        bars = axes.bar([x + i * width for x in range(len(loads))], values, width)
        axes.bar_label(bars, fmt="%.1f", fontsize=8)
        bars.set_label(name)
    axes.set_xticks(
        [x + width * (len(names) - 1) / 2 for x in range(len(loads))],
        [f"rate {rate}, concurrency {concurrency}" for rate, concurrency in loads],
    )
    axes.set_ylabel("ms")
    axes.set_title("time per output token", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(y=0.12)
    axes.legend(frameon=False)
    return _svg(pyplot, figure)


def _plotting(name: str) -> Any:
    """matplotlib's pyplot, drawing the same bytes from the same numbers."""
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


def _svg(pyplot: Any, figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    return buffer.getvalue()
