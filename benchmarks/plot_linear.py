"""Draws `make bench`'s newest CSV and writes its table into docs/cpu.md, each instruction set into its own.

python -m benchmarks.plot_linear [CSV]
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd

from benchmarks.documents import insert_table

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENT = ROOT / "docs" / "cpu.md"
OURS = "w8a8"


def main() -> None:
    csv = Path(sys.argv[1]) if len(sys.argv) > 1 else max(RESULTS.glob("linear-*.csv"))
    frame = pd.read_csv(csv)
    isa = frame.iloc[0]["isa"]
    picture = ROOT / "docs" / f"cpu_linear_{isa}.png"
    draw(frame, picture)
    insert_table(DOCUMENT, f"linear {isa}", table(frame, csv))
    print(f"{csv.name}: wrote {picture.relative_to(ROOT)} and the table in {DOCUMENT.relative_to(ROOT)}")


def layer_times(frame: pd.DataFrame) -> pd.DataFrame:
    """Sums of medians over the layers: ms by (threads, m) and implementation."""
    return frame.pivot_table(index=["threads", "m"], columns="implementation", values="median_ms", aggfunc="sum")


def table(frame: pd.DataFrame, csv: Path) -> str:
    """Markdown: our time, its share of the raw read, and how many times faster than each peer."""
    peers = [name for name in frame.implementation.unique() if name not in (OURS, "read")]
    facts = frame.iloc[0]
    lines = [
        f"{facts['model']}, the four linears of a layer together; {facts['cpu']}, {facts['cores']} cores; "
        f"{facts['date']}, commit {facts['commit']}, torch {facts['torch']}; `{csv.name}`.",
        "",
        "| threads | m | ms | GFLOP/s | of the raw read | " + " | ".join(f"× {peer}" for peer in peers) + " |",
        "|" + "---|" * (5 + len(peers)),
    ]
    flops = _flops(frame)
    for (threads, m), row in layer_times(frame).iterrows():
        ratios = " | ".join(f"{row[peer] / row[OURS]:.2f}" for peer in peers)
        rate = flops[(threads, m)] / row[OURS] / 1e6
        lines.append(f"| {threads} | {m} | {row[OURS]:.2f} | {rate:.0f} | {row['read'] / row[OURS]:.0%} | {ratios} |")
    return "\n".join(lines)


def _flops(frame: pd.DataFrame) -> pd.Series:
    ours = frame[frame.implementation == OURS]
    return (2.0 * ours.m * ours.n * ours.k).groupby([ours.threads, ours.m]).sum()


def draw(frame: pd.DataFrame, picture: Path) -> None:
    """Time of a layer's linears over m, relative to the raw read of the FP8 bytes, one panel a thread count."""
    times = layer_times(frame)
    counts = sorted(int(count) for count in frame.threads.unique())
    figure, axes = plt.subplots(1, len(counts), figsize=(6 * len(counts), 4.5), sharey=True, squeeze=False)
    for axis, count in zip(axes[0], counts, strict=True):
        part = times.loc[count]
        for name in frame.implementation.unique():
            style = {"linewidth": 3} if name == OURS else {"linestyle": ":" if name == "read" else "--"}
            axis.plot(part.index, part[name], marker="o", markersize=4, label=name, **style)
        axis.set(
            xscale="log", yscale="log", xlabel="tokens in the batch (m)", title=f"{count} thread{'s' * (count > 1)}"
        )
        axis.set_xticks(list(part.index), [str(m) for m in part.index])
        axis.grid(True, which="both", alpha=0.3)
    axes[0][0].set_ylabel("ms for a layer's four linears")
    axes[0][0].legend()
    figure.suptitle(f"{frame.iloc[0]['model']} on {frame.iloc[0]['cpu']}", fontsize=10)
    figure.tight_layout()
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    main()
