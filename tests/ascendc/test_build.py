"""build_ascend.py and CMakeLists.txt: nothing without CANN, and reasons where it is half there."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

import build_ascend

from .conftest import SOURCES


def test_without_cann_nothing_is_built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("ASCEND_HOME_PATH", raising=False)
    assert build_ascend.build_ascend_library(tmp_path / "build", tmp_path / "package") is None
    assert not (tmp_path / "package").exists()


def test_a_wrong_path_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ASCEND_HOME_PATH", str(tmp_path / "missing"))
    with pytest.raises(RuntimeError, match="no folder"):
        build_ascend.build_ascend_library(tmp_path / "build", tmp_path / "package")


@pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not installed")
def test_a_cann_without_the_cmake_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd) -> None:
    monkeypatch.setenv("ASCEND_HOME_PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="cannot be built"):
        build_ascend.build_ascend_library(tmp_path / "build", tmp_path / "package")
    assert "CANN 8.5 or newer" in " ".join(capfd.readouterr().err.split())  # cmake wraps lines


@pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not installed")
def test_another_architecture_is_refused_with_the_supported_chips(tmp_path: Path) -> None:
    command = ["cmake", "-S", str(SOURCES), "-B", str(tmp_path), "-DQWEN3_FP8_NPU_ARCH=dav-3510"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    message = " ".join(done.stderr.split())
    assert "Ascend910B*" in message
    assert "Ascend910_93*" in message
