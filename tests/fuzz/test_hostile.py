"""Hostile checkpoints against everything that reads one: refused with our error or read, and nothing else.

The short forms have a fixed seed; the long ones (`pytest --long`) together read more than 200,000 inputs. A condemned
input is kept, and the command that reads it again is printed.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.campaign import run, warm_up
from tests.fuzz.choices import Choices, DrawnChoices, random_choices
from tests.fuzz.coverage import FILES, lines_of, lines_reached
from tests.fuzz.judge import Judge, Sandbox
from tests.fuzz.large_attacks import HEAVY
from tests.fuzz.readers import READERS, Reader, one_rank
from tests.support.checkpoint_folders import one_thread  # noqa: F401
from tests.support.preloaded_python import TORCH, preloaded_python

ROOT = Path(__file__).parent.parent.parent
SEED = 20261125
SHORT = {
    "header": 1500,
    "config": 1500,
    "inspect": 1000,
    "render": 150,
    "quantize": 300,
    "dequantize": 300,
    "load": 300,
}
LONG = {
    "header": 70_000,
    "config": 60_000,
    "inspect": 45_000,
    "render": 5_000,
    "quantize": 12_000,
    "dequantize": 12_000,
    "load": 6_000,
}
PART = 6000
"""Inputs for one process, so that each part takes a minute or so."""

GUIDED_SHORT = {"header": 1000, "inspect": 500}
GUIDED_LONG = {"header": 20_000, "config": 15_000, "inspect": 10_000, "quantize": 2_000, "dequantize": 2_000}
LEAST_LINES = 0.8
HEAVY_SHORT = (1 << 16, 1 << 20)
HEAVY_LONG = (1 << 16, 1 << 18, 1 << 20, 1 << 22, 1 << 23)


@pytest.fixture
def artefacts() -> Iterator[Path]:
    """Where condemned inputs stay after the test, unlike in pytest's own folders."""
    folder = Path(tempfile.mkdtemp(prefix="condemned-"))
    yield folder
    if not any(file.suffix == ".bin" and file.name != "current.bin" for file in folder.iterdir()):
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def rank() -> Iterator[None]:
    """vLLM's parallel state, for the reader that loads."""
    with one_rank() if find_spec("vllm") else nullcontext():
        yield


def reader_named(name: str, request: pytest.FixtureRequest) -> Reader:
    if name == "load":
        pytest.importorskip("vllm", reason="vLLM is not installed")
        request.getfixturevalue("rank")
    return READERS[name]


@pytest.mark.parametrize("name", READERS)
def test_hypothesis(name: str, request: pytest.FixtureRequest) -> None:
    """Every decision of the generator is drawn, so a failure shrinks to the few damages that matter."""
    reader = reader_named(name, request)
    warm_up(reader)
    with Judge(reader.read, reads_data=reader.reads_data) as judge:

        @settings(max_examples=40, derandomize=True, suppress_health_check=list(HealthCheck), database=None)
        @given(st.data())
        def read(data: st.DataObject) -> None:
            choices = DrawnChoices(lambda count: data.draw(st.integers(0, count - 1)))
            folder = reader.make(choices)
            verdict = judge.judge(folder)
            assert verdict.violation is None, f"{verdict.violation}: {folder.damages}; choices {choices.data.hex()}"

        read()


@pytest.mark.parametrize("name", SHORT)
@pytest.mark.usefixtures("one_thread")
def test_in_bulk(name: str, request: pytest.FixtureRequest, artefacts: Path) -> None:
    reader = reader_named(name, request)
    figures = run(reader, (random_choices(SEED, number) for number in range(SHORT[name])), artefacts)
    print(figures)
    assert not figures.violations, figures.artefacts
    assert figures.read > SHORT[name] / 20, "hardly anything is sound enough to reach the deep checks"
    assert figures.refused > SHORT[name] / 4
    assert len(figures.refusals) > 8


@pytest.mark.usefixtures("one_thread")
def test_most_lines_are_reached() -> None:
    """The inputs are no formality: they go through nearly everything that reads a checkpoint."""
    reached: dict[str, set[int]] = {}
    lines = {path.name: lines_of(path) for path in FILES}
    for name, count in (("header", 300), ("config", 300), ("inspect", 600), ("render", 50), ("quantize", 150)):
        with Sandbox() as sandbox:

            def read(data: bytes, reader: Reader = READERS[name], sandbox: Sandbox = sandbox) -> None:
                try:
                    reader.read(sandbox.fill(reader.make(Choices(data))))
                finally:
                    sandbox.clear()

            for path, found in lines_reached(read, (random_choices(SEED, number) for number in range(count))).items():
                reached.setdefault(path.name, set()).update(found)
    for name in lines:
        print(f"{name}: {len(reached[name])} of {len(lines[name])} lines")
    for names in (
        ("weight_file.py",),
        ("folder.py",),
        ("strict_json.py",),
        ("inspect.py", "plan.py", "rules.py", "experts.py"),
        ("containers.py",),
        ("ignore.py", "patterns.py"),
        ("quantize.py",),
    ):
        missed = {name: sorted(lines[name] - reached[name]) for name in names}
        assert sum(map(len, missed.values())) < (1 - LEAST_LINES) * sum(len(lines[name]) for name in names), missed


