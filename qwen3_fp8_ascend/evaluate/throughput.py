"""Requests a second and time per output token of running servers, measured by ``vllm bench serve``."""

from __future__ import annotations

import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from qwen3_fp8_ascend.errors import BlockFp8Error
from qwen3_fp8_ascend.provenance import command, provenance


@dataclass(frozen=True)
class Load:
    """What is asked of a server: `requests` prompts of random tokens, at a rate (requests/s, may be inf).

    Lengths in tokens; every answer has exactly `output_len`. Each of the `repeats` has other prompts, so that none is
    served from the prefix cache.
    """

    request_rate: float
    concurrency: int
    requests: int
    input_len: int
    output_len: int
    repeats: int

    def arguments(self, seed: int) -> list[str]:
        """The load as `vllm bench serve` takes it."""
        options = {
            "--dataset-name": "random",
            "--random-input-len": self.input_len,
            "--random-output-len": self.output_len,
            "--num-prompts": self.requests,
            "--request-rate": f"{self.request_rate:g}",
            "--max-concurrency": self.concurrency,
            "--num-warmups": self.concurrency if seed == 0 else 0,
            "--seed": seed,
        }
        return [str(word) for pair in options.items() for word in pair] + ["--ignore-eos", "--temperature", "0"]


@dataclass(frozen=True)
class Target:
    """A server that is up: what the table calls it, where it is, and which tokenizer its prompts are made with."""

    configuration: str
    url: str
    model: str
    tokenizer: str


@dataclass(frozen=True)
class Row:
    """One line of the table: medians over the repeats of what `vllm bench serve` reports (its times: medians, ms)."""

    configuration: str
    request_rate: float | str
    concurrency: int
    requests: int
    requests_per_second: float
    output_tokens_per_second: float
    ttft_ms: float
    tpot_ms: float
    input_len: int
    output_len: int
    repeats: int
    bench_command: str


MEASURED = {
    "requests_per_second": "request_throughput",
    "output_tokens_per_second": "output_throughput",
    "ttft_ms": "median_ttft_ms",
    "tpot_ms": "median_tpot_ms",
}
"""Our names, and those of `vllm bench serve`."""

Tick = Callable[[str], None]


def measure(targets: Sequence[Target], loads: Iterable[Load], tick: Tick = lambda what: None) -> list[Row]:
    """Put each load on the servers in turn, repeat by repeat, so that a machine that drifts is unfair to none of them.

    `tick` is told what is being measured. The rows are ordered by configuration.
    Raises:
        BlockFp8Error: `vllm bench serve` is missing or fails, or a request was not answered.
    """
    rows = []
    for load in loads:
        runs: dict[Target, list[dict[str, Any]]] = {target: [] for target in targets}
        for seed in range(load.repeats):
            for target in targets:
                place = f"rate {load.request_rate:g}, concurrency {load.concurrency}, {seed + 1} of {load.repeats}"
                tick(f"{target.configuration}: {place}")
                runs[target].append(_bench(target, load, seed))
        rows += [_row(target.configuration, load, found) for target, found in runs.items()]
    order = [target.configuration for target in targets]
    return sorted(rows, key=lambda row: order.index(row.configuration))


def _row(configuration: str, load: Load, runs: Sequence[dict[str, Any]]) -> Row:
    values = {ours: statistics.median(run[theirs] for run in runs) for ours, theirs in MEASURED.items()}
    return Row(
        configuration=configuration,
        # JSON has no infinity.
        request_rate="inf" if load.request_rate == float("inf") else load.request_rate,
        concurrency=load.concurrency,
        requests=load.requests,
        input_len=load.input_len,
        output_len=load.output_len,
        repeats=load.repeats,
        bench_command=shlex.join(["vllm", "bench", "serve", *load.arguments(0)]),
        **values,
    )


def _bench(target: Target, load: Load, seed: int) -> dict[str, Any]:
    """One run of `vllm bench serve`; its result as it wrote it."""
    vllm = Path(sys.executable).with_name("vllm")
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        where = ["--base-url", target.url, "--model", target.model, "--tokenizer", target.tokenizer]
        save = ["--disable-tqdm", "--save-result", "--result-filename", str(result)]
        line = [str(vllm), "bench", "serve", *where, *load.arguments(seed), *save]
        try:
            done = subprocess.run(line, capture_output=True, text=True, check=False, env=dict(os.environ))
        except FileNotFoundError as error:
            fix = "install vLLM beside this package (make venv)"
            raise BlockFp8Error("there is no vllm command", where=vllm.parent, fix=fix) from error
        if done.returncode or not result.exists():
            raise BlockFp8Error(
                "`vllm bench serve` failed",
                where=target.url,
                got=_last_words(done.stderr) or _last_words(done.stdout) or f"exit code {done.returncode}",
                fix="check that the server is up, that it serves this model, and that --tokenizer is its tokenizer",
            )
        measured: dict[str, Any] = json.loads(result.read_text())
    if measured["completed"] != load.requests:
        raise BlockFp8Error(
            "the server did not answer all requests",
            where=f"{target.configuration}: {target.url}",
            expected=f"{load.requests} answers",
            got=f"{measured['completed']}",
            fix="look into the server's log; shorten the prompts if they exceed --max-model-len",
        )
    return measured


def _last_words(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


def document(rows: Sequence[Row]) -> dict[str, Any]:
    """What is written: the rows with the machine, date, commit and command that made them."""
    facts = provenance()
    return {
        "kind": "throughput",
        "version": 1,
        "provenance": facts,
        "command": command(),
        "rows": [asdict(row) for row in rows],
    }


def render(rows: Sequence[Row], console: Console) -> None:
    """The table of the verification report; the last configuration is what the others are compared with."""
    table = Table("configuration", "rate", "concurrency", "req/s", "tokens/s", "TTFT, ms", "TPOT, ms", box=None)
    names = list(dict.fromkeys(row.configuration for row in rows))
    base = {(row.request_rate, row.concurrency): row.tpot_ms for row in rows if row.configuration == names[-1]}
    if len(names) > 1:
        table.add_column(f"x {names[-1]} (TPOT)")
    for row in rows:
        cells = [row.configuration, str(row.request_rate), str(row.concurrency), f"{row.requests_per_second:.2f}"]
        cells += [f"{row.output_tokens_per_second:.1f}", f"{row.ttft_ms:.0f}", f"{row.tpot_ms:.1f}"]
        if len(names) > 1:
            cells.append(f"{base[row.request_rate, row.concurrency] / row.tpot_ms:.2f}")
        table.add_row(*cells)
    console.print(table, soft_wrap=True)
