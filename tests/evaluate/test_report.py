import json
import re
from pathlib import Path
from typing import Any

import pytest

from qwen3_fp8_ascend.cli import app
from qwen3_fp8_ascend.evaluate import report
from qwen3_fp8_ascend.evaluate.precision.compare import Row
from qwen3_fp8_ascend.evaluate.precision.tables import METRICS
from qwen3_fp8_ascend.evaluate.report import NAMES, write_pages
from qwen3_fp8_ascend.evaluate.results import CHIPS, MADE_BY, read_results
from qwen3_fp8_ascend.evaluate.templates import environment
from qwen3_fp8_ascend.terminal import run

RESULTS = Path(__file__).parents[2] / "docs" / "results"
FACTS = {"cpu": "Some CPU", "cores": "2", "date": "2026-01-02", "commit": "abc1234", "command": "some command"}
NPU = FACTS | {"device": "Ascend910B3", "date": "2026-02-03", "dtype": "float32", "backend": "ascendc"}


def verification(**changes: Any) -> dict[str, Any]:
    answers = [
        {"prompt": "The future | of", "text": "is\nbright", "verdict": verdict}
        for verdict in ("passed", "failed", "not applicable")
    ]
    server = {"root": "a-model", "vllm": "0.30.0"}
    return {"kind": "verify", "version": 1, "provenance": FACTS, "server": server, "answers": answers} | changes


def comparison(name: str, made: dict[str, Any], within: bool | None) -> dict[str, Any]:
    return Row(
        name=name,
        against="reference w8a8",
        tokens=10,
        cosine=0.99,
        min_cosine=0.9,
        p99_rel=0.1,
        max_rel=0.2,
        layers=None,
        layer_rel=[0.1, 0.2],
        kl_mean=0.01,
        kl_p99=0.05,
        kl_from="all logits",
        top1_agreement=0.999,
        logprob_distance=0.07,
        greedy_match=0.5,
        greedy_prompts=0.25,
        perplexity=12.0,
        perplexity_reference=13.0,
        within=within,
        made=made,
    ).to_dict()


def precision(*rows: dict[str, Any]) -> dict[str, Any]:
    return {
        "kind": "precision",
        "version": 1,
        "provenance": FACTS,
        "command": "compare them",
        "bound": {"cosine": 0.99999, "top1": 0.999},
        "reference": {"name": "reference w8a8", "model": "Qwen3-8B-FP8", "provenance": FACTS | {"device": "cpu"}},
        "rows": list(rows),
        "floor": comparison("reference-fp64 w8a8", FACTS, False),
    }


