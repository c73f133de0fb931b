"""``qwen3-fp8-ascend validate``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from qwen3_fp8_ascend.errors import BlockFp8Error
from qwen3_fp8_ascend.evaluate.validate import page, run
from qwen3_fp8_ascend.terminal import Json, check_choices, check_writable, err, out, progress, write_text

DEVICES = ("auto", "npu", "cuda", "cpu")


def validate(
    device: Annotated[str, typer.Option(help="npu, cuda, cpu, or auto: the first of them that is here.")] = "auto",
    output: Annotated[
        Path | None, typer.Option(help="The result (JSON); pages for people are written beside it.")
    ] = None,
    only: Annotated[str, typer.Option(help="A step or a case, or a pattern with *; writes no file by itself.")] = "*",
    seed: Annotated[int, typer.Option(min=0, help="Of all random numbers.")] = 0,
    minutes: Annotated[float, typer.Option(min=0.1, help="Steps that would begin later are left out.")] = 10,
    jobs: Annotated[
        int, typer.Option(min=1, help="Steps that run beside each other where nothing is timed; each takes memory.")
    ] = 1,
    pages: Annotated[bool, typer.Option(help="Write pages for people beside the result.")] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier result.")] = False,
    as_json: Json = False,
) -> None:
    """Judge a device against the specification, time it, and write one file to send back; exit 1 if anything fails.

    Offline, in about five minutes. Each step is a process of its own. Interrupted, it goes on where it was.
    """
    check_choices("--device", [device], DEVICES)
    if output is None and only == "*":
        output = Path("validation.json")
    check_writable(output)
    journal = None
    if output is not None:
        journal = output.with_name(f"{output.name}.journal")
        if output.exists() and not overwrite:
            fix = "name another --output, or give --overwrite"
            raise BlockFp8Error("there is a result already", where=output, fix=fix)
    request = run.Request(device, seed, only, minutes, jobs)
    try:
        with progress(err, "validating") as say:
            result, notes = run.validate(request, journal if only == "*" else None, say)
    except KeyboardInterrupt:
        if journal is not None and journal.exists():
            err.print(f"the same command goes on where this ended ({journal})", highlight=False, soft_wrap=True)
        raise
    text = json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    if output is not None:
        _write(output, text, result, page.SUFFIXES if pages else {})
    if notes is not None:
        notes.remove()
    if as_json:
        print(text, end="")
    else:
        _render(result)
    if result["verdict"] != "passed":
        raise typer.Exit(1)


def _write(output: Path, text: str, result: dict[str, Any], pages: Mapping[str, str]) -> None:
    write_text(output, text)
    for language, suffix in pages.items():
        name = output.with_suffix(suffix)
        write_text(name, page.render([result], language))
        err.print(f"wrote {name}", highlight=False, soft_wrap=True)
    err.print(f"wrote {output}", highlight=False, soft_wrap=True)


def _render(result: dict[str, Any]) -> None:
    table = Table("step", "outcome", "cases", "failed", "skipped", "s", box=None)
    for step in result["steps"]:
        outcome = step["outcome"] if not step["failed"] else "failed"
        skipped = sum(step["skipped"].values())
        table.add_row(step["step"], outcome, *map(str, (step["cases"], step["failed"], skipped, step["seconds"])))
    out.print(table)
    say = err.print if result["verdict"] == "passed" else out.print
    for step in result["steps"]:
        if step["outcome"] != "finished":
            where = f", in {step['at']}" if step["at"] else ""
            say(f"{step['step']}: {step['outcome']}: {step['detail']}{where}", markup=False, soft_wrap=True)
            if step["repeat"]:
                say(f"  again: {step['repeat']}", markup=False, soft_wrap=True)
        for failure in step["failures"]:
            say(f"{failure['case']}: {'; '.join(failure['faults'])}", markup=False, soft_wrap=True)
            say(f"  again: {failure['repeat']}", markup=False, soft_wrap=True)
    out.print(f"{result['device']['name']}: {result['verdict']}", markup=False, highlight=False)
