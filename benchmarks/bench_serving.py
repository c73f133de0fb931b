"""Time per output token in vLLM on this machine's CPU: FP8 against BF16 at equal layers, and where the time goes.

Servers with random weights of the model's shape (`--load-format dummy`) run side by side; `vllm bench serve` asks them
in turn, round after round, so that the machine's drift meets all alike. Each time is set against the time that
reading all weights once takes at the memory's speed, measured just before.

    python -m benchmarks.bench_serving                     # Qwen3-8B, a slice of 6 layers, fp8 / fp8 head / bf16
    python -m benchmarks.bench_serving --layers 36 --only "fp8 head" --profile
    python -m benchmarks.bench_serving --layers 30 --only "fp8 head" --concurrency 1 --concurrency 8 --concurrency 32
    python -m benchmarks.bench_serving --shape qwen3-30b-a3b --only "fp8 head" --only bf16 --profile
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import gzip
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import psutil
import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.peers import READ_AHEAD, best_read_ahead
from qwen3_fp8_ascend.backends import select_backend
from qwen3_fp8_ascend.format import BlockFp8Config
from qwen3_fp8_ascend.provenance import provenance
from qwen3_fp8_ascend.serving import Server, exit_on_sigterm, serve, serving_environment
from qwen3_fp8_ascend.testing.contenders import on_huge_pages
from qwen3_fp8_ascend.testing.models import QWEN3_8B, QWEN3_30B_A3B, qwen3_config, qwen3_shapes, write_byte_tokenizer
from qwen3_fp8_ascend.testing.timing import cache_bytes

RESULTS = Path(__file__).parent / "results"
ASCEND = ["--quantization", "ascend"]
FP8_HEAD = ["--additional-config", json.dumps({"qwen3_fp8_ascend": {"lm_head": "fp8"}})]
SERVERS: dict[str, tuple[list[str], int, int]] = {
    "fp8": (ASCEND, 1, 2),
    "fp8 head": ([*ASCEND, *FP8_HEAD], 1, 1),
    "bf16": ([], 2, 2),
}
"""Arguments for `vllm serve`, and bytes per weight of the decoder's linears and of the output head."""

TRACES = "*.pt.trace.json*"

SHAPES: dict[str, dict[str, Any]] = {"qwen3-8b": QWEN3_8B, "qwen3-30b-a3b": QWEN3_30B_A3B}

console = Console(width=max(120, Console().width))


def bench(
    shape: Annotated[str, typer.Option(help=f"Of {', '.join(SHAPES)}.")] = "qwen3-8b",
    layers: Annotated[int, typer.Option(help="Decoder layers; with 6, two or three servers fit in 24 GiB.")] = 6,
    only: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(SERVERS)}; repeatable.")] = None,
    rounds: Annotated[int, typer.Option(help="Rounds of all servers in turn.")] = 5,
    input_len: Annotated[int, typer.Option(help="Tokens of a prompt.")] = 32,
    output_len: Annotated[int, typer.Option(help="Tokens of an answer.")] = 32,
    concurrency: Annotated[list[int] | None, typer.Option(help="Requests at a time; repeatable; default: 1.")] = None,
    eager: Annotated[bool, typer.Option(help="No torch.compile.")] = False,
    profile: Annotated[bool, typer.Option(help="Say where the time of a decode step goes.")] = False,
) -> None:
    """Measure and print; the CSV goes to benchmarks/results/."""
    names = only or list(SERVERS)
    config = qwen3_config(**SHAPES[shape] | {"num_hidden_layers": layers})
    facts = provenance() | {"layers": str(layers), "eager": str(eager)}
    loads = concurrency or [1]
    console.print(", ".join(f"{key} {value}" for key, value in facts.items()), highlight=False)
    # Before any server is up: an idle vLLM polls, and takes a core from whoever reads beside it.
    memory = MemoryReader()
    limits = {(name, load): memory.seconds(_bytes_a_step(config, name, load)) for name in names for load in loads}
    del memory
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        servers = {}
        for name in names:
            with console.status(f"starting the {name} server"):
                servers[name] = stack.enter_context(_server(Path(folder), name, config, eager, profile))
            console.print(f"{name}: up, {_resident(servers[name]):.2f} GB resident", highlight=False)
        for number in range(-1, rounds):  # the first is the warm-up
            for name, load in itertools.product(names, loads):
                result = _ask(servers[name], Path(folder), input_len, output_len, load)
                if number >= 0:
                    row = {"server": name, "concurrency": load, "round": number, "limit_ms": limits[name, load] * 1e3}
                    found.append(row | result)
        for name in names:
            rows = [row for row in found if row["server"] == name]
            for row in rows:
                row["resident_gb"] = _resident(servers[name])
            for load in loads if profile else ():
                _print_profile(f"{name}, {load} at a time", _profile(servers[name], output_len, load))
    frame = pd.DataFrame(found)
    for key, value in facts.items():
        frame[key] = value
    path = RESULTS / f"serving-{shape}-{layers}-layers-{datetime.now():%Y%m%d-%H%M}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    frame.to_csv(path, index=False, float_format="%.6g")
    for load in loads:
        _print(frame[frame.concurrency == load], names, load)
    console.print(f"wrote {path}", highlight=False)


