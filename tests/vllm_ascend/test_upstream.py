"""docs/upstream: the pull requests apply to the release, follow its rules, and compute what ours does.

The second is applied to the first, as it would be. Of vLLM-Ascend's own quantization tests all are run with both, and
in the long form those that the first touches with the first alone.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support import vllm_ascend_forks
from tests.support.documents import read

from .conftest import FIGURES
from .test_their_tests import SOURCE, outcomes, outcomes_with_and_without

RELEASE = "vllm_ascend-0.30.0rc2"
ROOT = Path(__file__).parents[2]
UPSTREAM = ROOT / "docs" / "upstream"
PULL_REQUESTS = ("ascend_950", "a2_a3")
GUIDE = Path("docs/source/user_guide")
PAGES = (GUIDE / "feature_guide/quantization.md", GUIDE / "configuration/additional_config.md")
TOUCHED = {
    "ascend_950": ("configs/test_fp8_config.py", "methods/w8a8/test_fp8_block_native.py"),
    "a2_a3": ("configs/test_fp8_config.py", "methods/w8a8/test_fp8_block_fused.py"),
}
"""Test modules of a pull request, below tests/ut/quantization."""

pytestmark = pytest.mark.skipif(SOURCE.name != RELEASE, reason=f"the pull requests are made for {RELEASE}")


def new_files(name: str) -> list[Path]:
    folder = UPSTREAM / name / "files"
    return [file.relative_to(folder) for file in sorted(folder.rglob("*.py"))]


def edits(name: str) -> str:
    return (UPSTREAM / name / "edits.patch").read_text()


def edited_files(name: str) -> list[str]:
    lines = [line for line in edits(name).splitlines() if line.startswith("+++ ")]
    return [line.split()[1].removeprefix("b/") for line in lines]


def apply(name: str, tree: Path) -> None:
    patch = UPSTREAM / name / "edits.patch"
    subprocess.run(["git", "apply", "--unidiff-zero", str(patch)], cwd=tree, check=True)
    for file in new_files(name):
        assert not (tree / file).exists(), f"{file} exists upstream: it would be replaced"
        shutil.copy(UPSTREAM / name / "files" / file, tree / file)


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What the pull requests touch of the release, with the first applied, and with both."""
    first, both = (tmp_path_factory.mktemp("upstream") / name for name in PULL_REQUESTS)
    for part in ("vllm_ascend", "tests/ut", "csrc/kernels", "tools"):
        shutil.copytree(SOURCE / part, first / part, ignore=shutil.ignore_patterns("__pycache__"))
    for page in (*PAGES, Path("pyproject.toml"), Path("tests/__init__.py")):
        if (SOURCE / page).exists():
            (first / page).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(SOURCE / page, first / page)
    apply("ascend_950", first)
    shutil.copytree(first, both)
    apply("a2_a3", both)
    copy = [sys.executable, str(UPSTREAM / "a2_a3" / "copy_kernels.py"), str(both)]
    subprocess.run(copy, check=True)
    return {"ascend_950": first, "a2_a3": both}


def run(command: list[str], tree: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=tree, env=os.environ | environment, capture_output=True, text=True)


