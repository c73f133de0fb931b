"""Builds `device_guard.cpp` for a kind of device that is not here."""

from __future__ import annotations

import importlib.util
import os
import shlex
import subprocess
import sys
from pathlib import Path


def build(library: Path, device: str) -> None:
    """device: a name of `c10::DeviceType`. The guard is in force once the library is loaded."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        sys.exit("torch is not installed in this environment")
    torch = Path(spec.origin).parent
    source = Path(__file__).with_name("device_guard.cpp")
    options = ["-std=c++20", "-shared", "-fPIC", f"-DDEVICE={device}", f"-I{torch / 'include'}", f"-L{torch / 'lib'}"]
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    subprocess.run([*compiler, *options, str(source), "-lc10", "-o", str(library)], check=True)
