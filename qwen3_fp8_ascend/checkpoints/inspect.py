"""Say what a checkpoint is, from its headers alone, and name everything that would keep it from being served.

Imports neither torch nor vllm: vLLM's processes call `check_checkpoint` before any weight is read.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen3_fp8_ascend.checkpoints.anomaly import Anomaly, CheckpointError, collect, fault
from qwen3_fp8_ascend.checkpoints.folder import (
    INDEX,
    SINGLE,
    WEIGHTS_SUFFIX,
    Checkpoint,
    find_quantization,
    survey_checkpoint,
)
from qwen3_fp8_ascend.checkpoints.header import TensorEntry, is_plain_text
from qwen3_fp8_ascend.checkpoints.layers import (
    COMMON_LINEARS,
    is_decoder_linear,
    is_ignored,
    layer_index,
    module_of,
)
from qwen3_fp8_ascend.errors import BlockFp8Error, describe, printable
from qwen3_fp8_ascend.format import (
    SCALE_DTYPES,
    SCALE_SUFFIX,
    WEIGHT_SUFFIX,
    BlockFp8Config,
    scale_shape,
)

if TYPE_CHECKING:
    from rich.console import Console

E4M3 = "F8_E4M3"
OTHER_FP8 = ("F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
FLOATS = ("BF16", "F16", "F32", "F64")
FOREIGN_SCALES = (".input_scale", ".activation_scale", ".input_scale_inv", ".weight_scale")
"""Tensors of static or per-tensor schemes; block FP8 with dynamic activations has none of them."""

QUANTIZE_AGAIN = "quantize the bf16 model again: `qwen3-fp8-ascend quantize`"
DOWNLOAD_AGAIN = "the checkpoint is damaged or incomplete; download it again, or " + QUANTIZE_AGAIN
MAX_SHOWN = 50


@dataclass(frozen=True)
class CheckpointReport:
    """What a checkpoint is; `config` is None unless it is block FP8 by a quantization_config that can be used."""

    folder: str
    architecture: str
    model_type: str
    config: BlockFp8Config | None
    files: int
    tensors: int
    block_fp8_layers: int
    tensors_by_kind: Mapping[str, int]
    bytes_by_kind: Mapping[str, int]
    unused_files: tuple[str, ...]
    anomalies: tuple[Anomaly, ...]

    @property
    def errors(self) -> tuple[Anomaly, ...]:
        """The anomalies that make the checkpoint unusable."""
        return tuple(anomaly for anomaly in self.anomalies if anomaly.severity == "error")

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON data."""
        return {
            "folder": self.folder,
            "architecture": self.architecture,
            "model_type": self.model_type,
            "quantization_config": self.config.to_dict() if self.config else None,
            "files": self.files,
            "tensors": self.tensors,
            "block_fp8_layers": self.block_fp8_layers,
            "tensors_by_kind": dict(self.tensors_by_kind),
            "bytes_by_kind": dict(self.bytes_by_kind),
            "unused_files": list(self.unused_files),
            "anomalies": [anomaly.to_dict() for anomaly in self.anomalies],
        }


def inspect_checkpoint(folder: str | os.PathLike[str]) -> CheckpointReport:
    """Describe a checkpoint and list every anomaly, reading headers only.

    Raises:
        BlockFp8Error: there is no checkpoint to describe: no folder, no readable config.json, no safetensors files.
    """
    checkpoint = survey_checkpoint(Path(folder))
    findings: list[Iterable[Anomaly]] = [checkpoint.anomalies]
    config: BlockFp8Config | None = None
    quantization = find_quantization(checkpoint.config)
    if quantization is not None:
        try:
            config = BlockFp8Config.from_dict(*quantization)
        except BlockFp8Error as error:
            findings.append([_as_anomaly(error)])
    if config is not None:
        findings += [_find_anomalies(checkpoint, config), _check_unused(checkpoint)]
    elif quantization is None:
        findings.append(_find_undeclared(checkpoint))
    anomalies = collect(chain.from_iterable(findings))
    kinds = {name: _kind(tensor, checkpoint.tensors) for name, tensor in checkpoint.tensors.items()}
    counts: Counter[str] = Counter(kinds.values())
    sizes: Counter[str] = Counter()
    for name, tensor in checkpoint.tensors.items():
        sizes[kinds[name]] += tensor.nbytes
    return CheckpointReport(
        folder=str(folder),
        architecture=_architecture(checkpoint.config),
        model_type=_printable(checkpoint.config.get("model_type", "unknown model type")),
        config=config,
        files=len(checkpoint.files),
        tensors=len(checkpoint.tensors),
        block_fp8_layers=counts["block FP8 weights"],
        tensors_by_kind=dict(sorted(counts.items())),
        bytes_by_kind=dict(sorted(sizes.items())),
        unused_files=checkpoint.unused,
        anomalies=tuple(anomalies),
    )