def _server(folder: Path, name: str, config: dict[str, Any], eager: bool, profile: bool) -> Any:
    arguments, linear_bytes, _ = SERVERS[name]
    model = folder / name.replace(" ", "-")
    model.mkdir()
    if linear_bytes == 1:
        routers = [f"model.layers.{i}.mlp.gate" for i in range(config["num_hidden_layers"]) if "num_experts" in config]
        ignored = {"modules_to_not_convert": ["lm_head", *routers]}
        config = config | {"quantization_config": BlockFp8Config().to_dict() | ignored}
    (model / "config.json").write_text(json.dumps(config))
    write_byte_tokenizer(model)
    options = ["--load-format", "dummy", "--max-model-len", "1024", *arguments]
    if eager:
        options.append("--enforce-eager")
    if profile:
        where = {"profiler": "torch", "torch_profiler_dir": str(model), "torch_profiler_with_stack": False}
        options += ["--profiler-config", json.dumps(where)]
    log = folder / f"{model.name}.log"
    return serve(model, *options, log=log, environment=serving_environment(), timeout=1800)


class MemoryReader:
    """Times a raw read with all threads of more memory than any cache holds, prefetched at the best distance."""

    def __init__(self) -> None:
        select_backend("cpu", "cpu")  # loads the operators
        self.memory = on_huge_pages(torch.ones(2 * cache_bytes(), dtype=torch.uint8))
        self.ahead = best_read_ahead(self.memory.chunk(len(READ_AHEAD)), seconds=3)

    def seconds(self, size: int) -> float:
        """What reading `size` bytes takes, by the median of several reads."""
        times = []
        for _ in range(15):
            start = time.perf_counter()
            torch.ops.qwen3_fp8_ascend.cpu_read(self.memory, self.ahead)
            times.append(time.perf_counter() - start)
        return statistics.median(times) * size / self.memory.numel()


def _bytes_a_step(config: dict[str, Any], name: str, tokens: int) -> int:
    """Bytes of the weights that a decode step of `tokens` requests reads: all matrices but the embedding.

    Of a layer of experts, those that `tokens` random choices of so many meet on average.
    """
    _, linear_bytes, head_bytes = SERVERS[name]
    total = 0.0
    for tensor, shape in qwen3_shapes(config).items():
        if len(shape) != 2 or "embed_tokens" in tensor or ("num_experts" in config and ".mlp." in tensor):
            continue
        total += shape[0] * shape[1] * (head_bytes if tensor.startswith("lm_head") else linear_bytes)
    if "num_experts" in config:
        experts, chosen, hidden = config["num_experts"], config["num_experts_per_tok"], config["hidden_size"]
        met = experts * (1 - (1 - chosen / experts) ** tokens)
        layer = 3 * met * config["moe_intermediate_size"] * hidden * linear_bytes + experts * hidden * 2  # bf16 router
        total += config["num_hidden_layers"] * layer
    return round(total)


