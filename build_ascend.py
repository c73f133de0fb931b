"""Builds the NPU library (csrc/ascend) with CANN's compiler, for setup.py."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
LIBRARY = "libqwen3_fp8_ascendc.so"


def build_ascend_library(build_folder: Path, package_folder: Path) -> Path | None:
    """Build the library and put it into the package; None, and nothing is built, where CANN is not set up.

    Raises:
        RuntimeError: CANN is set up (ASCEND_HOME_PATH) but the build cannot be done; the message says what is missing.
    """
    home = os.environ.get("ASCEND_HOME_PATH")
    if not home:
        print("ASCEND_HOME_PATH is not set: the NPU kernels are not built (the CPU backend is not affected)")
        return None
    if not Path(home).is_dir():
        raise RuntimeError(f"ASCEND_HOME_PATH is {home}, which is no folder: source CANN's set_env.sh, or unset it")
    cmake = shutil.which("cmake")
    if cmake is None:
        raise RuntimeError("the NPU kernels need cmake 3.18 or newer: pip install cmake, or unset ASCEND_HOME_PATH")
    source = ROOT / "csrc" / "ascend"
    configure = [cmake, "-S", str(source), "-B", str(build_folder), f"-DPython3_EXECUTABLE={sys.executable}"]
    for step in (configure, [cmake, "--build", str(build_folder), "--parallel"]):
        if subprocess.run(step).returncode:
            raise RuntimeError(f"the NPU kernels cannot be built; this command failed, see above: {' '.join(step)}")
    built = build_folder / LIBRARY
    package_folder.mkdir(parents=True, exist_ok=True)
    target = package_folder / LIBRARY
    shutil.copy2(built, target)
    return target
