"""build_ascend.py and CMakeLists.txt on stand-ins for CANN: which program compiles and links what with which flags,
nothing without CANN, and reasons where it is half there. No vendor compiler is run: see tests/support/cann_stand_in."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import build_ascend
from tests.support import cann_stand_in
from tests.support.cann_stand_in import StandIn, Step

from .conftest import KERNELS, ROOT, SOURCES

CMAKE = shutil.which("cmake")
needs_cmake = pytest.mark.skipif(CMAKE is None, reason="cmake is not installed")

BUILD = """
import pathlib, sys
import build_ascend
build_ascend.ROOT = pathlib.Path(sys.argv[1])
library = build_ascend.build_ascend_library(pathlib.Path(sys.argv[2]) / "build")
print("BUILT", build_ascend.put_into_package(library, pathlib.Path(sys.argv[2]) / "package"))
"""


def build(folder: Path, environment: Mapping[str, str], root: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """What setup.py does, in a process of its own that sees the stand-in's environment."""
    command = [sys.executable, "-c", BUILD, str(root), str(folder)]
    return subprocess.run(command, env=dict(environment), cwd=ROOT, capture_output=True, text=True)


def flags_of(step: Step) -> set[str]:
    return set(step.arguments)


def check_steps(steps: Sequence[Step], home: Path) -> Step:
    """The link step, after it was checked that CANN's compiler did what only it can do, and the flags that matter.

    Raises:
        AssertionError: something else linked, or a flag is missing.
    """
    links = [step for step in steps if step.step == "link"]
    assert [step.program for step in links] == ["bisheng"], [step.line for step in links]
    compiled = {step.source: step for step in steps if step.step == "compile"}
    assert compiled.keys() == {path.name for path in (SOURCES / "host").iterdir() if path.suffix != ".h"}
    for name, step in compiled.items():
        assert step.program == ("bisheng" if name.endswith(".asc") else "host-c++"), step.line
        assert {"-O3", "-DNDEBUG", "-fPIC"} <= flags_of(step), step.line
        assert not flags_of(step) & {"-O0", "-O1", "-O2", "-g"}, step.line
        assert ("--npu-arch=dav-2201" in step.arguments) == name.endswith(".asc"), step.line
        assert any(re.fullmatch(r"-std=(c|gnu)\+\+\d\d", flag) for flag in step.arguments), step.line
    (link,) = links
    assert "-shared" in link.arguments
    assert f"-L{home / 'lib64'}" in link.arguments
    assert {"-ltorch_npu", "-lascendcl"} <= flags_of(link)
    assert {Path(word).name for word in link.arguments if word.endswith(".o")} == {f"{name}.o" for name in compiled}
    return link


@dataclass(frozen=True)
class Built:
    version: str
    cann: StandIn
    folder: Path


@pytest.fixture(scope="session", params=cann_stand_in.VERSIONS)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The library, built once with each version's stand-in."""
    folder = tmp_path_factory.mktemp(f"cann-{request.param}")
    cann = cann_stand_in.install(folder / "toolkit", request.param)
    done = build(folder, cann.environment())
    assert done.returncode == 0, done.stdout + done.stderr
    return Built(request.param, cann, folder)


@pytest.fixture
def cann(tmp_path: Path) -> StandIn:
    return cann_stand_in.install(tmp_path / "toolkit", "9.0")


@needs_cmake
def test_cann_compiles_the_kernels_and_links_the_library(built: Built) -> None:
    assert (built.folder / "package" / build_ascend.LIBRARY).stat().st_size > 0
    link = check_steps(built.cann.steps(), built.cann.home)
    print(f"CANN {built.version} stand-in: {link.line}")


@needs_cmake
def test_kernels_say_their_cores_as_each_cann_reads_it(built: Built) -> None:
    version, steps = built.version, built.cann.steps()
    declared = {name: kernel for step in steps for name, kernel in step.kernels.items()}
    got = {name.removeprefix("qwen3_fp8_"): (k["qualifiers"], k["kind"]) for name, k in declared.items()}
    batch = "__schedmode__(1) " if version == "9.1" else ""
    if version == "8.5":
        plain = "__global__ __aicore__"
        vector, mixed = (plain, "KERNEL_TYPE_AIV_ONLY"), (plain, "KERNEL_TYPE_MIX_AIC_1_2")
        gemv = (plain, "KERNEL_TYPE_MIX_AIV_1_0")
    else:
        vector, mixed = ("__global__ __vector__", ""), (f"{batch}__global__ __mix__(1, 2)", "")
        gemv = (f"{batch}__global__ __mix__(0, 1)", "")
    expected = {"group_quantize": vector, "block_dequantize": vector, "block_gemv": gemv}
    expected |= dict.fromkeys(("block_linear", "block_grouped_linear"), mixed)
    assert expected.keys() == set(KERNELS)
    assert got == expected