def check_checkpoint(folder: str | os.PathLike[str]) -> CheckpointReport:
    """Refuse a checkpoint that cannot be served as block FP8; return its report otherwise.

    Raises:
        BlockFp8Error: the first error, saying how many more there are.
    """
    report = inspect_checkpoint(folder)
    if report.errors:
        raise CheckpointError(report.errors[0], len(report.errors) - 1)
    if report.config is None:
        raise fault(
            "this is not a block-FP8 checkpoint: its config.json has no quantization_config",
            file=report.folder,
            fix="quantize it first: `qwen3-fp8-ascend quantize`",
        )
    return report


def render(report: CheckpointReport, console: Console) -> None:
    """Print a report for people: what it is, what it weighs, what is wrong."""
    from rich.table import Table
    from rich.text import Text

    if report.config is not None:
        what = f"block FP8, e4m3, blocks of {report.config.block}, {report.block_fp8_layers} linear layers"
    elif report.errors:
        what = "not a usable block-FP8 checkpoint"
    else:
        what = "not quantized"
    console.print(Text(report.folder, style="bold"))
    console.print(Text(f"{report.architecture} ({report.model_type}): {what}"))
    table = Table(show_edge=False, pad_edge=False)
    for column, justify in (("kind", "left"), ("tensors", "right"), ("bytes", "right"), ("share", "right")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    total = sum(report.bytes_by_kind.values())
    for kind, size in sorted(report.bytes_by_kind.items(), key=lambda item: -item[1]):
        share = f"{100 * size / total:.1f} %" if total else ""
        table.add_row(Text(kind), f"{report.tensors_by_kind[kind]}", format_bytes(size), share)
    table.add_section()
    table.add_row(f"total in {report.files} files", f"{report.tensors}", format_bytes(total), "")
    console.print(table)
    if report.config is not None and report.config.ignored:
        shown = ", ".join(map(_printable, report.config.ignored[:4])) + (" …" if len(report.config.ignored) > 4 else "")
        console.print(Text(f"left unquantized by config: {len(report.config.ignored)} modules ({shown})"))
    if report.unused_files:
        console.print(Text(f"not named in the index, so not used: {', '.join(map(_printable, report.unused_files))}"))
    _render_anomalies(report, console)


def format_bytes(size: float) -> str:
    """1536 -> '1.5 kB', in powers of 1000 as disks count."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} TB"


def _render_anomalies(report: CheckpointReport, console: Console) -> None:
    from rich.text import Text

    if not report.anomalies:
        console.print(Text("no anomalies", style="green"))
        return
    warnings = len(report.anomalies) - len(report.errors)
    console.print(Text(f"{len(report.errors)} errors, {warnings} warnings", style="bold red"))
    for anomaly in report.anomalies[:MAX_SHOWN]:
        style = "red" if anomaly.severity == "error" else "yellow"
        console.print(Text(f"{anomaly.severity}: {anomaly.what}", style=style), soft_wrap=True)
        parts = (
            ("where", anomaly.where),
            ("expected", anomaly.expected),
            ("got", anomaly.got),
            ("what to do", anomaly.fix),
        )
        for label, part in parts:
            if part is not None:
                console.print(Text(f"  {label}: {part}"), soft_wrap=True)
    if len(report.anomalies) > MAX_SHOWN:
        console.print(Text(f"… and {len(report.anomalies) - MAX_SHOWN} more; --json lists all"))


def _kind(tensor: TensorEntry, tensors: Mapping[str, TensorEntry]) -> str:
    if _is_fp8_weight(tensor) and _scale_name(tensor.name) in tensors:
        return "block FP8 weights"
    if tensor.name.endswith(SCALE_SUFFIX):
        return "block scales"
    return f"other {tensor.dtype}"


def _is_fp8_weight(tensor: TensorEntry) -> bool:
    return tensor.dtype == E4M3 and tensor.name.endswith(WEIGHT_SUFFIX)


def _scale_name(weight: str) -> str:
    return weight.removesuffix(WEIGHT_SUFFIX) + SCALE_SUFFIX


def _architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    return _printable(names[0]) if isinstance(names, list) and names else "unknown architecture"


def _printable(value: object) -> str:
    """Text from a checkpoint, safe for a terminal: no escape sequences, no lone surrogates, not endless."""
    return printable(value, 100) if isinstance(value, str) else describe(value, 100)


def _as_anomaly(error: BlockFp8Error) -> Anomaly:
    if isinstance(error, CheckpointError):
        return error.anomaly
    what, *rest = str(error).split("\n")
    parts = dict(line.strip().split(": ", 1) for line in rest if ": " in line)
    return Anomaly(
        what,
        file=parts.get("where"),
        expected=parts.get("expected"),
        got=parts.get("got"),
        fix=parts.get("what to do"),
    )


def _find_anomalies(checkpoint: Checkpoint, config: BlockFp8Config) -> Iterator[Anomaly]:
    """Everything that the tensor table shows to be wrong with a checkpoint that declares block FP8."""
    tensors = checkpoint.tensors
    ignored = frozenset(config.ignored)
    quantized_names = {module_of(t.name).rpartition(".")[2] for t in tensors.values() if _is_fp8_weight(t)}
    if not quantized_names:
        yield Anomaly(
            "config.json declares block FP8, but no tensor is FP8",
            expected=f"{E4M3} weights",
            got=", ".join(sorted({t.dtype for t in tensors.values()})) or "no tensors",
            fix="remove quantization_config from config.json, or " + QUANTIZE_AGAIN,
        )
        return
    for tensor in tensors.values():
        if tensor.name.endswith(SCALE_SUFFIX):
            yield from _check_extra_scale(tensor, tensors)
        elif tensor.dtype in OTHER_FP8:
            yield _anomaly(tensor, "a tensor has another FP8 dtype than e4m3", E4M3, tensor.dtype, QUANTIZE_AGAIN)
        elif tensor.dtype == E4M3:
            yield from _check_weight(tensor, tensors, config, ignored)
        elif tensor.name.endswith(FOREIGN_SCALES):
            yield _anomaly(
                tensor,
                "a scale of a static or per-tensor scheme stands in a checkpoint with dynamic block scales",
                f"only *{SCALE_SUFFIX}",
                tensor.name.rpartition(".")[2],
                QUANTIZE_AGAIN,
            )
        elif tensor.dtype in FLOATS and is_decoder_linear(tensor.name, tensor.shape):
            yield from _check_float_weight(tensor, ignored, quantized_names)
    yield from _check_layers_present(checkpoint)


def _check_weight(
    tensor: TensorEntry, tensors: Mapping[str, TensorEntry], config: BlockFp8Config, ignored: frozenset[str]
) -> Iterator[Anomaly]:
    module = module_of(tensor.name)
    if not tensor.name.endswith(WEIGHT_SUFFIX) or len(tensor.shape) != 2:
        yield _anomaly(
            tensor,
            "an FP8 tensor is no weight of a linear layer",
            f"2-D tensors named *{WEIGHT_SUFFIX}",
            f"shape {list(tensor.shape)}",
            "serve it without this plugin, or " + QUANTIZE_AGAIN,
        )
        return
    if is_ignored(module, ignored):
        yield _anomaly(
            tensor,
            "a layer that config.json excludes from quantization has an FP8 weight",
            "a float weight",
            tensor.dtype,
            f"remove {module!r} from the ignore list in config.json, or {QUANTIZE_AGAIN}",
        )
    scale = tensors.get(_scale_name(tensor.name))
    shape = scale_shape(tensor.shape[0], tensor.shape[1], config.block)
    if scale is None:
        yield _anomaly(
            tensor,
            "an FP8 weight has no block scales",
            f"{_scale_name(tensor.name)}, shape {list(shape)}",
            "no such tensor",
            DOWNLOAD_AGAIN,
        )
        return
    if scale.shape != shape:
        yield _anomaly(
            scale,
            "block scales do not fit their weight",
            f"{list(shape)} for a weight of {list(tensor.shape)} in blocks of {config.block}",
            str(list(scale.shape)),
            f"check weight_block_size in config.json; else {DOWNLOAD_AGAIN}",
        )
    if scale.dtype not in SCALE_DTYPES:
        yield _anomaly(
            scale, "block scales have an unsupported dtype", " or ".join(SCALE_DTYPES), scale.dtype, QUANTIZE_AGAIN
        )


def _check_extra_scale(tensor: TensorEntry, tensors: Mapping[str, TensorEntry]) -> Iterator[Anomaly]:
    name = tensor.name.removesuffix(SCALE_SUFFIX) + WEIGHT_SUFFIX
    weight = tensors.get(name)
    if weight is None or weight.dtype not in (E4M3, *OTHER_FP8):
        yield _anomaly(
            tensor,
            "block scales have no FP8 weight",
            f"{name} in {E4M3}",
            weight.dtype if weight else "no such tensor",
            DOWNLOAD_AGAIN,
        )


def _check_float_weight(tensor: TensorEntry, ignored: frozenset[str], quantized_names: set[str]) -> Iterator[Anomaly]:
    """A float weight where FP8 is declared: certain where the name is a linear layer's, suspicious elsewhere."""
    module = module_of(tensor.name)
    if is_ignored(module, ignored):
        return
    name = module.rpartition(".")[2]
    certain = name in COMMON_LINEARS or name in quantized_names
    yield _anomaly(
        tensor,
        "a linear layer is not FP8, though config.json does not exclude it from quantization",
        E4M3,
        tensor.dtype,
        f"add {module!r} to modules_to_not_convert in config.json, or {QUANTIZE_AGAIN}",
        warning=not certain,
    )


def _check_unused(checkpoint: Checkpoint) -> Iterator[Anomaly]:
    """Files that are not the checkpoint's, but that vLLM would load: its own choice of files differs from this one.

    Source: vllm/model_executor/model_loader/default_loader.py (`_prepare_weights`), 0.30.0.
    """
    if checkpoint.unused and not checkpoint.has_index:
        yield Anomaly(
            f"vLLM loads every *{WEIGHTS_SUFFIX} of a folder without an index, on top of each other",
            file=checkpoint.unused[0] if is_plain_text(checkpoint.unused[0]) else None,
            expected=f"{SINGLE} alone, or {INDEX}",
            got=f"{len(checkpoint.unused)} more files",
            fix="remove the files that do not belong to the checkpoint",
        )
    other = next((file for file in checkpoint.unused if file.startswith("consolidated") and is_plain_text(file)), None)
    if other is not None and checkpoint.has_index:
        yield Anomaly(
            "vLLM prefers consolidated*.safetensors to the files that the index names",
            file=other,
            fix="serve it with --load-format safetensors, or remove the file",
            severity="warning",
        )


def _check_layers_present(checkpoint: Checkpoint) -> Iterator[Anomaly]:
    """Decoder layers without any tensor: what a lost shard looks like when there is no index."""
    text_config = checkpoint.config.get("text_config")
    count = checkpoint.config.get("num_hidden_layers")
    if count is None and isinstance(text_config, Mapping):
        count = text_config.get("num_hidden_layers")
    if not isinstance(count, int) or isinstance(count, bool) or len(checkpoint.files) == 0:
        return
    present = {index for name in checkpoint.tensors if (index := layer_index(name)) is not None and index < count}
    missing = count - len(present)
    if missing > 0 and not checkpoint.anomalies:
        first = next(i for i in range(count) if i not in present)
        yield Anomaly(
            "decoder layers have no tensors",
            file="config.json",
            expected=f"num_hidden_layers = {count}",
            got=f"{missing} missing, the first is layer {first}",
            fix=DOWNLOAD_AGAIN,
        )


def _find_undeclared(checkpoint: Checkpoint) -> Iterator[Anomaly]:
    """FP8 tensors in a checkpoint whose config.json does not say so."""
    fp8 = [tensor for tensor in checkpoint.tensors.values() if tensor.dtype in (E4M3, *OTHER_FP8)]
    if fp8:
        yield _anomaly(
            fp8[0],
            f"{len(fp8)} tensors are FP8, but config.json has no quantization_config",
            "quantization_config with quant_method, fmt, activation_scheme and weight_block_size",
            "none",
            "take config.json from the checkpoint's source",
        )


def _anomaly(tensor: TensorEntry, what: str, expected: str, got: str, fix: str, *, warning: bool = False) -> Anomaly:
    severity = "warning" if warning else "error"
    return Anomaly(what, tensor.file, tensor.name, expected, got, fix, severity)  # type: ignore[arg-type]