def write(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


def tables(text: str) -> list[tuple[int, int]]:
    """Rows and columns of each table of a page."""
    blocks = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    return [(block.count("\n"), len(re.findall(r"(?<!\\)\|", block.splitlines()[1]))) for block in blocks]


def line(page: str, begins: str) -> list[str]:
    """The cells of the one row that begins so."""
    (found,) = [row for row in page.splitlines() if row.startswith(f"| {begins}")]
    return [cell.strip() for cell in found.strip("|").split("|")]


def english(folder: Path) -> str:
    page = write_pages(read_results([folder]))[NAMES["en"]]
    assert isinstance(page, str)
    return page


def test_both_languages_say_the_same() -> None:
    """From the project's own results: equal tables, equal numbers, equal pictures, and no word left untranslated."""
    files = write_pages(read_results([RESULTS]))
    ours, theirs = (files[name] for name in NAMES.values())
    assert isinstance(ours, str) and isinstance(theirs, str)
    assert tables(ours) == tables(theirs) and len(tables(ours)) >= 5
    for what in (r"```\w+\n.*?```", r"\d+\.\d+", r"\]\(([^)]*svg)\)", r"[✅❌➖]"):
        assert re.findall(what, ours, re.DOTALL) == re.findall(what, theirs, re.DOTALL), what
    for word in ("not run", "cores", "claim"):
        assert word in ours and word not in theirs
    pictures = set(re.findall(r"\]\(([^)]*svg)\)", ours))
    assert pictures == {name for name in files if name.endswith(".svg")} and pictures
    assert all(len(files[name]) > 3000 for name in pictures)


def test_every_metric_has_a_name_in_chinese() -> None:
    assert set(environment().get_template("metrics.zh.j2").module.metrics) == set(METRICS)


def test_the_committed_report_is_that_of_the_committed_results() -> None:
    for name, content in write_pages(read_results([RESULTS])).items():
        if isinstance(content, str):
            assert (RESULTS.parent / name).read_text() == content, f"{name}: run `make report`"
        else:
            assert (RESULTS.parent / name).is_file()


def test_what_has_no_result_is_not_run(tmp_path: Path) -> None:
    write(tmp_path / "verify.json", verification())
    page = english(tmp_path)
    assert line(page, "functional verification") == ["functional verification", "✅ 2026-01-02", "not run", "not run"]
    for claim, kind in (("precision", "precision"), ("every linear", "linears"), ("throughput", "throughput")):
        assert line(page, claim)[1:] == ["not run"] * len(CHIPS)
        assert kind == "throughput" or f"not run: `{MADE_BY[kind]}`" in page
    assert line(page, "1×A2, FP8")[1:] == ["not run", "not run"]
    assert "scripts/eval_precision.sh --fp8 ./Qwen3-8B-FP8" in page and "--device npu" in page
    assert "The future | of\n\nis\nbright" in page
    assert re.findall(r"^Test \d: (.)", page, re.MULTILINE) == ["✅", "❌", "➖"]
    assert "Some CPU, 2 cores; 2026-01-02, commit abc1234" in page
    assert "Qwen3-8B-FP8 itself is not among the models" in page


def test_what_was_measured_on_an_npu_fills_its_column(tmp_path: Path) -> None:
    rows = (comparison("ascendc w8a8", NPU, False), comparison("server", FACTS | {"device": "not said"}, None))
    write(tmp_path / "precision.json", precision(*rows))
    write(tmp_path / "verify.json", verification(provenance=FACTS | {"npu": "Ascend910B3"}))
    page = english(tmp_path)
    assert line(page, "precision of whole models")[1:] == ["not run", "not run", "✅ 2026-02-03"]
    assert line(page, "functional verification")[1:] == ["not run", "not run", "✅ 2026-01-02"]
    assert line(page, "Qwen3-8B-FP8 | ascendc w8a8 vs")[2:] == [
        *("0.9900000", "0.9900000", "2.0e-01", "2.0e-01", "50.00%", "50.00%", "99.90%", "99.90%", "❌", "❌")
    ]
    assert line(page, " | server vs")[-2] == "—"
    assert "NPU vs CPU" not in page and line(page, " | GPU vs CPU reference")[2:] == ["not run"] * 10
    assert "- ascendc w8a8: Ascend910B3, Some CPU, 2 cores; 2026-02-03" in page
    assert "not among the models" not in page


def test_what_a_server_on_a_gpu_answered_fills_the_gpu_s_column(tmp_path: Path) -> None:
    write(tmp_path / "verify.json", verification(provenance=FACTS | {"gpu": "NVIDIA H100"}))
    page = english(tmp_path)
    assert line(page, "functional verification")[1:] == ["not run", "✅ 2026-01-02", "not run"]
    assert "NVIDIA H100, Some CPU, 2 cores; 2026-01-02" in page


@pytest.mark.parametrize(
    ("result", "processor"),
    [
        ({}, "NVIDIA H100, Some CPU"),  # a server's
        ({"device": "cpu"}, "Some CPU"),
        ({"device": "Ascend910B3"}, "Ascend910B3, Some CPU"),
    ],
)
def test_what_was_computed_on_the_cpu_beside_a_gpu_is_the_cpu_s(result: dict[str, Any], processor: str) -> None:
    made = report._made_by({"provenance": FACTS | {"gpu": "NVIDIA H100"}, **result})["made"]
    assert made["processor"] == processor


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "cannot be read"),
        (json.dumps([1]), "no result"),
        (json.dumps({"kind": "poem", "version": 1}), "no result"),
        (json.dumps(verification(version=2)), "another version"),
        (json.dumps({k: v for k, v in verification().items() if k != "answers"}), "incomplete"),
        (json.dumps(verification(provenance={})), "provenance.date"),
        (json.dumps(verification(provenance=[1])), "provenance.date"),
        (json.dumps(verification(answers=[{"prompt": "x"}])), "incomplete"),
        (json.dumps(precision({"name": "x"})), "incomplete"),
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
