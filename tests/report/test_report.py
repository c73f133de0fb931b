import json
import re
from pathlib import Path
from typing import Any

import pytest

from qwen3_fp8_ascend.cli import app
from qwen3_fp8_ascend.report.pages import NAMES, write_pages
from qwen3_fp8_ascend.report.results import MADE_BY, read_results
from qwen3_fp8_ascend.terminal import run

RESULTS = Path(__file__).parents[2] / "docs" / "results"
FACTS = {"cpu": "Some CPU", "cores": "2", "date": "2026-01-02", "commit": "abc1234", "command": "some command"}


def verification(**changes: Any) -> dict[str, Any]:
    answers = [
        {"prompt": "The future | of", "text": "is\nbright", "verdict": verdict}
        for verdict in ("passed", "failed", "not applicable")
    ]
    server = {"root": "a-model", "vllm": "0.30.0"}
    return {"kind": "verify", "version": 1, "provenance": FACTS, "server": server, "answers": answers} | changes


def write(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


def tables(text: str) -> list[tuple[int, int]]:
    """Rows and columns of each table of a page."""
    blocks = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    return [(block.count("\n"), len(re.findall(r"(?<!\\)\|", block.splitlines()[1]))) for block in blocks]


def test_both_languages_say_the_same() -> None:
    """From the project's own results: equal tables, equal numbers, equal pictures, and no word left untranslated."""
    files = write_pages(read_results([RESULTS]))
    english, chinese = (files[name] for name in NAMES.values())
    assert isinstance(english, str) and isinstance(chinese, str)
    assert tables(english) == tables(chinese) and len(tables(english)) >= 5
    for number in (r"`[^`]+`", r"\d+\.\d+", r"\]\(([^)]*svg)\)"):
        assert re.findall(number, english) == re.findall(number, chinese)
    for word in ("not run", "passed", "noise floor", "cores"):
        assert word in english and word not in chinese
    pictures = set(re.findall(r"\]\(([^)]*svg)\)", english))
    assert pictures == {name for name in files if name.endswith(".svg")} and pictures
    assert all(len(files[name]) > 3000 for name in pictures)


def test_the_committed_report_is_that_of_the_committed_results() -> None:
    for name, content in write_pages(read_results([RESULTS])).items():
        if isinstance(content, str):
            assert (RESULTS.parent / name).read_text() == content, f"{name}: run `make report`"
        else:
            assert (RESULTS.parent / name).is_file()


def test_what_has_no_result_is_not_run(tmp_path: Path) -> None:
    write(tmp_path / "verify.json", verification())
    pages = write_pages(read_results([tmp_path]))
    english = pages["verification_report.md"]
    assert isinstance(english, str)
    for kind in ("precision", "linears", "throughput"):
        assert english.count(f"not run: `{MADE_BY[kind]}`") == 3  # both columns of the table, and its section
    assert english.count(f"not run: `{MADE_BY['verify']}`") == 1
    assert "| The future \\| of | is bright | ✅ passed |" in english
    assert "❌ failed" in english and "➖ not applicable" in english
    assert "Some CPU, 2 cores, 2026-01-02, commit abc1234" in english


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "cannot be read"),
        (json.dumps([1]), "no result"),
        (json.dumps({"kind": "poem", "version": 1}), "no result"),
        (json.dumps(verification(version=2)), "another version"),
        (json.dumps({k: v for k, v in verification().items() if k != "answers"}), "incomplete"),
        (json.dumps(verification(provenance={})), "provenance.date"),
    ],
)
def test_files_that_are_no_results(tmp_path: Path, content: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.json").write_text(content)
    assert run(app, ["report", str(tmp_path), "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert said in error and "what to do:" in error
    assert not (tmp_path / "out").exists()


def test_the_command_writes_the_files(tmp_path: Path) -> None:
    file = write(tmp_path / "verify.json", verification())
    assert run(app, ["report", str(file), "--output", str(tmp_path / "out")]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(NAMES.values())
