"""`make test` on a machine that lacks what a part needs: the part is skipped and says why, and in CI it fails."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import ROOT

PART = "test-triton-ascend"
NO_PYTHON = "TRITON_ASCEND_PYTHONS=3.1 3.2"
"""A range in which no Python can be found."""

REASON = "has wheels for Python 3.1 to 3.2 only, and here is Python"


def run(*command: str, ci: bool = False, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("CI", "MAKEFLAGS", "MAKELEVEL")}
    kept |= {"CI": "true"} if ci else {}
    return subprocess.run(command, cwd=ROOT, env=kept | environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("ci", [False, True])
def test_a_part_that_cannot_run_is_skipped_and_fails_in_ci(tmp_path: Path, ci: bool) -> None:
    done = run("make", "--no-print-directory", f"part-{PART}", f"PARTS={tmp_path}", NO_PYTHON, ci=ci)
    assert f"skipped: {PART}: triton-ascend " in done.stdout and REASON in done.stdout, done.stdout + done.stderr
    noted = (tmp_path / f"{PART}.cost").read_text()
    assert f"{PART} (skipped: triton-ascend " in noted and REASON in noted, "the summary does not say so"
    assert (done.returncode != 0) == ci and ("CI runs every part" in done.stderr) == ci, done.stderr


def test_a_part_that_is_asked_for_and_cannot_run_is_an_error() -> None:
    done = run("make", "--no-print-directory", PART, NO_PYTHON, "TRITON_ASCEND_STAMP=no-such-environment/.ready")
    assert done.returncode != 0 and f"error: {PART}: triton-ascend " in done.stderr and REASON in done.stderr, (
        done.stderr
    )


def test_a_part_that_lacks_nothing_is_run(tmp_path: Path) -> None:
    done = run("scripts/run_test_part.sh", "help", str(tmp_path), MISSING="", MAKE="echo")
    assert done.returncode == 0 and "skipped" not in (tmp_path / "help.cost").read_text(), done.stderr


def test_a_python_is_found_by_its_version() -> None:
    here = f"3.{sys.version_info.minor}"
    found = run("scripts/find_python.sh", here, here, PYTHON=sys.executable)
    assert (found.stdout.strip(), found.returncode) == (sys.executable, 0), found.stderr
    other = run("scripts/find_python.sh", "3.1", "3.2", PYTHON=sys.executable)
    assert (other.stdout, other.stderr, other.returncode) == ("", "", 0)


@pytest.mark.parametrize("has", [(), ("apt-get", "dpkg-deb")])
def test_the_aarch64_part_says_what_it_lacks(tmp_path: Path, has: tuple[str, ...]) -> None:
    """A machine without Debian's tools, and one where a user who is not root has no cross-compiler."""
    for name in has:
        (tmp_path / name).write_text("#!/bin/sh\n")
    (tmp_path / "id").write_text("#!/bin/sh\necho 1000\n")
    for path in tmp_path.iterdir():
        path.chmod(0o755)
    done = run("/bin/bash", "scripts/create_venv_aarch64.sh", "--missing", PATH=str(tmp_path))
    assert done.returncode == 0 and done.stdout.startswith("no aarch64-linux-gnu-g++" if has else "no apt-get"), done