@needs_cmake
@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        (" LINKER_LANGUAGE ASC)", ")", "host-c++"),
        ('"$<$<NOT:$<CONFIG:Debug>>:-O3;-DNDEBUG>"', "", "-O3"),
    ],
    ids=["the host's compiler links", "no optimization"],
)
def test_the_check_notices_a_build_that_is_wrong(tmp_path: Path, old: str, new: str, complaint: str) -> None:
    cann = cann_stand_in.install(tmp_path / "toolkit", "8.5")
    root = tmp_path / "root"
    shutil.copytree(SOURCES, root / "csrc" / "ascend")
    lists = root / "csrc" / "ascend" / "CMakeLists.txt"
    text = lists.read_text()
    assert text.count(old) == 1, "CMakeLists.txt has changed: bring this replacement up to date"
    lists.write_text(text.replace(old, new))
    done = build(tmp_path, cann.environment(), root)
    assert done.returncode == 0, done.stdout + done.stderr
    print(*(step.line for step in cann.steps() if step.step == "link"))
    with pytest.raises(AssertionError, match=re.escape(complaint)):
        check_steps(cann.steps(), cann.home)


def test_without_cann_nothing_is_built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("ASCEND_HOME_PATH", raising=False)
    assert build_ascend.build_ascend_library(tmp_path / "build") is None
    assert not (tmp_path / "build").exists()


def refusal(folder: Path, environment: Mapping[str, str]) -> str:
    """The message of a build that must fail and leave nothing, its lines joined: cmake wraps its own."""
    done = build(folder, environment)
    assert done.returncode != 0
    assert not (folder / "build").exists()
    assert not (folder / "package").exists()
    return " ".join((done.stdout + done.stderr).split())


def test_a_wrong_path_is_named(cann: StandIn, tmp_path: Path) -> None:
    message = refusal(tmp_path, cann.environment() | {"ASCEND_HOME_PATH": str(tmp_path / "missing")})
    assert "which is no folder" in message
    assert "unset ASCEND_HOME_PATH" in message


def test_a_cann_without_the_cmake_package_is_named(cann: StandIn, tmp_path: Path) -> None:
    shutil.rmtree(cann.home / "lib64" / "cmake")
    message = refusal(tmp_path, cann.environment())
    assert "no CMake package ASC" in message
    assert "CANN 8.5 or newer" in message


def test_a_cann_without_a_compiler_is_named(cann: StandIn, tmp_path: Path) -> None:
    shutil.rmtree(next(cann.home.glob("*-linux")))
    assert "no compiler (bisheng)" in refusal(tmp_path, cann.environment())


@needs_cmake
@pytest.mark.parametrize(
    ("version_header", "complaint"),
    [
        ("#define ASC_DEVKIT_MAJOR 8\n#define ASC_DEVKIT_MINOR 3\n", "too old: expected 8.5 or newer (805), got 803"),
        (None, "the version of CANN in"),
    ],
    ids=["too old", "unknown"],
)
def test_a_cann_of_another_version_is_refused(
    cann: StandIn, tmp_path: Path, version_header: str | None, complaint: str
) -> None:
    header = next(cann.home.rglob("asc_devkit_version.h"))
    header.unlink() if version_header is None else header.write_text(version_header)
    assert complaint in refusal(tmp_path, cann.environment())


@needs_cmake
def test_a_version_that_cannot_be_read_can_be_given(cann: StandIn, tmp_path: Path) -> None:
    next(cann.home.rglob("asc_devkit_version.h")).unlink()
    given = {"CMAKE_ARGS": "-DQWEN3_FP8_CANN_VERSION=901"}
    done = build(tmp_path, cann.environment() | given)
    assert done.returncode == 0, done.stdout + done.stderr
    assert any("__schedmode__(1)" in k["qualifiers"] for step in cann.steps() for k in step.kernels.values())


