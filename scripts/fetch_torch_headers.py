"""Puts the C++ headers of a release of torch into a folder, to compile against without installing that torch.

Usage: python scripts/fetch_torch_headers.py VERSION FOLDER

They come out of the wheel for macOS: the smallest one (80 to 130 MB, where those for Linux with CUDA take up to 900),
and what the native libraries include (torch/csrc/stable, torch/headeronly, the C shim) is the same in all of them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PLATFORMS = ("macosx_11_0_arm64", "macosx_14_0_arm64")
PYTHON = "3.12"
INCLUDE = "torch/include/"
NEEDED = Path("torch") / "csrc" / "stable" / "library.h"


def fetch(version: str, folder: Path) -> Path:
    """The folder to give to the compiler; downloaded if it is not there yet.

    Raises:
        RuntimeError: pip cannot get that release.
    """
    include = folder / version / INCLUDE
    if (include / NEEDED).is_file():
        return include
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "-q", "--no-deps"]
        pip += ["--only-binary=:all:", "--implementation", "cp", "--python-version", PYTHON, "--dest", temporary]
        pip += [option for platform in PLATFORMS for option in ("--platform", platform)]
        done = subprocess.run([*pip, f"torch=={version}"], capture_output=True, text=True, check=False)
        wheels = list(Path(temporary).glob("*.whl"))
        if done.returncode or not wheels:
            reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
            raise RuntimeError(f"the headers of torch {version} cannot be had: {reason}")
        whole = Path(temporary) / "whole"
        with zipfile.ZipFile(wheels[0]) as archive:
            archive.extractall(whole, [name for name in archive.namelist() if name.startswith(INCLUDE)])
        if not (whole / INCLUDE / NEEDED).is_file():
            raise RuntimeError(f"the headers of torch {version} cannot be had: {wheels[0].name} has no {NEEDED}")
        try:
            os.replace(whole, folder / version)
        except OSError:  # another process was faster
            if not (include / NEEDED).is_file():
                raise
    return include


if __name__ == "__main__":
    print(fetch(sys.argv[1], Path(sys.argv[2])))