def _ask(server: Server, folder: Path, input_len: int, output_len: int, concurrency: int) -> dict[str, float]:
    """One round of `vllm bench serve`."""
    result = folder / "result.json"
    command = [str(Path(sys.executable).with_name("vllm")), "bench", "serve", "--base-url", server.url]
    command += ["--model", server.model, "--tokenizer", str(folder / "tokenizer"), "--dataset-name", "random"]
    command += ["--random-input-len", str(input_len), "--random-output-len", str(output_len), "--ignore-eos"]
    command += ["--num-prompts", str(2 * concurrency), "--max-concurrency", str(concurrency), "--disable-tqdm"]
    command += ["--save-result", "--result-filename", str(result)]
    if not (folder / "tokenizer").exists():
        (folder / "tokenizer").mkdir()
        write_byte_tokenizer(folder / "tokenizer")
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    measured = json.loads(result.read_text())
    if measured["completed"] != 2 * concurrency:
        raise RuntimeError(f"{measured['completed']} of {2 * concurrency} requests completed; see {server.log}")
    return {
        "tpot_ms": measured["median_tpot_ms"],
        "ttft_ms": measured["median_ttft_ms"],
        "requests_per_s": measured["request_throughput"],
        "output_tokens_per_s": measured["output_throughput"],
    }


def _resident(server: Server) -> float:
    """Resident memory of the server's processes together, in GB; shared pages are counted once."""
    processes = [psutil.Process(server.process.pid), *psutil.Process(server.process.pid).children(recursive=True)]
    return sum(process.memory_full_info().pss for process in processes) / 1e9


def _profile(server: Server, tokens: int, concurrency: int) -> Counter[str]:
    """Microseconds of the worker's main thread by operator, over the decode steps of requests sent at once."""
    traces = Path(server.log).with_suffix("")
    for file in traces.glob(TRACES):
        file.unlink()
    body = {"model": server.model, "prompt": "a", "max_tokens": tokens, "ignore_eos": True}
    urllib.request.urlopen(urllib.request.Request(f"{server.url}/start_profile", method="POST")).close()
    with concurrent.futures.ThreadPoolExecutor(concurrency) as senders:
        for answer in [senders.submit(server.post, "/v1/completions", body) for _ in range(concurrency)]:
            answer.result()
    urllib.request.urlopen(urllib.request.Request(f"{server.url}/stop_profile", method="POST"), timeout=600).close()
    times: Counter[str] = Counter()
    for file in sorted(traces.glob(TRACES)):
        opener = gzip.open if file.suffix == ".gz" else open
        with opener(file, "rt") as stream:
            events = [e for e in json.load(stream)["traceEvents"] if e.get("ph") == "X" and e.get("cat") == "cpu_op"]
        times.update(_self_times(events))
    return times


def _self_times(events: list[dict[str, Any]]) -> Counter[str]:
    """Time of each operator without that of the operators it calls."""
    times: Counter[str] = Counter()
    stack: list[dict[str, Any]] = []
    for event in sorted(events, key=lambda e: (e["tid"], e["ts"], -e["dur"])):
        while stack and (stack[-1]["tid"] != event["tid"] or stack[-1]["ts"] + stack[-1]["dur"] <= event["ts"]):
            stack.pop()
        times[event["name"]] += event["dur"]
        if stack:
            times[stack[-1]["name"]] -= event["dur"]
        stack.append(event)
    return times


def _print_profile(name: str, times: Counter[str]) -> None:
    table = Table("operator", "share", title=f"{name}: self time of a decode step (torch profiler)")
    total = sum(times.values())
    for operator, microseconds in times.most_common(12):
        table.add_row(operator, f"{microseconds / total:.1%}")
    console.print(table)


def _print(frame: pd.DataFrame, names: list[str], concurrency: int) -> None:
    medians = frame.groupby("server").median(numeric_only=True)
    table = Table("server", "ms / token", "limit, ms", "of limit", "TTFT, ms", "requests/s", "GB resident", "x bf16")
    table.title = f"{concurrency} at a time"
    for name in names:
        row = medians.loc[name]
        times = frame[frame.server == name].set_index("round")
        of_limit = (times.tpot_ms / times.limit_ms).median()
        faster = "-"
        if "bf16" in names:
            bf16 = frame[frame.server == "bf16"].set_index("round")
            faster = f"{(bf16.tpot_ms / times.tpot_ms).median():.2f}"
        cells = [f"{row[c]:.1f}" for c in ("tpot_ms", "limit_ms")] + [f"{of_limit:.2f}", f"{row.ttft_ms:.0f}"]
        table.add_row(name, *cells, f"{row.requests_per_s:.2f}", f"{row.resident_gb:.2f}", faster)
    console.print(table)


if __name__ == "__main__":
    exit_on_sigterm()
    typer.run(bench)
