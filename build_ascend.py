"""Builds the NPU library (csrc/ascend) with CANN's compiler, for setup.py."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
LIBRARY = "libqwen3_fp8_ascendc.so"

OLDEST_CMAKE = (3, 18)
CMAKE_PACKAGES = ("ASCConfig.cmake", "asc-config.cmake")
"""CANN's package ASC: as 8.5 names it, and from 9.0 on."""

CMAKE_PACKAGE_FOLDERS = ("lib64/cmake", "compiler/tikcpp/ascendc_kernel_cmake")
"""Where it is below ASCEND_HOME_PATH. csrc/ascend/CMakeLists.txt looks there too."""

WITHOUT_NPU = "or unset ASCEND_HOME_PATH to install without NPU kernels"


def build_ascend_library(build_folder: Path) -> Path | None:
    """The library, built in `build_folder`; None, and nothing is built, where CANN is not set up.

    Raises:
        RuntimeError: CANN is set up (ASCEND_HOME_PATH) but the build cannot be done; the message says what is missing.
            Nothing of the attempt remains.
    """
    home = os.environ.get("ASCEND_HOME_PATH")
    if not home:
        print("ASCEND_HOME_PATH is not set: the NPU kernels are not built (the CPU backend is not affected)")
        return None
    _require_cann(Path(home))
    cmake = _require_cmake()
    if importlib.util.find_spec("torch_npu") is None:
        raise RuntimeError(
            f"the NPU kernels need torch_npu in the Python that builds them.\n  where: {sys.executable}\n"
            f"  what to do: pip install torch-npu, and install with --no-build-isolation, {WITHOUT_NPU}"
        )
    configure = [cmake, "-S", str(ROOT / "csrc" / "ascend"), "-B", str(build_folder)]
    configure += [f"-DPython3_EXECUTABLE={sys.executable}", *shlex.split(os.environ.get("CMAKE_ARGS", ""))]
    shutil.rmtree(build_folder, ignore_errors=True)  # CMake would keep the compiler and the version of another CANN
    for step in (configure, [cmake, "--build", str(build_folder), "--parallel"]):
        if subprocess.run(step).returncode:
            shutil.rmtree(build_folder, ignore_errors=True)
            raise RuntimeError(f"the NPU kernels cannot be built; this command failed, see above: {' '.join(step)}")
    return build_folder / LIBRARY


def put_into_package(library: Path, package_folder: Path) -> Path:
    """Copy the library beside the Python files, whole or not at all."""
    package_folder.mkdir(parents=True, exist_ok=True)
    target = package_folder / LIBRARY
    part = target.with_suffix(".part")
    try:
        shutil.copy2(library, part)
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
    return target


def _require_cann(home: Path) -> None:
    def missing(what: str) -> RuntimeError:
        return RuntimeError(
            f"ASCEND_HOME_PATH is {home}, {what}.\n"
            "  expected: the folder of CANN 8.5 or newer, as its set_env.sh sets it\n"
            f"  what to do: source set_env.sh of such a CANN, {WITHOUT_NPU}"
        )

    if not home.is_dir():
        raise missing("which is no folder")
    if not any((home / folder / name).exists() for folder in CMAKE_PACKAGE_FOLDERS for name in CMAKE_PACKAGES):
        raise missing("which has no CMake package ASC: it is older than CANN 8.5, or the toolkit is not installed")
    if not any(home.glob("*-linux/ccec_compiler/bin/bisheng")) and shutil.which("bisheng") is None:
        raise missing("which has no compiler (bisheng): the toolkit is not installed, or only in part")


def _require_cmake() -> str:
    beside = Path(sys.executable).parent / "cmake"  # pip may run a Python whose scripts are not in PATH
    cmake = shutil.which("cmake") or (str(beside) if beside.exists() else None)
    oldest = ".".join(map(str, OLDEST_CMAKE))
    if cmake is None:
        raise RuntimeError(f"the NPU kernels need cmake {oldest} or newer: pip install cmake, {WITHOUT_NPU}")
    text = subprocess.run([cmake, "--version"], capture_output=True, text=True).stdout
    version = re.search(r"version (\d+)\.(\d+)", text)
    if version is None or (int(version[1]), int(version[2])) < OLDEST_CMAKE:
        got = version[0] if version else text.strip() or "no answer to --version"
        raise RuntimeError(
            f"{cmake} is too old: expected {oldest} or newer, got {got}: pip install cmake, {WITHOUT_NPU}"
        )
    return cmake
