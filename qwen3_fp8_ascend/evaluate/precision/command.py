"""``qwen3-fp8-ascend eval-precision``: run, compare, linears."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from qwen3_fp8_ascend.checkpoints.folder import read_checkpoint
from qwen3_fp8_ascend.errors import BlockFp8Error
from qwen3_fp8_ascend.evaluate import templates
from qwen3_fp8_ascend.evaluate.precision.prompts import all_prompts
from qwen3_fp8_ascend.format import Activation
from qwen3_fp8_ascend.provenance import provenance
from qwen3_fp8_ascend.terminal import Json, check_choices, check_writable, err, out, progress, write_text

if TYPE_CHECKING:
    import torch

app = typer.Typer(
    help="Compare what two backends, machines or precisions make of the same prompts.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)

DTYPES = ("float32", "bfloat16", "float16")

Model = Annotated[Path, typer.Argument(help="A checkpoint folder: block FP8, or bf16.")]
Backend = Annotated[
    str, typer.Option(help="Backend of block-FP8 linears; also reference-fp64, or dequantized (expanded to --dtype).")
]
ActivationFlag = Annotated[str, typer.Option("--activation", help="w8a8, or w8a16 to leave activations as they are.")]
Dtype = Annotated[str, typer.Option(help="Dtype of everything but the FP8 weights.")]
Device = Annotated[str | None, typer.Option(help="cpu (the default), cuda or npu; of a server: what it computes on.")]
Prompts = Annotated[Path | None, typer.Option(help="A JSON list of texts instead of the package's own prompts.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Use the first so many prompts only.")]


def add_commands(main: typer.Typer) -> None:
    """Make `eval-precision` a command of the command line."""
    main.add_typer(app, name="eval-precision")


@app.command(
    epilog="Examples: qwen3-fp8-ascend eval-precision run ./Qwen3-8B-FP8 cpu.run --backend cpu; "
    "qwen3-fp8-ascend eval-precision run http://127.0.0.1:8000 npu.run --name npu"
)
def run(
    source: Annotated[str, typer.Argument(help="A checkpoint folder, or http://HOST:PORT of a running vLLM.")],
    output: Annotated[Path, typer.Argument(help="The file to write.")],
    name: Annotated[str | None, typer.Option(help="What tables call this run.")] = None,
    model: Annotated[str | None, typer.Option(help="Served name, of a server; default: the first it lists.")] = None,
    backend: Backend = "cpu",
    activation: ActivationFlag = "w8a8",
    dtype: Dtype = "float32",
    device: Device = None,
    prompts: Prompts = None,
    limit: Limit = None,
    greedy_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each greedy continuation.")] = 16,
    logits: Annotated[bool, typer.Option(help="Keep all logits: 4 bytes a token and vocabulary entry.")] = True,
    layers: Annotated[bool, typer.Option(help="Keep the outputs of all layers.")] = True,
) -> None:
    """Run the prompts once and save what was computed, to be compared here or on another machine.

    A folder is loaded with transformers, without a server: all logits and layers' outputs.

    A server gives the most probable tokens; --backend, --activation and --dtype are then its own.
    """
    texts = _texts(prompts, limit)
    arithmetic = Activation.parse(activation, "--activation")
    check_writable(output)
    is_server = source.startswith(("http://", "https://"))
    if not is_server:
        _check_model(Path(source), dtype)
    from qwen3_fp8_ascend.evaluate.precision.runs import save_run

    with progress(err) as say:
        if is_server:
            from qwen3_fp8_ascend.evaluate.precision.served import run_server

            made = run_server(
                source,
                model,
                texts,
                name or "server",
                greedy_tokens=greedy_tokens,
                device=device,
                progress=say,
            )
        else:
            from qwen3_fp8_ascend.evaluate.precision.direct import describe, run_model

            device = device or "cpu"
            loaded, tokenizer = _load(Path(source), backend, arithmetic, dtype, device)
            made = run_model(
                loaded,
                tokenizer,
                texts,
                name or _default_name(loaded, backend, arithmetic, dtype),
                Path(source).name,
                greedy_tokens=greedy_tokens,
                keep_logits=logits,
                keep_layers=layers,
                facts=provenance() | describe(loaded, backend, arithmetic, dtype, device),
                progress=say,
            )
    save_run(made, output)
    err.print(f"wrote {output}: {made.name}, {len(texts)} prompts, {made.tokens} tokens", highlight=False)


@app.command(
    epilog="Example: qwen3-fp8-ascend eval-precision compare reference.run cpu.run npu.run --floor reference-fp64.run "
    "--html precision.html"
)
def compare(
    reference: Annotated[Path, typer.Argument(help="The run that the others are compared with.")],
    runs: Annotated[list[Path], typer.Argument(help="Runs of the same prompts and tokenizer.")],
    floor: Annotated[
        Path | None, typer.Option(help="The reference with sums in another order or precision: the noise floor.")
    ] = None,
    min_cosine: Annotated[float, typer.Option(max=1, help="Exit 1 if the cosine of a run's logits is less.")] = -1,
    min_top1: Annotated[float, typer.Option(min=0, max=1, help="Exit 1 if a run's top-1 agreement is less.")] = 0,
    output: Annotated[Path | None, typer.Option(help="Also write the JSON to this file.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the table to this file.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page with the table and plots to this file.")] = None,
    as_json: Json = False,
) -> None:
    """Compare saved runs, wherever they were made."""
    from qwen3_fp8_ascend.evaluate.precision import compare as comparison
    from qwen3_fp8_ascend.evaluate.precision import tables
    from qwen3_fp8_ascend.evaluate.precision.runs import load_run

    for path in (output, markdown, html):
        check_writable(path)
    base = load_run(reference)
    rows = [comparison.compare(load_run(path), base) for path in runs]
    document = comparison.document(base, rows, None if floor is None else comparison.compare(load_run(floor), base))
    text = json.dumps(document, indent=2, ensure_ascii=False)
    if output is not None:
        write_text(output, text + "\n")
    if markdown is not None:
        write_text(markdown, tables.markdown(document))
    if html is not None:
        write_text(html, tables.page(document))
    if as_json:
        print(text)
    else:
        out.print(tables.title(document), markup=False, highlight=False, soft_wrap=True)
        _print_table(*tables.cells(document))
    if any(row.top1_agreement < min_top1 or (row.cosine is not None and row.cosine < min_cosine) for row in rows):
        raise typer.Exit(1)


@app.command(epilog="Example: qwen3-fp8-ascend eval-precision linears ./Qwen3-8B-FP8 --backend cpu --limit 2")
def linears(
    model: Model,
    backend: Backend = "cpu",
    activation: ActivationFlag = "w8a8",
    dtype: Dtype = "float32",
    device: Annotated[str, typer.Option(help="What the backend computes on: cpu, cuda or npu.")] = "cpu",
    prompts: Prompts = None,
    limit: Limit = None,
    output: Annotated[Path | None, typer.Option(help="Also write the JSON to this file.")] = None,
    as_json: Json = False,
) -> None:
    """Judge every linear and every decoder layer by itself.

    Each gets the same input in the backend and in the fp64 specification.

    The model around it is computed on the CPU, by the specification.
    """
    texts = _texts(prompts, limit)
    arithmetic = Activation.parse(activation, "--activation")
    check_writable(output)
    _check_model(model, dtype)
    from qwen3_fp8_ascend.evaluate.precision import linears as judge

    with progress(err) as say:
        _check_device(device)
        loaded, tokenizer = _load(model, "reference", arithmetic, dtype, "cpu")
        judged = judge.judge_linears(loaded, tokenizer, texts, backend, device, say)
    document = judge.document(model, arithmetic, dtype, device, judged)
    if output is not None:
        write_text(output, json.dumps(document, indent=2) + "\n")
    if as_json:
        print(json.dumps(document, indent=2))
        return
    _print_table(*judge.cells(document))


def _texts(prompts: Path | None, limit: int | None) -> list[str]:
    texts = all_prompts()
    if prompts is not None:
        try:
            texts = json.loads(prompts.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise BlockFp8Error(
                "the prompts cannot be read", where=prompts, got=error, fix="give a JSON file"
            ) from error
        if not isinstance(texts, list) or not texts or not all(isinstance(t, str) and t for t in texts):
            fix = "write a JSON list of texts"
            raise BlockFp8Error("the prompts are no list of texts", where=prompts, expected='["text", ...]', fix=fix)
    return texts[:limit]


def _check_model(folder: Path, dtype: str) -> None:
    """What can be said before torch and transformers are imported, which takes seconds."""
    check_choices("--dtype", [dtype], DTYPES)
    read_checkpoint(folder)


def _load(folder: Path, backend: str, activation: Activation, dtype: str, device: str) -> tuple[torch.nn.Module, Any]:
    try:
        import torch
        from transformers import AutoTokenizer
    except ImportError as error:
        fix = "pip install transformers, or make the run through a server"
        raise BlockFp8Error("a direct run needs transformers", got=error, fix=fix) from error
    from qwen3_fp8_ascend.backends import available_backends
    from qwen3_fp8_ascend.evaluate.precision.direct import DEQUANTIZED, WIDE, load_model

    check_choices("--backend", [backend], [*(status.name for status in available_backends()), WIDE, DEQUANTIZED])
    _check_device(device)
    loaded = load_model(folder, backend, activation, getattr(torch, dtype), device)
    try:
        return loaded, AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        fix = "copy the tokenizer's files into the folder"
        raise BlockFp8Error("the tokenizer cannot be loaded", where=folder, got=error, fix=fix) from error


def _check_device(device: str) -> None:
    """Refuse a device that is not there; torch knows an NPU from here on."""
    from qwen3_fp8_ascend.testing.devices import KINDS, open_device

    check_choices("--device", [device], KINDS)
    open_device(device)


def _default_name(model: torch.nn.Module, backend: str, activation: Activation, dtype: str) -> str:
    from qwen3_fp8_ascend.evaluate.precision.direct import DEQUANTIZED, has_our_linears

    if not has_our_linears(model):
        return f"{DEQUANTIZED} {dtype}" if backend == DEQUANTIZED else dtype
    return f"{backend} {activation}"


def _print_table(header: list[str], rows: list[list[str]]) -> None:
    """A table on a terminal, Markdown in a pipe or where a terminal is too narrow for it."""
    table = Table(*header)
    for row in rows:
        table.add_row(*row)
    if out.is_terminal and table.__rich_measure__(out, out.options.update(width=1000)).minimum <= out.width:
        out.print(table)
    else:
        out.print(templates.table(header, rows), markup=False, highlight=False, soft_wrap=True)
