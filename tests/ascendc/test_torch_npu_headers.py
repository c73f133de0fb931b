"""The operators for NPUs against the headers of every torch-npu: syntax and types. Linking them needs CANN."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from filelock import FileLock

from tests.support.torch_headers import headers_of

from .conftest import CACHE, SOURCES

PINNED = "2.13.0"
RELEASES = (("2.10.0.post7", 17), ("2.11.0.post3", 17), ("2.12.0.post3", 17), (PINNED, 17), ("2.14.0", 20))
"""Releases of torch-npu, and the C++ that the headers of their torch want (`csrc/ascend/CMakeLists.txt` reads it)."""


def torch_npu_headers(release: str) -> Path:
    """The headers of a torch-npu's wheel, which bring those of acl along. Fetched once, kept outside of git."""
    folder = CACHE / "torch_npu" / release
    include = folder / "torch_npu" / "include"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(CACHE / "torch_npu" / f"{release}.lock"):
        if not include.exists():
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
            fetched = subprocess.run([*pip, f"torch-npu=={release}"], capture_output=True, text=True)
            wheels = list(folder.glob("torch_npu-*.whl"))
            if fetched.returncode or not wheels:
                reason = (fetched.stderr or "no wheel").strip().splitlines()[-1]
                pytest.skip(f"the wheel of torch-npu {release} cannot be had: {reason}")
            with zipfile.ZipFile(wheels[0]) as wheel:
                wheel.extractall(folder, [name for name in wheel.namelist() if name.startswith("torch_npu/include/")])
            wheels[0].unlink()
    return include


@pytest.mark.parametrize(
    ("release", "standard"),
    [pytest.param(*pair, marks=[] if pair[0] == PINNED else pytest.mark.long) for pair in RELEASES],
)
def test_host_code_fits_torch_npu(release: str, standard: int, cache: Path) -> None:
    npu = torch_npu_headers(release)
    given = headers_of(".".join(release.split(".")[:3]), cache)
    headers = (given, given / "torch" / "csrc" / "api" / "include", npu, npu / "third_party" / "acl" / "inc")
    flags = [flag for path in headers for flag in ("-isystem", str(path))]
    command = ["g++", f"-std=gnu++{standard}", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", *flags]
    done = subprocess.run([*command, str(SOURCES / "host" / "torch_ops.cpp")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-6000:]
