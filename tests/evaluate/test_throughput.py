"""`bench`: what it writes, and what it says when it cannot measure. `vllm bench serve` is the real one."""

import io
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from qwen3_fp8_ascend.errors import BlockFp8Error
from qwen3_fp8_ascend.evaluate.throughput import Load, Row, Target, measure, render
from qwen3_fp8_ascend.serving import free_port
from qwen3_fp8_ascend.testing.models import write_block_fp8_qwen3, write_byte_tokenizer
from tests.support.answering_server import answering

ROOT = Path(__file__).parents[2]
KEYS = {"configuration", "request_rate", "concurrency", "requests", "requests_per_second", "output_tokens_per_second"}
KEYS |= {"ttft_ms", "tpot_ms"}


def bench(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "qwen3_fp8_ascend", "bench", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, cwd=cwd)


def test_a_server_is_measured(tmp_path: Path) -> None:
    """Four words, 50 ms before each: what `vllm bench serve` finds is what the server did."""
    pytest.importorskip("vllm", reason="vLLM is not installed")
    (tmp_path / "tokenizer").mkdir()
    write_byte_tokenizer(tmp_path / "tokenizer")
    output = tmp_path / "throughput.json"
    with answering({"": "one two three four"}, pause=0.05) as url:
        done = bench(
            *("serving", "--server", f"1xA2, FP8={url}", "--requests", "4", "--concurrency", "2", "--repeats", "1"),
            *("--tokenizer", tmp_path / "tokenizer", "--output", output),
        )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    found = json.loads(output.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert (found["kind"], found["version"]) == ("throughput", 1)
    assert found["provenance"]["cpu"] and "bench serving" in found["command"]
    (row,) = found["rows"]
    assert row.keys() >= KEYS
    assert (row["configuration"], row["request_rate"], row["concurrency"], row["requests"]) == (
        "1xA2, FP8",
        "inf",
        2,
        4,
    )
    assert row["bench_command"].startswith("vllm bench serve --dataset-name random")
    assert str(tmp_path) not in output.read_text()
    assert 45 < row["tpot_ms"] < 200 and row["ttft_ms"] > 45
    assert 1 < row["requests_per_second"] < 10
    assert row["output_tokens_per_second"] == pytest.approx(4 * row["requests_per_second"], rel=0.01)
    assert "1xA2, FP8" in done.stdout and "TPOT" in done.stdout


def test_configurations_are_compared_with_the_last() -> None:
    rows = [
        Row(name, "inf", count, 16, 1.0, 64.0, 100.0, tpot * count, 128, 64, 3, "vllm bench serve")
        for name, tpot in (("FP8", 20.0), ("BF16", 30.0))
        for count in (1, 8)
    ]
    console = Console(record=True, width=150, file=io.StringIO())
    render(rows, console)
    lines = console.export_text().splitlines()
    assert "x BF16" in lines[0]
    assert [line.split()[-1] for line in lines[1:]] == ["1.50", "1.50", "1.00", "1.00"]


def test_servers_that_are_up_are_asked_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A `vllm` that writes down whom it asked and answers with a time of its own each time."""
    (tmp_path / "vllm").write_text(
        f"#!{sys.executable}\n"
        "import json, pathlib, sys\n"
        "option = lambda name: sys.argv[sys.argv.index(name) + 1]\n"
        f"log = pathlib.Path({str(tmp_path / 'log')!r}); seen = log.read_text() if log.exists() else ''\n"
        "log.write_text(seen + option('--base-url') + option('--seed') + option('--max-concurrency') + ' ')\n"
        "result = {'completed': 4, 'request_throughput': 1, 'output_throughput': 8, 'median_ttft_ms': 3}\n"
        "result |= {'median_tpot_ms': len(seen.split())}\n"
        "pathlib.Path(option('--result-filename')).write_text(json.dumps(result))\n"
    )
    (tmp_path / "vllm").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    targets = [Target("FP8", "f", "model", "tokenizer"), Target("BF16", "b", "model", "tokenizer")]
    rows = measure(targets, [Load(math.inf, count, 4, 8, 8, 3) for count in (1, 8)])
    assert (tmp_path / "log").read_text() == "f01 b01 f11 b11 f21 b21 f08 b08 f18 b18 f28 b28 "
    found = [(row.configuration, row.concurrency, row.tpot_ms) for row in rows]
    assert found == [("FP8", 1, 2), ("FP8", 8, 8), ("BF16", 1, 3), ("BF16", 8, 9)]


def test_each_repeat_has_prompts_of_its_own() -> None:
    load = Load(math.inf, 8, 16, 128, 64, 3)
    first, second = load.arguments(0), load.arguments(1)
    assert first[first.index("--seed") + 1] != second[second.index("--seed") + 1]
    assert first[first.index("--request-rate") + 1] == "inf"
    assert first[first.index("--num-warmups") + 1] == "8" and second[second.index("--num-warmups") + 1] == "0"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "there is nothing to measure"),
        (["--server", "http://127.0.0.1:8000"], "a name is missing"),
        (["--checkpoint", "FP8="], "a name is missing"),
        (["--checkpoint", "FP8=no-such-folder"], "no-such-folder"),
        (["--server", "FP8=http://127.0.0.1:{port}"], "no server is up there"),
        (["--server", "FP8=http://127.0.0.1:1", "--request-rate", "0"], "request-rate"),
    ],
)
def test_mistakes_end_in_one_line(arguments: list[str], said: str) -> None:
    done = bench("serving", *(word.format(port=free_port()) for word in arguments))
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr and "what to do" in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_a_damaged_checkpoint_is_told_before_anything_starts(tmp_path: Path) -> None:
    model = write_block_fp8_qwen3(tmp_path / "model")
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    done = bench("serving", "--checkpoint", f"FP8={model}")
    assert done.returncode == 2 and "cannot be served" in done.stderr and "model.safetensors" in done.stderr


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo Traceback >&2; echo 'OSError: no tokenizer there' >&2; exit 1", "no tokenizer there"),
        (
            """echo '{"completed": 3}' >"$(echo "$@" | sed 's/.*--result-filename //')" """,
            "did not answer all requests",
        ),
        (None, "there is no vllm command"),
    ],
)
def test_a_benchmark_that_fails_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str | None, said: str
) -> None:
    if script is not None:
        (tmp_path / "vllm").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "vllm").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(BlockFp8Error, match=said) as caught:
        measure([Target("FP8", "http://127.0.0.1:1", "model", "tokenizer")], [Load(math.inf, 1, 4, 8, 8, 1)])
    assert "what to do" in str(caught.value)


def test_linear_is_the_benchmark_of_the_sources() -> None:
    done = bench("linear", "--help")
    assert done.returncode == 0 and "Measure and print" in done.stdout, done.stderr


def test_linear_without_the_sources_says_where_it_is(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "qwen3_fp8_ascend", tmp_path / "qwen3_fp8_ascend")
    command = [sys.executable, "-m", "qwen3_fp8_ascend", "bench", "linear"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
    assert done.returncode == 2 and "part of the sources" in done.stderr and "make bench" in done.stderr