def run_pytest(tree: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    options = ("-q", "-p", "no:cacheprovider")
    return vllm_ascend_forks.run("pytest", *options, *arguments, folder=tree, environment=os.environ)


@pytest.mark.parametrize("name", PULL_REQUESTS)
def test_it_follows_their_style(trees: dict[str, Path], name: str) -> None:
    """ruff by their rules; a file of theirs that this ruff would format otherwise anyway is not looked at for that."""
    tree = trees[name]
    edited = [file for file in edited_files(name) if file.endswith(".py")]
    ruff = [sys.executable, "-m", "ruff"]
    done = run([*ruff, "check", "--no-cache", "--config", "pyproject.toml", *map(str, new_files(name)), *edited], tree)
    assert done.returncode == 0, done.stdout
    clean = ["format", "--check", "--no-cache", "--config", "pyproject.toml"]
    before = run([*ruff, *clean, *edited], SOURCE).stdout
    files = [*map(str, new_files(name)), *(file for file in edited if f"Would reformat: {file}" not in before)]
    assert len(files) > len(new_files(name))
    done = run([*ruff, *clean, *files], tree)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", PULL_REQUESTS)
def test_it_passes_their_other_checks(trees: dict[str, Path], name: str) -> None:
    """Of their pre-commit hooks those that are Python programs of theirs."""
    files = [*map(str, new_files(name)), *(file for file in edited_files(name) if file.endswith(".py"))]
    done = run([sys.executable, "tools/check_forbidden_imports.py", *files], trees[name])
    assert done.returncode == 0, done.stdout
    if name == "a2_a3":
        done = run([sys.executable, "tools/check_symbolic_meta.py", "csrc/block_fp8_meta.cpp"], trees[name])
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", PULL_REQUESTS)
def test_there_is_no_new_global_state_and_no_environment_variable(trees: dict[str, Path], name: str) -> None:
    """Module level holds definitions, imports, and constants in capitals of numbers alone."""
    assert "vllm_ascend/envs.py" not in edited_files(name)
    for file in new_files(name):
        text = (trees[name] / file).read_text()
        assert "environ" not in text and "getenv" not in text and not re.search(r"^\s*global ", text, re.M)
        if file.parts[0] == "vllm_ascend":
            for variable, value in re.findall(r"^(\w+)\s*=\s*(.+)$", text, re.M):
                assert variable.isupper() and re.fullmatch(r"[\d.e <*/-]+", value), (variable, value)


@pytest.mark.parametrize("name", PULL_REQUESTS)
def test_the_patch_has_no_context(name: str) -> None:
    """What is theirs stays with them: only the lines that are replaced are here."""
    assert [line for line in edits(name).splitlines() if line.startswith(" ")] == []


@pytest.mark.parametrize("name", PULL_REQUESTS)
def test_the_commit_has_their_form(trees: dict[str, Path], name: str) -> None:
    """The commands of the page: Conventional Commits with a body, signed off."""
    block = next(code.text for code in read(UPSTREAM / name / "README.md").code() if "git commit" in code.text)
    who = {"GIT_AUTHOR_NAME": "A", "GIT_AUTHOR_EMAIL": "a@b", "GIT_COMMITTER_NAME": "A", "GIT_COMMITTER_EMAIL": "a@b"}
    commands = "git init -q\n" + block[block.index("git add") :] + "\ngit log -1 --format=%B\nrm -rf .git\n"
    done = run(["bash", "-ec", commands], trees[name], **who)
    assert done.returncode == 0, done.stderr
    message = done.stdout[done.stdout.rindex("feat(") :]
    assert re.match(r"feat\(\w+\): [^\n]{20,72}\n\n- .+\n\nSigned-off-by: A <a@b>\n", message, re.DOTALL), done.stdout


@pytest.mark.long
def test_the_first_stands_alone(trees: dict[str, Path]) -> None:
    touched = [f"tests/ut/quantization/{file}" for file in TOUCHED["ascend_950"]]
    done = run_pytest(trees["ascend_950"], *touched)
    passed = re.search(r"^(\d+) passed", done.stdout, re.M)
    assert done.returncode == 0 and passed, done.stdout[-3000:]
    assert int(passed[1]) >= 29


def test_their_unit_tests_and_the_new_ones(trees: dict[str, Path]) -> None:
    before, after = outcomes_with_and_without()[0], outcomes(trees["a2_a3"])
    new = {name: outcome for name, outcome in after.items() if name not in before}
    FIGURES.append(f"the pull requests: {len(before)} tests of {RELEASE} as before, {len(new)} new ones passed")
    assert {name: after.get(name) for name in before} == before
    assert set(new.values()) == {"passed"}
    for part, least in (("fp8_block_native", 13), ("fp8_block_fused", 12), ("keep_block_fp8", 2)):
        assert sum(part in name for name in new) >= least, part


def test_they_compute_what_the_specification_says(trees: dict[str, Path]) -> None:
    """With the real torch-npu, so outside their tests, whose conftest replaces it."""
    file = trees["a2_a3"] / "test_numerics.py"
    shutil.copy(Path(__file__).with_name("upstream_numerics.py"), file)
    done = run_pytest(trees["a2_a3"], str(file))
    assert done.returncode == 0 and "29 passed" in done.stdout, done.stdout[-5000:]


def test_the_copied_kernels_compile(trees: dict[str, Path]) -> None:
    """Against the emulator and the stand-ins for acl and torch_npu, which have what CANN's headers say.

    Kept by content: nothing is compiled twice. The launches `<<<...>>>`, which are not C++, are taken out.
    """
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++: the copied kernels cannot be compiled")
    csrc = trees["a2_a3"] / "csrc"
    ours = sorted({*csrc.rglob("block_fp8*.cpp"), *(csrc / "kernels" / "block_fp8").rglob("*.*")})
    for file in ours:
        assert not re.search(r"qwen3|QWEN3|\bascendc|[gG]emv|docs/", file.read_text()), f"{file} speaks of this project"
    stand_ins = (ROOT / "tests/support/ascendc_emulator", ROOT / "tests/support/ascend_host")
    digest = hashlib.sha256(torch.__version__.encode())
    for file in (*ours, *(header for folder in stand_ins for header in sorted(folder.rglob("*.h")))):
        digest.update(file.read_bytes())
    stamp = ROOT / ".cache" / "upstream" / digest.hexdigest()
    if stamp.exists():
        return
    checked = [compiler, "-Wall", "-Wextra", "-Werror", "-fsyntax-only"]
    launches = sorted((csrc / "kernels").glob("block_fp8_*.cpp"))
    for launch in launches:
        text, found = re.subn(r"<<<\w+, \w+, \w+>>>", "", launch.read_text())
        assert found == 1
        launch.write_text(text)
    # As one file: most of the time goes into the emulator's headers.
    all_launches = csrc / "kernels" / "all.cpp"
    all_launches.write_text("".join(f'#include "{launch.name}"\n' for launch in launches))
    done = run([*checked, "-Wno-unused-parameter", "-std=c++17", f"-I{stand_ins[0]}", str(all_launches)], csrc)
    assert done.returncode == 0, done.stderr[-3000:]
    include = Path(torch.__file__).parent / "include"
    torch_flags = ["-isystem", str(include), "-isystem", str(include / "torch/csrc/api/include")]
    both = csrc / "both.cpp"
    both.write_text('#include "block_fp8_meta.cpp"\n#include "block_fp8_ops.cpp"\n')
    flags = [
        "-std=c++20",
        "-DVLLM_ENABLE_ATB_AND_DIRECT_KERNELS",
        f"-I{csrc}",
        f"-I{stand_ins[1]}",
        *torch_flags,
    ]
    done = run([*checked, *flags, str(both)], csrc)
    assert done.returncode == 0, done.stderr[-3000:]
    stamp.parent.mkdir(parents=True, exist_ok=True)
    stamp.touch()
