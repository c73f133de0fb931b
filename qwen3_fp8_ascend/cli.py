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

from qwen3_fp8_ascend import __version__, launch
from qwen3_fp8_ascend.checkpoints.folder import read_checkpoint
from qwen3_fp8_ascend.evaluate import commands as evaluate
from qwen3_fp8_ascend.evaluate.precision import command as precision
from qwen3_fp8_ascend.terminal import Json, be_quiet, err, is_quiet, out, run

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
def doctor(
    without_npu: Annotated[
        bool, typer.Option("--without-npu", help="An absent NPU is no problem: for the build of an image.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Say what this machine has, which backends can run, and what stands in the way (exit 2)."""
    from qwen3_fp8_ascend import doctor as examination

    report = examination.examine(without_npu)
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
    scale_fmt: Annotated[str, typer.Option(help="fp32, or ue8m0 for scales that are powers of two.")] = "fp32",
    container: Annotated[
        str, typer.Option("--format", help="Whose config.json and names of scales: fp8 or compressed-tensors.")
    ] = "fp8",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing destination.")] = False,
) -> None:
    """Turn a bf16 checkpoint into block FP8 (e4m3, 128x128), file by file; resumes where it was stopped."""
    read_checkpoint(source)  # a wrong folder is told before torch is imported, which takes seconds
    from qwen3_fp8_ascend.checkpoints.quantize import quantize_checkpoint

    quantize_checkpoint(
        source,
        destination,
        scale_fmt=scale_fmt,
        ignore=tuple(ignore or ()),
        container=container,
        overwrite=overwrite,
        progress=not is_quiet(),
    )
    err.print(f"wrote {destination}", highlight=False, soft_wrap=True)


@app.command(epilog="Example: qwen3-fp8-ascend dequantize ./Qwen3-8B-FP8 ./Qwen3-8B-bf16")
def dequantize(
    source: Annotated[Path, typer.Argument(help="A block-FP8 checkpoint folder.")],
    destination: Annotated[Path, typer.Argument(help="The folder to make; it must not exist.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing destination.")] = False,
) -> None:
    """Turn a block-FP8 checkpoint into bf16, file by file; resumes where it was stopped."""
    read_checkpoint(source)  # a wrong folder is told before torch is imported, which takes seconds
    from qwen3_fp8_ascend.checkpoints.dequantize import dequantize_checkpoint

    dequantize_checkpoint(source, destination, overwrite=overwrite, progress=not is_quiet())
    err.print(f"wrote {destination}", highlight=False, soft_wrap=True)


app.command(
    epilog="Examples: qwen3-fp8-ascend serve --model ./Qwen3-8B-FP8 --device cpu -- --enforce-eager; "
    "qwen3-fp8-ascend serve --device npu --tensor-parallel-size 2 --dry-run"
)(launch.serve)
evaluate.add_commands(app)
precision.add_commands(app)


def main() -> None:
    """Entry point."""
    sys.exit(run(app))


if __name__ == "__main__":
    main()