Python = Callable[..., str]


@pytest.fixture(scope="module")
def python() -> Iterator[Python]:
    """Run a module in a process of its own, one thread; its output, whatever its status."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with preloaded_python(TORCH, environment) as executable:

        def run(*arguments: str, limit: float = 540) -> str:
            line = [executable, "-m", *arguments]
            done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=limit)
            return done.stdout + done.stderr

        yield run


def heavy(python: Python, sizes: tuple[int, ...], limit: float) -> None:
    text = python("tests.fuzz.heavy", "--sizes", *map(str, sizes), limit=limit)
    last = text.splitlines()[-1]
    print(last)
    assert f"{len(HEAVY) * len(sizes) * 6} inputs, 0 violations" in last, text[-3000:]


def test_large_attacks(python: Python) -> None:
    """Each in a process whose address space is bounded to four times the input and the allowance."""
    heavy(python, HEAVY_SHORT, 400)


@pytest.mark.long
def test_large_attacks_in_all_sizes(python: Python) -> None:
    heavy(python, HEAVY_LONG, 850)


@pytest.fixture
def atheris() -> None:
    pytest.importorskip("atheris", reason="atheris has no wheel for this Python and platform (Linux x86-64 only)")


def guided(
    python: Python, name: str, runs: int, artefacts: Path, folder: Path, *, seed: int = 1, limit: float = 540
) -> str:
    figures = folder / f"{name}.json"
    options = [f"--runs={runs}", f"--seed={seed}", f"--artefacts={artefacts}", f"--figures={figures}"]
    text = python("tests.fuzz.coverage_guided", name, *options, f"--corpus={folder / f'corpus-{name}'}", limit=limit)
    assert figures.exists(), text[-3000:]
    coverage = [line for line in text.splitlines() if line.startswith("#") and " cov: " in line][-1]
    print(f"{next(line for line in text.splitlines() if line.startswith(f'{name}: ') and ' inputs in ' in line)}")
    print(f"  {coverage}")
    return figures.read_text()


@pytest.mark.parametrize("name", GUIDED_SHORT)
@pytest.mark.usefixtures("atheris")
def test_coverage_guided(python: Python, name: str, artefacts: Path, tmp_path: Path) -> None:
    figures = json.loads(guided(python, name, GUIDED_SHORT[name], artefacts, tmp_path))
    assert not figures["violations"], figures["artefacts"]
    assert figures["inputs"] >= GUIDED_SHORT[name]


@pytest.mark.usefixtures("atheris")
def test_guidance_finds_what_chance_does_not(python: Python, tmp_path: Path) -> None:
    """A defect behind five conditions: once in 1,048,576 inputs by chance."""
    figures = json.loads(guided(python, "planted", 60_000, tmp_path, tmp_path, seed=2))
    assert sum(figures["violations"].values()) == 1
    assert figures["inputs"] < 60_000
    (command,) = figures["artefacts"]
    assert "KeyError" in python(*command.removeprefix("python -m ").split())


@pytest.mark.long
@pytest.mark.parametrize("name", GUIDED_LONG)
@pytest.mark.usefixtures("atheris")
def test_coverage_guided_at_length(python: Python, name: str, artefacts: Path, tmp_path: Path) -> None:
    figures = json.loads(guided(python, name, GUIDED_LONG[name], artefacts, tmp_path, limit=850))
    assert not figures["violations"], figures["artefacts"]
    assert figures["inputs"] >= GUIDED_LONG[name]


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "first", "count"),
    [(name, first, min(PART, LONG[name] - first)) for name in LONG for first in range(0, LONG[name], PART)],
)
def test_at_length(python: Python, name: str, first: int, count: int, artefacts: Path, tmp_path: Path) -> None:
    """In a process of its own, so that a crash is a finding and not the end of the tests."""
    if name == "load":
        pytest.importorskip("vllm", reason="vLLM is not installed")
    file = tmp_path / "figures.json"
    options = [
        f"--inputs={count}",
        f"--first={first}",
        f"--seed={SEED}",
        f"--artefacts={artefacts}",
        f"--figures={file}",
    ]
    text = python("tests.fuzz.campaign", name, *options, limit=890)
    if not file.exists():
        last = (artefacts / "current.bin").rename(artefacts / "last.bin")
        pytest.fail(f"the process died; its last input is {last}\n{text[-3000:]}")
    print(text)
    figures = json.loads(file.read_text())
    assert figures["inputs"] == count
    assert not figures["violations"], text


def test_the_long_forms_are_as_long_as_said() -> None:
    assert sum(LONG.values()) >= 200_000
