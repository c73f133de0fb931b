"""The command line: ``qwen3-fp8-ascend`` and ``python -m qwen3_fp8_ascend``.

Exit codes: 0 fine, 1 a threshold missed, 2 bad input or set-up.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler

from qwen3_fp8_ascend import __version__
from qwen3_fp8_ascend.errors import BlockFp8Error

app = typer.Typer(
    help="Serve block-FP8 checkpoints with vLLM on Ascend NPUs and on CPUs: look, convert, check.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
out = Console()
err = Console(stderr=True)

Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs instead of a table.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def options(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say more on stderr.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.WARNING,
        format="%(message)s",
        handlers=[RichHandler(console=err, show_time=False, show_path=False)],
    )


@app.command(epilog="Example: qwen3-fp8-ascend doctor --json | jq .backends")
def doctor(as_json: Json = False) -> None:
    """Say what this machine has, which backends can run, and what stands in the way (exit 2)."""
    from qwen3_fp8_ascend import doctor as examination

    report = examination.examine()
    if as_json:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        examination.render(report, out)
    if report.problems:
        raise typer.Exit(2)


@app.command(epilog="Example: qwen3-fp8-ascend inspect ./Qwen3-8B-FP8")
def inspect(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint folder.")],
    as_json: Json = False,
) -> None:
    """Say what a checkpoint is, from its headers alone, and name every anomaly (exit 2 if one is an error)."""
    from qwen3_fp8_ascend.checkpoints import inspect as inspection

    report = inspection.inspect_checkpoint(checkpoint)
    if as_json:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        inspection.render(report, out)
    if report.errors:
        raise typer.Exit(2)


@app.command(epilog="Example: qwen3-fp8-ascend quantize ./Qwen3-8B ./Qwen3-8B-FP8 --ignore 'model.layers.0.*'")
def quantize(
    source: Annotated[Path, typer.Argument(help="A bf16, fp16 or fp32 checkpoint folder.")],
    destination: Annotated[Path, typer.Argument(help="The folder to make; it must not exist.")],
    ignore: Annotated[list[str] | None, typer.Option(help="Glob of modules to leave as they are; repeatable.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing destination.")] = False,
) -> None:
    """Turn a bf16 checkpoint into block FP8 (e4m3, 128x128), shard by shard; resumes where it was stopped."""
    from qwen3_fp8_ascend.checkpoints.quantize import quantize_checkpoint

    quantize_checkpoint(source, destination, ignore=tuple(ignore or ()), overwrite=overwrite)
    err.print(f"wrote {destination}", highlight=False)


@app.command(epilog="Example: qwen3-fp8-ascend dequantize ./Qwen3-8B-FP8 ./Qwen3-8B-bf16")
def dequantize(
    source: Annotated[Path, typer.Argument(help="A block-FP8 checkpoint folder.")],
    destination: Annotated[Path, typer.Argument(help="The folder to make; it must not exist.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing destination.")] = False,
) -> None:
    """Turn a block-FP8 checkpoint into bf16, shard by shard; resumes where it was stopped."""
    from qwen3_fp8_ascend.checkpoints.dequantize import dequantize_checkpoint

    dequantize_checkpoint(source, destination, overwrite=overwrite)
    err.print(f"wrote {destination}", highlight=False)


@app.command(epilog="Example: qwen3-fp8-ascend verify http://127.0.0.1:8000 --model qwen3-8b-fp8 --json")
def verify(
    url: Annotated[str, typer.Argument(help="Address of a running OpenAI-compatible server.")],
    model: Annotated[str | None, typer.Option(help="The model's served name; default: the first it lists.")] = None,
    language: Annotated[
        list[str] | None, typer.Option(help="A language the model speaks (en, zh); repeatable. Default: both.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Ask a running server the three questions of the verification report; exit 1 if an answer fails."""
    from qwen3_fp8_ascend import verify as verification

    name = model or verification.served_model(url)
    answers = [verification.ask(url, name, q, tuple(language or ("en", "zh"))) for q in verification.QUESTIONS]
    if as_json:
        print(json.dumps([answer.to_dict() for answer in answers], indent=2, ensure_ascii=False))
    else:
        for number, answer in enumerate(answers, 1):
            verification.render(number, answer, out)
    if any(answer.verdict == "failed" for answer in answers):
        raise typer.Exit(1)


def main() -> None:
    """Entry point: the user's mistakes end in one clear message and exit code 2, not in a traceback."""
    try:
        app()
    except BlockFp8Error as error:
        err.print("[bold red]error[/]", end=" ")
        err.print(str(error), markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
