"""docs/upstream: the pull request applies to the release, follows its rules, and computes what ours does."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.documents import read

from .conftest import FIGURES
from .test_their_tests import SOURCE, SUPPORT, outcomes

RELEASE = "vllm_ascend-0.30.0rc2"
PULL_REQUEST = Path(__file__).parents[2] / "docs" / "upstream"
NEW_FILES = [p.relative_to(PULL_REQUEST / "files") for p in sorted((PULL_REQUEST / "files").rglob("*.py"))]
EDITS = PULL_REQUEST / "patches" / "block_fp8_exact.patch"

pytestmark = pytest.mark.skipif(SOURCE.name != RELEASE, reason=f"the pull request is made for {RELEASE}")


@pytest.fixture(scope="module")
def patched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The release's package, its unit tests and the page that the pull request edits, with the pull request applied."""
    tree = tmp_path_factory.mktemp("upstream")
    page = Path("docs/source/user_guide/feature_guide/quantization.md")
    shutil.copytree(SOURCE / "vllm_ascend", tree / "vllm_ascend", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(SOURCE / "tests" / "ut", tree / "tests" / "ut", ignore=shutil.ignore_patterns("__pycache__"))
    for file in (page, Path("pyproject.toml"), Path("tests/__init__.py")):
        if (SOURCE / file).exists():
            (tree / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(SOURCE / file, tree / file)
    subprocess.run(["git", "apply", "--unidiff-zero", str(EDITS)], cwd=tree, check=True)
    for file in NEW_FILES:
        assert not (tree / file).exists(), f"{file} exists upstream: it would be replaced"
        shutil.copy(PULL_REQUEST / "files" / file, tree / file)
    return tree


def edited_files() -> list[str]:
    names = [line.split()[1].removeprefix("b/") for line in EDITS.read_text().splitlines() if line.startswith("+++ ")]
    return [name for name in names if name.endswith(".py")]


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=["check", "format"])
def test_it_follows_their_style(patched: Path, command: list[str]) -> None:
    files = [*map(str, NEW_FILES), *edited_files()]
    done = subprocess.run(
        [sys.executable, "-m", "ruff", *command, "--no-cache", "--config", "pyproject.toml", *files],
        cwd=patched,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout


def test_the_patch_has_no_context() -> None:
    """What is theirs stays with them: only the lines that are replaced are here."""
    assert [line for line in EDITS.read_text().splitlines() if line.startswith(" ")] == []


def test_the_commit_has_their_form(patched: Path) -> None:
    """The commands of docs/upstream/README.md: Conventional Commits with a body, signed off."""
    block = next(code.text for code in read(PULL_REQUEST / "README.md").code() if "git commit" in code.text)
    name = {"GIT_AUTHOR_NAME": "A", "GIT_AUTHOR_EMAIL": "a@b", "GIT_COMMITTER_NAME": "A", "GIT_COMMITTER_EMAIL": "a@b"}
    commands = "git init -q\n" + block[block.index("git add") :] + "\ngit log -1 --format=%B\nrm -rf .git\n"
    done = subprocess.run(
        ["bash", "-e"], input=commands, cwd=patched, env=os.environ | name, capture_output=True, text=True, check=True
    )
    message = done.stdout[done.stdout.rindex("feat(") :]
    assert re.match(r"feat\(\w+\): [^\n]{20,72}\n\n- .+\n\nSigned-off-by: A <a@b>\n", message, re.DOTALL), done.stdout


def test_their_unit_tests_and_the_new_ones(patched: Path) -> None:
    before, after = outcomes(False), outcomes(False, patched)
    new = {name: outcome for name, outcome in after.items() if name not in before}
    FIGURES.append(f"the pull request: {len(before)} tests of {RELEASE} as before, {len(new)} new ones passed")
    assert {name: after.get(name) for name in before} == before
    assert len(new) >= 12 and set(new.values()) == {"passed"} and all("fp8_block_exact" in name for name in new)


def test_it_computes_what_the_specification_says(patched: Path) -> None:
    numerics = patched / "tests" / "ut" / "test_numerics.py"
    shutil.copy(Path(__file__).with_name("upstream_numerics.py"), numerics)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "vllm_ascend_unit_tests", "-p", "no:cacheprovider", numerics],
        cwd=patched,
        env=os.environ | {"PYTHONPATH": f"{SUPPORT}{os.pathsep}{os.environ['PYTHONPATH']}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "6 passed" in done.stdout, done.stdout[-3000:] + done.stderr[-2000:]
