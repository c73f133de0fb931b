"""Builds and wheels: what is shipped, and what a build says when it cannot be done."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A copy of what a build needs, without anything built."""
    copy = tmp_path / "sources"
    copy.mkdir()
    for name in ("pyproject.toml", "setup.py", "build_ascend.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("csrc", "qwen3_fp8_ascend"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return copy


def build(sources: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--no-build-isolation", "--no-deps"]
    return subprocess.run(
        [*pip, "--wheel-dir", str(sources / "dist"), str(sources)],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        check=False,
    )


def test_without_a_compiler_the_build_fails_and_says_what_to_install(sources: Path) -> None:
    done = build(sources, CXX="no-such-compiler", CC="no-such-compiler")
    assert done.returncode != 0
    assert "no C++ compiler: 'no-such-compiler' was not found" in done.stdout + done.stderr
    assert "apt-get install g++" in done.stdout + done.stderr


def test_with_cann_announced_but_absent_the_build_fails_and_says_so(sources: Path) -> None:
    done = build(sources, ASCEND_HOME_PATH=str(sources / "no-such-cann"))
    assert done.returncode != 0
    assert "ASCEND_HOME_PATH is" in done.stdout + done.stderr and "set_env.sh" in done.stdout + done.stderr


def test_the_wheel_runs_in_an_environment_of_its_own(sources: Path, tmp_path: Path) -> None:
    """Any Python 3: the library is Python-free. The kernels in the wheel are loaded and used, outside the sources."""
    done = build(sources)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (sources / "dist").glob("*.whl")
    assert "-py3-none-" in wheel.name
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
        names = archive.namelist()
    assert "qwen3_fp8_ascend/_cpu.so" in names and "qwen3_fp8_ascend/py.typed" in names
    assert not any(name.startswith(("tests/", "csrc/")) for name in names)
    code = (
        "import torch, qwen3_fp8_ascend\n"
        "from qwen3_fp8_ascend import ops\n"
        f"assert qwen3_fp8_ascend.__file__.startswith({str(site)!r})\n"
        "w = torch.ones(40, 200).to(torch.float8_e4m3fn)\n"
        "y = ops.block_linear(torch.ones(3, 200), ops.pack_weight(w, torch.ones(1, 2), 'cpu'))\n"
        "assert (y - 200).abs().max() < 1e-3, y\n"
    )
    subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(site)}, cwd=tmp_path, check=True)
