"""The range of torch: one everywhere, compiled against, refused below and told above."""

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from qwen3_fp8_ascend import torch_range
from qwen3_fp8_ascend.backends import cpu

from .conftest import ROOT
from .support.sanitizers import included_by
from .support.torch_headers import headers_of

sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "scripts"))
import test_torch_versions

import setup as build

COMPILER = os.environ.get("CXX", "c++")


def check_syntax(source: Path, headers: Path) -> str:
    """What the compiler says against a source, with the flags that the build gives it and no code made."""
    command = [COMPILER, "-fsyntax-only", *build.flags_of(str(source)), "-isystem", str(headers), str(source)]
    return subprocess.run(command, capture_output=True, text=True, check=False).stderr


def includes_torch(source: Path) -> bool:
    """Whether a source or a header of ours that it includes includes torch."""
    texts = {path.name: path.read_text() for path in source.parent.iterdir()}
    return any("<torch/" in texts[name] for name in {source.name, *included_by(source.name, texts)})


@pytest.mark.parametrize("version", torch_range.TESTED)
def test_the_kernels_compile_against_the_oldest_torch_and_a_new_one(version: str, cache: Path) -> None:
    """Those that do not include torch are the same everywhere: once is enough."""
    headers = headers_of(version, cache)
    sources = [ROOT / source for source in build.cpu_library().sources]
    if version != torch_range.TESTED[-1]:
        sources = [source for source in sources if includes_torch(source)]
    with ThreadPoolExecutor(2) as pool:
        said = dict(zip(sources, pool.map(lambda source: check_syntax(source, headers), sources), strict=True))
    assert len(said) >= 5 and not any(said.values()), "\n".join(said.values())


def test_runs_with_a_wheel_leave_out_what_compiles_the_sources() -> None:
    """There, only the tests are."""
    compiling = re.compile(r"^from tests\.support import .*(sanitizers|loop_instructions)", re.MULTILINE)
    files = [str(file.relative_to(ROOT)) for file in (ROOT / "tests" / "backends").glob("*.py")]
    assert {file for file in files if compiling.search((ROOT / file).read_text())} == set(test_torch_versions.COMPILE)


def test_what_the_oldest_torch_does_not_have_is_noticed(cache: Path, tmp_path: Path) -> None:
    """The macro by which the kernels once failed to compile there; newer headers have it."""
    kernels = ROOT / "csrc" / "cpu"
    checks = (kernels / "checks.h").read_text()
    assert checks.count(" TORCH_ERROR_CODE_CHECK(") == 1
    (tmp_path / "checks.h").write_text(checks.replace(" TORCH_ERROR_CODE_CHECK(", " STABLE_TORCH_ERROR_CODE_CHECK("))
    shutil.copy(kernels / "require.h", tmp_path)  # checks.h includes it
    source = tmp_path / "read.cpp"
    source.write_text('#include "checks.h"\n')
    oldest, newest = (check_syntax(source, headers_of(version, cache)) for version in torch_range.TESTED)
    assert "STABLE_TORCH_ERROR_CODE_CHECK" in oldest and newest == ""


def test_the_range_is_the_same_everywhere() -> None:
    first, last = (torch_range.release_of(version) for version in torch_range.TESTED)
    assert first == torch_range.OLDEST and last <= torch_range.NEWEST
    oldest, newest = (f"{major}.{minor}" for major, minor in (torch_range.OLDEST, torch_range.NEWEST))
    stated = {
        "README.md": f"torch {oldest} to {newest}",
        "README.zh.md": f"torch {oldest} 至 {newest}",
        "pyproject.toml": f"the kernels are for {oldest} to {newest}",
    }
    for name, words in stated.items():
        text = (ROOT / name).read_text()
        assert words in text, f"{name} does not say {words!r}"
        assert not re.search(r"torch ?(>=|≥) ?\d", text), f"{name} states another bound for torch"
    flags = [flag for flag in build.COMMON_FLAGS if "TORCH_TARGET_VERSION" in flag]
    major, minor = torch_range.OLDEST
    assert flags == [f"-DTORCH_TARGET_VERSION={(major << 56 | minor << 48):#018x}"]


@pytest.mark.parametrize(
    ("version", "outcome"),
    [("2.9.1+cpu", "too old"), ("2.10.0a0+git1", ""), ("2.10.0", ""), ("2.15.1+cu130", ""), ("2.16.0", "untried")],
)
def test_which_versions_are_in_the_range(version: str, outcome: str) -> None:
    assert torch_range.is_too_old(version) == (outcome == "too old")
    assert torch_range.is_untried(version) == (outcome == "untried")


@pytest.fixture
def torch_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Makes the build believe that the installed torch has some version."""

    def install(version: str) -> Path:
        folder = tmp_path / "torch"
        folder.mkdir()
        (folder / "__init__.py").touch()
        (folder / "version.py").write_text(f"__version__ = '{version}'\ndebug = False\n")
        monkeypatch.setattr(
            build.importlib.util, "find_spec", lambda name: type("Spec", (), {"origin": str(folder / "__init__.py")})
        )
        return folder

    return install


def test_a_torch_that_is_too_old_is_refused_by_the_build(torch_of) -> None:
    folder = torch_of("2.9.1+cpu")
    with pytest.raises(build.SetupError, match="the installed torch is too old") as error:
        build.torch_folder()
    for words in (f"torch {torch_range.DESCRIBED}", "got: torch 2.9.1+cpu", str(folder), "pip install 'torch>=2.10'"):
        assert words in str(error.value)


def test_a_torch_that_is_newer_is_built_with_and_told(torch_of, capsys: pytest.CaptureFixture[str]) -> None:
    folder = torch_of("2.16.0")
    assert build.torch_folder() == folder
    assert "torch 2.16.0 is newer than what the kernels were tried with" in capsys.readouterr().err


def test_the_library_is_not_loaded_by_a_torch_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu.torch, "__version__", "2.9.1+cpu")
    monkeypatch.setattr(cpu.torch.ops, "load_library", lambda path: pytest.fail("it was loaded"))
    expected = f"its library is for torch {torch_range.DESCRIBED}, and this is torch 2.9.1+cpu"
    assert cpu.unusable.__wrapped__() == expected
