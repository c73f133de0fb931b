"""Print for people what `inspect` found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

from qwen3_fp8_ascend.checkpoints.plan import FLOAT, FP8
from qwen3_fp8_ascend.containers import FP8 as FP8_CONTAINER
from qwen3_fp8_ascend.errors import printable

if TYPE_CHECKING:
    from rich.console import Console

    from qwen3_fp8_ascend.checkpoints.experts import ExpertsSummary
    from qwen3_fp8_ascend.checkpoints.inspect import CheckpointReport
    from qwen3_fp8_ascend.checkpoints.plan import Plan

MAX_SHOWN = 50


def render(report: CheckpointReport, console: Console) -> None:
    """Print a report for people: what it is, what it weighs, what is wrong."""
    from rich.table import Table
    from rich.text import Text

    if report.config is not None:
        what = f"block FP8, e4m3, blocks of {report.config.block}, {report.block_fp8_layers} linear layers"
        if report.config.container != FP8_CONTAINER:
            what += f", in the words of {report.config.container}"
    elif report.errors:
        what = "not a usable block-FP8 checkpoint"
    else:
        what = "not quantized"
    console.print(Text(report.folder, style="bold"))
    console.print(Text(f"{report.architecture} ({report.model_type}): {what}"))
    table = Table(show_edge=False, pad_edge=False)
    for column, justify in (("kind", "left"), ("tensors", "right"), ("bytes", "right"), ("share", "right")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    total = sum(report.bytes_by_kind.values())
    for kind, size in sorted(report.bytes_by_kind.items(), key=lambda item: -item[1]):
        share = f"{100 * size / total:.1f} %" if total else ""
        table.add_row(Text(kind), f"{report.tensors_by_kind[kind]}", format_bytes(size), share)
    table.add_section()
    table.add_row(f"total in {report.files} files", f"{report.tensors}", format_bytes(total), "")
    console.print(table)
    if report.experts is not None:
        console.print(Text(_describe_experts(report.experts)))
    if report.plan is not None:
        console.print(Text(_describe_plan(report.plan)))
        ignored = report.plan.config.ignored
        if ignored:
            shown = _names(ignored[:4]) + (" …" if len(ignored) > 4 else "")
            console.print(Text(f"left unquantized by config: {len(ignored)} names ({shown})"))
    if report.unused_files:
        console.print(Text(f"not named in the index, so not used: {_names(report.unused_files)}"))
    _render_anomalies(report, console)


def _describe_plan(plan: Plan) -> str:
    """How modules will be served, experts of a layer counted as one."""
    kinds = Counter(plan.kinds().values())
    listed = sum(module.listed for module in plan.modules.values())
    return (
        f"served as its tensors are: {kinds[FP8]} modules in FP8, {kinds[FLOAT]} float "
        f"(the config leaves {listed} unquantized); --json has them by name"
    )


def _describe_experts(experts: ExpertsSummary) -> str:
    return (
        f"mixture of experts: {experts.layers} layers of {experts.experts}, "
        f"hidden size {experts.hidden}, intermediate size {experts.intermediate}; "
        f"served with {experts.divided}"
    )


def _names(names: Iterable[str]) -> str:
    """Names from a checkpoint, safe for a terminal and not endless."""
    return ", ".join(printable(name, 100) for name in names)


def _render_anomalies(report: CheckpointReport, console: Console) -> None:
    from rich.text import Text

    if report.errors or report.warnings:
        counted = f"{len(report.errors)} errors, {len(report.warnings)} warnings"
        console.print(Text(counted, style="bold red" if report.errors else "bold yellow"))
    else:
        console.print(Text("no anomalies", style="green"))
    for anomaly in report.anomalies[:MAX_SHOWN]:
        style = {"error": "red", "warning": "yellow"}.get(anomaly.severity, "")
        console.print(Text(f"{anomaly.severity}: {anomaly.what}", style=style), soft_wrap=True)
        parts = (
            ("where", anomaly.where),
            ("expected", anomaly.expected),
            ("got", anomaly.got),
            ("what to do", anomaly.fix),
        )
        for label, part in parts:
            if part is not None:
                console.print(Text(f"  {label}: {part}"), soft_wrap=True)
    if len(report.anomalies) > MAX_SHOWN:
        console.print(Text(f"… and {len(report.anomalies) - MAX_SHOWN} more; --json lists all"))


def format_bytes(size: float) -> str:
    """1536 -> '1.5 kB', in powers of 1000 as disks count."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} TB"
