"""Compilers other than the one that built what is tested: a too old one is refused by name, clang compiles all."""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from .conftest import ROOT

sys.path.insert(0, str(ROOT))
import setup as build

CLANG = "clang++"


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch):
    """Makes the build take another compiler, of which it remembers things otherwise."""
    remembered = (build.is_clang, build.target_architecture)

    def use(command: str) -> None:
        monkeypatch.setenv("CXX", command)
        for function in remembered:
            function.cache_clear()

    yield use
    monkeypatch.undo()
    for function in remembered:
        function.cache_clear()


def test_a_compiler_without_the_instructions_is_refused_by_name(tmp_path: Path) -> None:
    unknown = {"x86_64": "-mamx-tile", "aarch64": "-march=armv8.2-a+bf16"}.get(build.target_architecture())
    if unknown is None:
        pytest.skip(f"no file of csrc/cpu needs instructions of its own on {build.target_architecture()}")
    old = tmp_path / "g++-old"
    real = shutil.which(build.cxx()[0])
    answers = {
        "--version": "echo 'g++-old 10.2.1'; exit",
        unknown: f"echo 'error: unrecognized command-line option {unknown}' >&2; exit 1",
    }
    cases = "".join(f"*{word}*) {answer};;" for word, answer in answers.items())
    old.write_text(f'#!/bin/sh\ncase "$*" in {cases} esac\nexec {real} "$@"\n')
    old.chmod(0o755)
    command = [sys.executable, "setup.py", "-q", "build_ext", f"--build-lib={tmp_path}", f"--build-temp={tmp_path}"]
    changed = {"CXX": str(old), "CC": str(old), "QWEN3_FP8_ASCEND_OBJECTS": ""}
    done = subprocess.run(command, cwd=ROOT, env=os.environ | changed, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    said = ("cannot make the instructions of csrc/cpu/", "expected: g++ 11", "got: g++-old 10.2.1", unknown, "CXX")
    assert all(words in done.stderr for words in said), done.stderr
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["g++-old"], "something was built"


def test_clang_knows_every_flag_and_compiles_every_source(compiler) -> None:
    """No code is made: one release, clang 16, crashes when it makes avx512.cpp's."""
    if shutil.which(CLANG) is None:
        pytest.skip(f"no {CLANG}: apt-get install clang")
    compiler(CLANG)
    headers = Path(torch.__file__).parent / "include"

    def check(source: str) -> str:
        command = [CLANG, "-fsyntax-only", "-fPIC", *build.flags_of(source), "-isystem", str(headers), source]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stderr

    assert build.is_clang()
    with ThreadPoolExecutor(2) as pool:
        said = list(pool.map(check, build.cpu_library().sources))
    assert len(said) >= 5 and not any(said), "\n".join(said)


def test_which_compiler_is_clang(compiler, tmp_path: Path) -> None:
    for defined, expected in (("__clang__", True), ("__GNUC__", False)):
        named = tmp_path / f"c++-{expected}"
        named.write_text(f"#!/bin/sh\necho '#define {defined} 1'\n")
        named.chmod(0o755)
        compiler(str(named))
        flags = build.flags_of("csrc/cpu/avx2.cpp") + build.flags_of("csrc/cpu/neon.cpp")
        assert build.is_clang() is expected
        assert any(flag in build.GCC_ONLY for flag in flags) is not expected or not build.of_one_isa()
