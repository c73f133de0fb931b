"""`make wheel`: its tag holds, nothing in it is somebody else's, and it works where there is no compiler."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from scripts import build_wheel
from tests.support.wheels import MISSING, kept_wheel
from tests.test_packaging import environment


@pytest.fixture(scope="module")
def made(cache: Path) -> tuple[Path, str]:
    """The wheel, and what the command said."""
    if MISSING:
        pytest.skip(f"not installed: {', '.join(MISSING)} (the extra `wheel`, which `make venv` installs)")
    return kept_wheel(cache)


def test_its_tag_is_one_that_holds(made: tuple[Path, str]) -> None:
    """The glibc that the tag promises is no older than the newest symbol that the library takes from it."""
    wheel, said = made
    tag = re.fullmatch(r"qwen3_fp8_ascend-[\d.]+-py3-none-manylinux_2_(\d+)_(\w+)\.whl", wheel.name)
    assert tag, wheel.name
    assert tag[2] == build_wheel.compiler_architecture()
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/WHEEL"))
        assert f"Tag: py3-none-manylinux_2_{tag[1]}_{tag[2]}" in archive.read(metadata).decode()
        library = archive.read("qwen3_fp8_ascend/_cpu.so")
    newest = max(int(minor) for minor in re.findall(rb"GLIBC_2\.(\d+)", library))
    assert newest <= int(tag[1])
    assert wheel.name in said and "the CPU kernels, without the NPU kernels (ASCEND_HOME_PATH is not set" in said


def test_only_what_this_project_compiled_is_in_it(made: tuple[Path, str]) -> None:
    with zipfile.ZipFile(made[0]) as archive:
        libraries = [name for name in archive.namelist() if ".so" in name or ".libs/" in name]
        assert libraries == ["qwen3_fp8_ascend/_cpu.so"]
        assert not any(name.startswith(("tests/", "scripts/", "csrc/")) for name in archive.namelist())


def test_it_installs_and_computes_where_there_is_no_compiler(made: tuple[Path, str], tmp_path: Path) -> None:
    python = environment(tmp_path / "venv")
    bare = {"PATH": str(python.parent), "CC": "no-such-compiler", "CXX": "no-such-compiler", "PIP_NO_INDEX": "1"}
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python), "install", "--no-deps"]
    done = subprocess.run([*pip, str(made[0])], env=bare, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    code = (
        "import torch, qwen3_fp8_ascend\n"
        "from qwen3_fp8_ascend import ops\n"
        "from qwen3_fp8_ascend.format import Activation\n"
        "from qwen3_fp8_ascend.backends import select_backend\n"
        f"assert qwen3_fp8_ascend.__file__.startswith({str(tmp_path)!r}), qwen3_fp8_ascend.__file__\n"
        "assert select_backend(None, 'cpu', Activation.W8A8).name == 'cpu'\n"
        "torch.manual_seed(0)\n"
        "weight, scale = torch.randn(300, 256).to(torch.float8_e4m3fn), torch.rand(3, 2)\n"
        "x = torch.randn(5, 256)\n"
        "for activation in ('w8a8', 'w8a16'):\n"
        "    y, expected = (ops.block_linear(x, ops.pack_weight(weight, scale, backend=b), activation=activation)\n"
        "                   for b in ('cpu', 'reference'))\n"
        "    assert (y - expected).norm() <= 1e-6 * expected.norm(), activation\n"
    )
    done = subprocess.run([python, "-c", code], env=bare, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


NEEDS = b"\0libtorch_cpu.so\0"


@pytest.mark.parametrize(
    ("name", "files", "content", "said"),
    [
        ("manylinux_2_34_x86_64", {"q/_cpu.so", "q.libs/libc10-1a.so"}, NEEDS, "not this project's: libc10-1a.so"),
        ("manylinux_2_34_x86_64", {"q/reference.py"}, NEEDS, "holds no CPU kernels"),
        ("manylinux_2_34_x86_64", {"q/_cpu.so"}, b"\0libc.so.6\0", "does not name libtorch_cpu.so"),
        ("linux_x86_64", {"q/_cpu.so"}, NEEDS, "not tagged as a manylinux wheel for x86_64"),
        ("manylinux_2_34_aarch64", {"q/_cpu.so"}, NEEDS, "not tagged as a manylinux wheel for x86_64"),
    ],
)
def test_a_wheel_that_is_not_as_it_should_be_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, files: set[str], content: bytes, said: str
) -> None:
    wheel = tmp_path / f"q-1-py3-none-{name}.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for file in files:
            archive.writestr(file, content)
    with pytest.raises(SystemExit):
        build_wheel.check(wheel, "x86_64")
    assert said in capsys.readouterr().err


def test_the_architecture_is_the_compiler_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `make wheel-aarch64` names a cross compiler."""
    compiler = tmp_path / "aarch64-linux-gnu-g++"
    compiler.write_text("#!/bin/sh\necho aarch64-linux-gnu\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", f"{compiler} -O2")
    assert build_wheel.compiler_architecture() == "aarch64"