@needs_cmake
@pytest.mark.parametrize(("asked", "standard"), [("201703L", "-std=gnu++17"), ("202002L", "-std=gnu++20")])
def test_a_torch_built_for_cuda_does_and_its_headers_say_which_cpp(
    cann: StandIn, tmp_path: Path, asked: str, standard: str
) -> None:
    """PyPI's is, on x86 always. Its CMake package wants the CUDA toolkit, which an NPU's machine has not."""
    given, real = cann.python_path / "torch", Path(torch.__file__).parent
    (given / "share" / "cmake" / "Torch").mkdir(parents=True)
    (given / "share" / "cmake" / "Torch" / "TorchConfig.cmake").write_text('message(FATAL_ERROR "where is CUDA?")\n')
    (given / "__init__.py").write_text("raise ImportError\n")
    (given / "lib").symlink_to(real / "lib")
    (given / "include").mkdir()
    for name in ("c10", "torch"):
        (given / "include" / name).symlink_to(real / "include" / name)
    (given / "include" / "ATen").mkdir()
    (given / "include" / "ATen" / "ATen.h").write_text(f"#if !defined(_MSC_VER) && __cplusplus < {asked}\n#endif\n")
    done = build(tmp_path, cann.environment())
    assert done.returncode == 0, done.stdout + done.stderr
    link = check_steps(cann.steps(), cann.home)
    assert {str(given / "lib" / f"lib{name}.so") for name in ("torch_cpu", "c10")} <= flags_of(link)
    assert "libtorch_cuda" not in link.line
    hosts = [step for step in cann.steps() if step.source.endswith(".cpp")]
    assert hosts and all(standard in step.arguments for step in hosts)


@needs_cmake
def test_a_torch_without_libraries_is_named(cann: StandIn, tmp_path: Path) -> None:
    (cann.python_path / "torch").mkdir()
    (cann.python_path / "torch" / "__init__.py").write_text("")
    assert "has no lib/libtorch_cpu.so" in refusal(tmp_path, cann.environment())


@needs_cmake
def test_without_torch_npu_the_build_says_so(cann: StandIn, tmp_path: Path) -> None:
    shutil.rmtree(cann.python_path / "torch_npu")
    assert "need torch_npu in the Python that builds them" in refusal(tmp_path, cann.environment())


@needs_cmake
def test_a_source_that_does_not_compile_leaves_nothing(cann: StandIn, tmp_path: Path) -> None:
    (bisheng,) = cann.home.rglob("bisheng")
    bisheng.write_text("#!/bin/sh\necho 'error: unknown type name' >&2\nexit 1\n")
    message = refusal(tmp_path, cann.environment())
    assert "error: unknown type name" in message
    assert "the NPU kernels cannot be built; this command failed" in message


@pytest.mark.parametrize(
    ("script", "complaint"),
    [
        (None, "need cmake 3.18 or newer: pip install cmake"),
        ("echo cmake version 3.16.3", "expected 3.18 or newer, got version 3.16"),
    ],
    ids=["none", "too old"],
)
def test_a_missing_cmake_is_named(
    cann: StandIn, tmp_path: Path, script: str | None, complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = tmp_path / "programs"
    programs.mkdir()
    if script is not None:
        (programs / "cmake").write_text(f"#!/bin/sh\n{script}\n")
        (programs / "cmake").chmod(0o755)
    monkeypatch.setenv("ASCEND_HOME_PATH", str(cann.home))
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.setattr(sys, "executable", str(programs / "python"))
    with pytest.raises(RuntimeError, match=re.escape(complaint)):
        build_ascend.build_ascend_library(tmp_path / "build")
    assert not (tmp_path / "build").exists()


def test_an_unusable_cann_stops_the_installation_before_anything_is_compiled(tmp_path: Path) -> None:
    folders = ["--build-temp", str(tmp_path / "temp"), "--build-lib", str(tmp_path / "lib")]
    environment = os.environ | {"ASCEND_HOME_PATH": str(tmp_path / "missing")}
    command = [sys.executable, "setup.py", "-q", "build_ext", *folders]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert "which is no folder" in done.stderr
    assert not (tmp_path / "temp").exists()
    assert not (tmp_path / "lib").exists()


def test_the_library_is_put_into_the_package_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        build_ascend.put_into_package(tmp_path / "missing.so", tmp_path / "package")
    assert not list((tmp_path / "package").iterdir())
    library = tmp_path / "built.so"
    library.write_bytes(b"library")
    assert build_ascend.put_into_package(library, tmp_path / "package").read_bytes() == b"library"
    assert [path.name for path in (tmp_path / "package").iterdir()] == [build_ascend.LIBRARY]


@needs_cmake
def test_another_architecture_is_refused_with_the_supported_chips(tmp_path: Path) -> None:
    command = ["cmake", "-S", str(SOURCES), "-B", str(tmp_path), "-DQWEN3_FP8_NPU_ARCH=dav-3510"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    message = " ".join(done.stderr.split())
    assert "Ascend910B*" in message
    assert "Ascend910_93*" in message
