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
LIMITS = {"read": "of the raw read", "multiply-adds": "of the multiply-adds"}


def main() -> None:
    csv = Path(sys.argv[1]) if len(sys.argv) > 1 else max(RESULTS.glob("linear-*.csv"), key=_made_at)
    frame = pd.read_csv(csv, dtype={"commit": str})  # 1094e42 is no number
    isa = frame.iloc[0]["isa"]
    picture = ROOT / "docs" / f"cpu_linear_{isa}.png"
    draw(frame, picture)
    insert_table(DOCUMENT, f"linear {isa}", table(frame, csv))
    print(f"{csv.name}: wrote {picture.relative_to(ROOT)} and the table in {DOCUMENT.relative_to(ROOT)}")


def _made_at(csv: Path) -> str:
    """The date and time that end its name; what comes before says what was measured."""
    return "-".join(csv.stem.split("-")[-2:])


def layer_times(frame: pd.DataFrame) -> pd.DataFrame:
    """Sums of medians over the layers: ms by (threads, m) and implementation."""
    return frame.pivot_table(index=["threads", "m"], columns="implementation", values="median_ms", aggfunc="sum")


def table(frame: pd.DataFrame, csv: Path) -> str:
    """Markdown: our time, its share of what was measured of `LIMITS`, and how many times faster than each peer."""
    implementations = list(frame.implementation.unique())
    limits = [name for name in LIMITS if name in implementations]
    peers = [name for name in implementations if name not in (OURS, *limits)]
    facts = frame.iloc[0]
    columns = ["threads", "m", "ms", "GFLOP/s", *(LIMITS[name] for name in limits), *(f"× {peer}" for peer in peers)]
    lines = [
        f"{facts['model']}, the four linears of a layer together; {facts['cpu']}, {facts['cores']} cores; "
        f"{facts['date']}, commit {facts['commit']}, torch {facts['torch']}; `{csv.name}`.",
        "",
        "| " + " | ".join(columns) + " |",
        "|" + "---|" * len(columns),
    ]
    flops = _flops(frame)
    for (threads, m), row in layer_times(frame).iterrows():
        rates = [f"{row[OURS]:.2f}", f"{flops[(threads, m)] / row[OURS] / 1e6:.0f}"]
        shares = [f"{row[name] / row[OURS]:.0%}" for name in limits]
        cells = [str(threads), str(m), *rates, *shares, *(f"{row[peer] / row[OURS]:.2f}" for peer in peers)]
        lines.append("| " + " | ".join(cells) + " |")
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
            style = {"linewidth": 3} if name == OURS else {"linestyle": ":" if name in LIMITS else "--"}
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
