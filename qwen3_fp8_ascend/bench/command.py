"""``qwen3-fp8-ascend bench serving`` and ``bench linear``."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer

from qwen3_fp8_ascend.bench import serving as measurement
from qwen3_fp8_ascend.errors import BlockFp8Error
from qwen3_fp8_ascend.terminal import Json, check_writable, err, out, write_text

app = typer.Typer(
    help="Measure: servers as the verification report does, or linears alone.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)

SOURCES = Path(__file__).parents[2]


def add_commands(main: typer.Typer) -> None:
    """Make `bench` a command of the command line."""
    main.add_typer(app, name="bench")


@app.command(
    epilog="Examples: qwen3-fp8-ascend bench serving --checkpoint FP8=./Qwen3-8B-FP8 --checkpoint BF16=./Qwen3-8B "
    "--output throughput.json; on servers that are up: qwen3-fp8-ascend bench serving "
    "--server '1xA2, FP8=http://127.0.0.1:8000' --request-rate 1 --request-rate 4 --request-rate inf --requests 200"
)
def serving(
    server: Annotated[
        list[str] | None, typer.Option(help="CONFIGURATION=URL of a server that is up; repeatable.")
    ] = None,
    checkpoint: Annotated[
        list[str] | None, typer.Option(help="CONFIGURATION=FOLDER to serve here; repeatable.")
    ] = None,
    side_by_side: Annotated[
        bool, typer.Option("--side-by-side", help="Serve all --checkpoint at once and ask them in turn.")
    ] = False,
    model: Annotated[str | None, typer.Option(help="Served name on --server; default: the first it lists.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Folder or name; default: the checkpoint served.")] = None,
    request_rate: Annotated[
        list[float] | None, typer.Option(min=0.001, help="Requests a second, or inf; repeatable. Default: inf.")
    ] = None,
    concurrency: Annotated[
        list[int] | None, typer.Option(min=1, help="Requests at a time; repeatable. Default: 1 and 8.")
    ] = None,
    requests: Annotated[int, typer.Option(min=1, help="Requests of each measurement.")] = 16,
    input_len: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 128,
    output_len: Annotated[int, typer.Option(min=2, help="Tokens of an answer.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Repeats, whose median is reported.")] = 3,
    output: Annotated[Path | None, typer.Option(help="Write the JSON to this file.")] = None,
    as_json: Json = False,
    serve_args: Annotated[
        list[str] | None, typer.Argument(help="After --: further arguments of `vllm serve` for --checkpoint.")
    ] = None,
) -> None:
    """Requests a second and time per output token through `vllm bench serve`, FP8 against BF16.

    Checkpoints are served one after another, with --quantization ascend if they are block FP8, else as they are.

    What is up at the same time is asked in turn, repeat by repeat; the last configuration is the base of the others.
    """
    if not server and not checkpoint:
        fix = "give --server CONFIGURATION=URL or --checkpoint CONFIGURATION=FOLDER"
        raise BlockFp8Error("there is nothing to measure", fix=fix)
    servers, folders = _pairs("--server", server), _pairs("--checkpoint", checkpoint)
    loads = [
        measurement.Load(rate, count, requests, input_len, output_len, repeats)
        for rate in request_rate or [float("inf")]
        for count in concurrency or [1, 8]
    ]
    check_writable(output)
    plans = [(name, *_look_at(name, Path(folder))) for name, folder in folders]  # before anything takes minutes
    rows: list[measurement.Row] = []
    with err.status("") as status:
        rows += measurement.measure([_running(*pair, model, tokenizer) for pair in servers], loads, status.update)
        for group in [plans] if side_by_side else [[plan] for plan in plans]:
            with contextlib.ExitStack() as stack:
                targets = [
                    stack.enter_context(_served(name, folder, [*arguments, *(serve_args or [])], status.update))
                    for name, folder, arguments in group
                ]
                rows += measurement.measure(targets, loads, status.update)
    text = json.dumps(measurement.document(rows), indent=2, ensure_ascii=False, allow_nan=False)
    if output is not None:
        write_text(output, text + "\n")
    if as_json:
        print(text)
    else:
        measurement.render(rows, out)


def _pairs(option: str, values: Sequence[str] | None) -> list[tuple[str, str]]:
    pairs = []
    for value in values or ():
        # A configuration's name may hold "=" no more than an address or a folder's name does before its end.
        name, _, rest = value.partition("=")
        if not name.strip() or not rest.strip():
            what = "http://127.0.0.1:8000" if option == "--server" else "./Qwen3-8B-FP8"
            raise BlockFp8Error("a name is missing", where=option, got=value, fix=f"write it as {option} 'FP8={what}'")
        pairs.append((name.strip(), rest.strip()))
    return pairs


def _look_at(name: str, folder: Path) -> tuple[Path, list[str]]:
    """A checkpoint's folder, and which of our arguments it needs."""
    from qwen3_fp8_ascend.checkpoints.inspect import inspect_checkpoint

    report = inspect_checkpoint(folder)
    if report.errors:
        raise BlockFp8Error(
            "the checkpoint cannot be served", where=f"{name}: {folder}", got=report.errors[0], fix="see `inspect`"
        )
    return folder, ["--quantization", "ascend"] if report.config is not None else []


def _running(name: str, url: str, model: str | None, tokenizer: str | None) -> measurement.Target:
    from qwen3_fp8_ascend.verify import served_root, server_facts, wait_until_up

    wait_until_up(url, 0)
    served = server_facts(url, model)["model"]
    return measurement.Target(name, url, served, tokenizer or served_root(url, served))


@contextlib.contextmanager
def _served(name: str, folder: Path, arguments: list[str], tick: measurement.Tick) -> Iterator[measurement.Target]:
    from qwen3_fp8_ascend.testing.server import exit_on_sigterm, serve

    exit_on_sigterm()
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch) / "server.log"
        with serve(
            folder,
            *arguments,
            log=log,
            timeout=1800,
            on_wait=lambda waited, line: tick(f"{name}: starting, {waited:.0f} s"),
        ) as server:
            yield measurement.Target(name, server.url, server.model, str(folder))


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
    epilog="Example: qwen3-fp8-ascend bench linear --rows 1 --threads 1",
)
def linear(context: typer.Context) -> None:
    """Linears alone against the memory's limit and every peer (from the sources; its own --help has the options)."""
    if not (SOURCES / "benchmarks" / "bench_linear.py").exists():
        raise BlockFp8Error(
            "the micro-benchmark is part of the sources, not of the installed package",
            where=SOURCES,
            fix="run it in a checkout of the project: `make bench`, or `qwen3-fp8-ascend bench linear` there",
        )
    line = [sys.executable, "-m", "benchmarks.bench_linear", *context.args]
    raise typer.Exit(subprocess.run(line, cwd=SOURCES, check=False).returncode)
