"""Builds a wheel under each of two versions of torch, and runs the kernels' tests with the wheel of the other one.

Usage: python scripts/test_torch_versions.py OLD_ENVIRONMENT NEW_ENVIRONMENT [arguments for pytest]
Each environment has a torch, the package's dependencies, pytest, hypothesis and ml-dtypes (`make test-torch-versions`).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
import zipfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("pyproject.toml", "setup.py", "build_ascend.py", "README.md", "LICENSE", "csrc", "qwen3_fp8_ascend")
TESTS = ("tests/backends", "tests/test_ops.py", "tests/test_reference.py")
COMPILE = tuple(f"tests/backends/test_cpu_{name}.py" for name in ("sanitizers", "planted_defects", "loop_instructions"))
"""Those that compile csrc/ themselves: left out."""


def main(old: str, new: str, *options: str) -> int:
    pythons = [Path(environment).absolute() / "bin" / "python" for environment in (old, new)]
    versions = [ask(python, "import torch; print(torch.__version__)") for python in pythons]
    results = []
    with tempfile.TemporaryDirectory() as folder:
        wheels = [
            unpacked_wheel(python, Path(folder) / version) for python, version in zip(pythons, versions, strict=True)
        ]
        for tested, built in ((0, 1), (1, 0)):
            print(f"== built with torch {versions[built]}, run with torch {versions[tested]}", flush=True)
            outcome = run_tests(pythons[tested], wheels[built], Path(folder) / f"run-{tested}", options)
            results.append((versions[built], versions[tested], outcome))
    for built_with, run_with, outcome in results:
        print(f"built with torch {built_with}, run with torch {run_with}: {outcome}")
    return 0 if all(" 0 failed" in outcome for *_, outcome in results) else 1


def ask(python: Path, code: str, **options: Any) -> str:
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True, **options).stdout.strip()


def copy(names: tuple[str, ...], folder: Path) -> None:
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    for name in names:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=ignored)
        else:
            shutil.copy(source, folder)


def unpacked_wheel(python: Path, folder: Path) -> Path:
    """A folder with the package as its wheel holds it, compiled against that environment's torch from nothing."""
    (folder / "sources").mkdir(parents=True)
    copy(SOURCES, folder / "sources")
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "wheel", "-q", "--no-build-isolation", "--no-deps"]
    subprocess.run([*pip, "--wheel-dir", str(folder), str(folder / "sources")], check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def run_tests(python: Path, site: Path, folder: Path, options: tuple[str, ...]) -> str:
    """Counts of the tests, run outside of the sources so that the package is the wheel's."""
    folder.mkdir()
    copy(("pyproject.toml", "docs", "tests"), folder)
    environment = os.environ | {"PYTHONPATH": str(site)}
    library = ask(python, "from qwen3_fp8_ascend.backends import cpu; print(cpu.LIBRARY)", cwd=folder, env=environment)
    if not Path(library).is_relative_to(site):
        raise SystemExit(f"the tests would use {library}, not the wheel in {site}")
    report = folder / "report.xml"
    command = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *options, *TESTS]
    command += [f"--ignore={file}" for file in COMPILE]
    subprocess.run(command, cwd=folder, env=environment, check=False)
    if not report.exists():
        return "pytest did not run, 1 failed"
    counts = ElementTree.parse(report).getroot()[0].attrib
    failed = int(counts["failures"]) + int(counts["errors"])
    skipped = int(counts["skipped"])
    return f"{int(counts['tests']) - failed - skipped} passed, {failed} failed, {skipped} skipped"


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
