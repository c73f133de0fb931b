"""The command line: ``qwen3-fp8-ascend`` and ``python -m qwen3_fp8_ascend``.

`terminal` has the conventions that all commands keep.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.logging import RichHandler

from qwen3_fp8_ascend import __version__
from qwen3_fp8_ascend.bench import command as bench
from qwen3_fp8_ascend.precision import command as precision
from qwen3_fp8_ascend.report import command as report
from qwen3_fp8_ascend.terminal import Json, be_quiet, check_choices, check_writable, err, is_quiet, out, run, write_text

app = typer.Typer(
    help="Serve block-FP8 checkpoints with vLLM on Ascend NPUs and on CPUs: look, convert, check.",
    epilog="Exit codes: 0 fine, 1 a threshold missed, 2 bad input or set-up, 130 after Ctrl-C. "
    "Colour and progress only on a terminal; NO_COLOR is obeyed.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def options(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say more on stderr.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but JSON and errors.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    if quiet:
        be_quiet()
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.ERROR if quiet else logging.WARNING,
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
    from qwen3_fp8_ascend.checkpoints.inspect import inspect_checkpoint
    from qwen3_fp8_ascend.checkpoints.render import render

    report = inspect_checkpoint(checkpoint)
    if as_json:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        render(report, out)
    if report.errors:
        raise typer.Exit(2)


@app.command(epilog="Example: qwen3-fp8-ascend quantize ./Qwen3-8B ./Qwen3-8B-FP8 --ignore 'model.layers.0.*'")
def quantize(
    source: Annotated[Path, typer.Argument(help="A bf16, fp16 or fp32 checkpoint folder.")],
    destination: Annotated[Path, typer.Argument(help="The folder to make; it must not exist.")],
    ignore: Annotated[list[str] | None, typer.Option(help="Glob of modules to leave as they are; repeatable.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing destination.")] = False,
) -> None:
    """Turn a bf16 checkpoint into block FP8 (e4m3, 128x128), file by file; resumes where it was stopped."""
    from qwen3_fp8_ascend.checkpoints.quantize import quantize_checkpoint

    quantize_checkpoint(source, destination, ignore=tuple(ignore or ()), overwrite=overwrite, progress=not is_quiet())
    err.print(f"wrote {destination}", highlight=False)


@app.command(epilog="Example: qwen3-fp8-ascend dequantize ./Qwen3-8B-FP8 ./Qwen3-8B-bf16")
def dequantize(
    source: Annotated[Path, typer.Argument(help="A block-FP8 checkpoint folder.")],
    destination: Annotated[Path, typer.Argument(help="The folder to make; it must not exist.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing destination.")] = False,
) -> None:
    """Turn a block-FP8 checkpoint into bf16, file by file; resumes where it was stopped."""
    from qwen3_fp8_ascend.checkpoints.dequantize import dequantize_checkpoint

    dequantize_checkpoint(source, destination, overwrite=overwrite, progress=not is_quiet())
    err.print(f"wrote {destination}", highlight=False)


@app.command(epilog="Example: qwen3-fp8-ascend verify http://127.0.0.1:8000 --model qwen3-8b-fp8 --wait 600 --json")
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
    from qwen3_fp8_ascend import verify as verification

    check_choices("--form", [form], verification.WORDINGS)
    check_choices("--language", language or [], ("en", "zh"))
    check_writable(output)
    with err.status(f"waiting for {url}"):
        verification.wait_until_up(url, wait)
    server = verification.server_facts(url, model)
    languages = tuple(language or ("en", "zh"))
    answers = [verification.ask(url, server["model"], q, languages) for q in verification.QUESTIONS]
    text = json.dumps(verification.document(server, answers), indent=2, ensure_ascii=False)
    if output is not None:
        write_text(output, text + "\n")
    if as_json:
        print(text)
    else:
        lines = verification.report_lines(server["root"], answers, form)
        out.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)
    if any(answer.verdict == "failed" for answer in answers):
        raise typer.Exit(1)


bench.add_commands(app)
precision.add_commands(app)
report.add_commands(app)


def main() -> None:
    """Entry point."""
    sys.exit(run(app))


if __name__ == "__main__":
    main()
