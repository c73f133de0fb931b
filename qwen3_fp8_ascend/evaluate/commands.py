"""``qwen3-fp8-ascend verify``, ``bench serving``, ``bench linear`` and ``report``."""

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

from qwen3_fp8_ascend.errors import BlockFp8Error
from qwen3_fp8_ascend.evaluate import throughput
from qwen3_fp8_ascend.evaluate.validate.command import validate
from qwen3_fp8_ascend.terminal import Json, check_choices, check_writable, err, out, progress, write_bytes, write_text

bench = typer.Typer(
    help="Measure: servers as the verification report does, or linears alone.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)

SOURCES = Path(__file__).parents[2]


def add_commands(main: typer.Typer) -> None:
    """Make `verify`, `validate`, `bench` and `report` commands of the command line."""
    main.command(
        epilog="Example: qwen3-fp8-ascend verify http://127.0.0.1:8000 --model qwen3-8b-fp8 --wait 600 --json"
    )(verify)
    main.command(
        epilog="Examples: qwen3-fp8-ascend validate --device npu; qwen3-fp8-ascend validate --only 'linear/cpu/w8a8'"
    )(validate)
    main.add_typer(bench, name="bench")
    main.command(epilog="Example: qwen3-fp8-ascend report docs/results npu-results --output docs")(report)


def verify(
    url: Annotated[str, typer.Argument(help="Address of a running OpenAI-compatible server.")],
    model: Annotated[str | None, typer.Option(help="The model's served name; default: the first it lists.")] = None,
    language: Annotated[
        list[str] | None, typer.Option(help="A language the model speaks (en, zh); repeatable. Default: both.")
    ] = None,
    wait: Annotated[float, typer.Option(min=0, help="Seconds to wait for the server.")] = 0,
    form: Annotated[str, typer.Option(help="Language of the report: en or zh.")] = "en",
    output: Annotated[Path | None, typer.Option(help="Also write the JSON to this file.")] = None,
    as_json: Json = False,
) -> None:
    """Ask a running server the three questions of the verification report; exit 1 if an answer fails."""
    from qwen3_fp8_ascend.evaluate import answers, servers

    check_choices("--form", [form], ("en", "zh"))
    check_choices("--language", language or [], ("en", "zh"))
    check_writable(output)
    with progress(err) as say:
        say(f"waiting for {url}")
        servers.wait_until_up(url, wait)
        server = servers.server_facts(url, model)
        given = []
        for question in answers.QUESTIONS:
            say(f"asking: {question.title}")
            given.append(answers.ask(url, server["model"], question, tuple(language or ("en", "zh"))))
    text = json.dumps(answers.document(server, given), indent=2, ensure_ascii=False)
    if output is not None:
        write_text(output, text + "\n")
    if as_json:
        print(text)
    else:
        out.print(answers.form(server["root"], given, form), markup=False, highlight=False, soft_wrap=True)
    if any(answer.verdict == "failed" for answer in given):
        raise typer.Exit(1)


@bench.command(
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
    requests: Annotated[int, typer.Option(min=1, help="Requests of each throughput.")] = 16,
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
    loads = [
        throughput.Load(rate, count, requests, input_len, output_len, repeats)
        for rate in request_rate or [float("inf")]
        for count in concurrency or [1, 8]
    ]
    check_writable(output)
    servers = _pairs("--server", server)
    plans = [_plan(name, Path(folder), serve_args or []) for name, folder in _pairs("--checkpoint", checkpoint)]
    with progress(err) as say:
        rows = throughput.measure([_running(*pair, model, tokenizer) for pair in servers], loads, say)
        for group in [plans] if side_by_side else [[plan] for plan in plans]:
            with contextlib.ExitStack() as stack:
                rows += throughput.measure([stack.enter_context(_served(*plan, say)) for plan in group], loads, say)
    text = json.dumps(throughput.document(rows), indent=2, ensure_ascii=False, allow_nan=False)
    if output is not None:
        write_text(output, text + "\n")
    if as_json:
        print(text)
    else:
        throughput.render(rows, out)


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


def _plan(name: str, folder: Path, further: list[str]) -> tuple[str, Path, list[str]]:
    """A configuration to serve, with the arguments that it needs; looked at before anything takes minutes."""
    from qwen3_fp8_ascend.checkpoints.inspect import inspect_checkpoint

    report = inspect_checkpoint(folder)
    if report.errors:
        raise BlockFp8Error(
            "the checkpoint cannot be served", where=f"{name}: {folder}", got=report.errors[0], fix="see `inspect`"
        )
    ours = ["--quantization", "ascend"] if report.config is not None else []
    return name, folder, [*ours, *further]


def _running(name: str, url: str, model: str | None, tokenizer: str | None) -> throughput.Target:
    from qwen3_fp8_ascend.evaluate.servers import served_root, server_facts, wait_until_up

    wait_until_up(url, 0)
    served = server_facts(url, model)["model"]
    return throughput.Target(name, url, served, tokenizer or served_root(url, served))


@contextlib.contextmanager
def _served(name: str, folder: Path, arguments: list[str], tick: throughput.Tick) -> Iterator[throughput.Target]:
    from qwen3_fp8_ascend.serving import exit_on_sigterm, serve

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
            yield throughput.Target(name, server.url, server.model, str(folder))


@bench.command(
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


def report(
    results: Annotated[list[Path], typer.Argument(help="Result files (JSON), or folders of them.")],
    output: Annotated[Path, typer.Option(help="The folder to write into.")] = Path("verification"),
) -> None:
    """Write the verification report in English and Chinese from result files; what has none is marked "not run".

    Beside documents that say between marks what has run on which chip (`docs/`, the READMEs), those are renewed too.
    """
    from qwen3_fp8_ascend.evaluate import compatibility
    from qwen3_fp8_ascend.evaluate.report import write_pages
    from qwen3_fp8_ascend.evaluate.results import read_results

    found = read_results(results)
    pages = {output / name: content for name, content in write_pages(found).items()}
    for path in compatibility.documents(output):
        old = path.read_text(encoding="utf-8")
        new = compatibility.renew(old, compatibility.runs(found), compatibility.language_of(path))
        pages |= {path: new} if new != old else {}
    for path, content in pages.items():
        write_bytes(path, content.encode() if isinstance(content, str) else content)
        err.print(f"wrote {path}", highlight=False)
