"""Convert a checkpoint into another folder, one weight file after the other: what `quantize` and `dequantize` share.

The output is atomic (it appears under its name only when complete) and resumable (finished files are kept when a run
is killed), and it does not depend on how often the run was interrupted. Memory holds one output file and one tensor.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

import qwen3_fp8_ascend
from qwen3_fp8_ascend.checkpoints.anomaly import fault
from qwen3_fp8_ascend.checkpoints.folder import (
    CONFIG,
    INDEX,
    MODELOPT_CONFIG,
    PICKLE_SUFFIXES,
    WEIGHTS_SUFFIX,
    Checkpoint,
    leaving_link,
)
from qwen3_fp8_ascend.checkpoints.output import UnfinishedOutput, check_destination
from qwen3_fp8_ascend.checkpoints.render import format_bytes
from qwen3_fp8_ascend.checkpoints.tensors import WeightReader, write_weights
from qwen3_fp8_ascend.checkpoints.weight_file import LENGTH_BYTES, FileHeader, TensorEntry
from qwen3_fp8_ascend.errors import BlockFp8Error, printable

OTHER_WEIGHTS = (
    WEIGHTS_SUFFIX,
    *PICKLE_SUFFIXES,
    ".gguf",
    ".onnx",
    ".onnx_data",
    ".h5",
    ".msgpack",
    ".ot",
    ".npz",
    ".tflite",
)
"""Files that are weights in some format: the new checkpoint has its own."""

HIDDEN_COPIES = (".git", ".cache")
"""Folders of version control and of download clients."""

Read = Callable[[TensorEntry], torch.Tensor]


class Conversion(Protocol):
    """What is done to a checkpoint: which tensors come out of each, and how they are computed."""

    @property
    def operation(self) -> str:
        """What the progress bar and the journal call it."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """Everything that the output depends on besides the source, as JSON data."""

    def outputs(self, tensor: TensorEntry) -> Sequence[TensorEntry]:
        """The tensors that replace `tensor`; itself if it is kept as it is, none if it is dropped."""

    def convert(self, tensor: TensorEntry, read: Read) -> Sequence[torch.Tensor]:
        """The replacements of a tensor that is not kept, in the order of `outputs`."""

    def config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The new config.json."""


@dataclass(frozen=True)
class ConversionSummary:
    """What a finished conversion did; `reused` counts files that an interrupted run had left finished."""

    destination: Path
    converted: int
    kept: int
    reused: int


@dataclass(frozen=True)
class _Plan:
    """One output file: the source tensors that go into it and what each becomes."""

    file: str
    outputs: Mapping[TensorEntry, Sequence[TensorEntry]]

    @property
    def entries(self) -> Iterator[TensorEntry]:
        return (entry for outputs in self.outputs.values() for entry in outputs)

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries)


def convert_checkpoint(
    checkpoint: Checkpoint,
    destination: str | os.PathLike[str],
    conversion: Conversion,
    *,
    progress: bool = True,
    overwrite: bool = False,
) -> ConversionSummary:
    """Write a converted copy of a checkpoint: weights, index, config, and every other file as it is.

    Raises:
        BlockFp8Error: the destination exists or lies within the source, there is too little disk space or memory, an
            unfinished run with other settings is in the way, or what `conversion` raises. What was finished until
            then is kept in ``<destination>.incomplete`` and the same call continues there.
    """
    target = Path(os.path.abspath(destination))
    _check_apart(checkpoint.folder, target)
    check_destination(target, overwrite=overwrite)
    for name in (CONFIG, INDEX, *(header.file for header in checkpoint.files)):
        _check_link(checkpoint.path(name), checkpoint.folder)
    plans = [plan for header in checkpoint.files if any((plan := _plan_file(header, conversion)).entries)]
    try:
        carried = list(_carried_files(checkpoint.folder))
        with UnfinishedOutput(target, _identity(checkpoint, conversion), overwrite=overwrite) as output:
            todo = [plan for plan in plans if not output.has(plan.file)]
            _check_space(output.root, todo, carried)
            _write_files(checkpoint, output, todo, conversion, progress=progress)
            if checkpoint.has_index or len(plans) > 1:
                output.write_json(INDEX, _index(plans))
            output.write_json(CONFIG, conversion.config(checkpoint.config))
            for name, path in carried:
                output.copy(path, name)
            output.finish()
    except OSError as error:
        raise _explain(error, target) from error
    all_outputs = [(tensor, outputs) for plan in plans for tensor, outputs in plan.outputs.items()]
    kept = sum(list(outputs) == [tensor] for tensor, outputs in all_outputs)
    return ConversionSummary(
        destination=target,
        converted=sum(bool(outputs) for _, outputs in all_outputs) - kept,
        kept=kept,
        reused=len(plans) - len(todo),
    )


def _plan_file(header: FileHeader, conversion: Conversion) -> _Plan:
    return _Plan(header.file, {tensor: conversion.outputs(tensor) for tensor in header.tensors})


def _write_files(
    checkpoint: Checkpoint, output: UnfinishedOutput, plans: Sequence[_Plan], conversion: Conversion, *, progress: bool
) -> None:
    total = sum(tensor.nbytes for plan in plans for tensor in plan.outputs)
    with _Progress(conversion.operation, total, visible=progress) as bar:
        for number, plan in enumerate(plans, 1):
            bar.describe(f"{plan.file} ({number}/{len(plans)})")
            output.write(plan.file, partial(_write_file, checkpoint, plan, conversion, bar.advance, output.mode))


def _write_file(
    checkpoint: Checkpoint, plan: _Plan, conversion: Conversion, advance: Callable[[int], None], mode: int, tmp: Path
) -> None:
    tensors: dict[str, torch.Tensor] = {}
    with WeightReader(checkpoint.folder) as reader:
        for tensor, outputs in plan.outputs.items():
            if list(outputs) == [tensor]:
                tensors[tensor.name] = reader.read(tensor)
            elif outputs:
                converted = conversion.convert(tensor, reader.read)
                tensors |= {entry.name: made for entry, made in zip(outputs, converted, strict=True)}
            advance(tensor.nbytes)
    write_weights(tmp, tensors, mode)


class _Progress:
    """A progress bar in bytes on stderr; invisible unless that is a terminal."""

    def __init__(self, operation: str, total: int, *, visible: bool) -> None:
        from rich import progress
        from rich.console import Console

        console = Console(stderr=True)
        self._bar = progress.Progress(
            progress.TextColumn("{task.description}", markup=False),
            progress.BarColumn(),
            progress.DownloadColumn(),
            progress.TransferSpeedColumn(),
            progress.TimeRemainingColumn(),
            console=console,
            disable=not (visible and console.is_terminal),
        )
        self._operation = operation
        self._task = self._bar.add_task(operation, total=total)

    def __enter__(self) -> _Progress:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def describe(self, what: str) -> None:
        self._bar.update(self._task, description=f"{self._operation} {what}")

    def advance(self, size: int) -> None:
        self._bar.advance(self._task, size)


def _index(plans: Sequence[_Plan]) -> dict[str, Any]:
    weight_map = {entry.name: plan.file for plan in plans for entry in plan.entries}
    total = sum(plan.nbytes for plan in plans)
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}


def _identity(checkpoint: Checkpoint, conversion: Conversion) -> dict[str, Any]:
    """What an unfinished output must agree with to be continued."""
    sources = {}
    for header in checkpoint.files:
        path = checkpoint.path(header.file)
        with path.open("rb") as file:
            digest = hashlib.sha256(file.read(LENGTH_BYTES + header.header_bytes)).hexdigest()
        sources[header.file] = {"size": header.size, "modified_ns": path.stat().st_mtime_ns, "header_sha256": digest}
    return {
        "operation": conversion.operation,
        "settings": dict(conversion.settings),
        "version": qwen3_fp8_ascend.__version__,
        "torch": torch.__version__,
        "source": sources,
    }


def _carried_files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Every file that is neither weights nor made anew: tokenizer, generation config, chat template, licence, code."""
    for directory, subfolders, names in os.walk(folder):
        subfolders[:] = sorted(name for name in subfolders if name not in HIDDEN_COPIES)
        for name in sorted(names):
            path = Path(directory) / name
            relative = path.relative_to(folder).as_posix()
            made_anew = relative in (CONFIG, MODELOPT_CONFIG) or name.endswith(".index.json")
            if made_anew or name.lower().endswith(OTHER_WEIGHTS):
                continue
            _check_link(path, folder)
            if path.is_file():
                yield relative, path


def _check_link(path: Path, folder: Path) -> None:
    """Refuse a link that would copy a file of the user's from elsewhere into a folder meant to be shared."""
    target = leaving_link(path, folder)
    if target is not None:
        raise fault(
            "a link leaves the checkpoint folder",
            file=printable(path.relative_to(folder).as_posix()),
            expected="a link within the folder or into the download cache's blobs",
            got=printable(str(target)),
            fix="replace the link by the file, if it belongs to the checkpoint",
        )


def _check_apart(source: Path, destination: Path) -> None:
    inner, outer = Path(os.path.realpath(source)), Path(os.path.realpath(destination))
    if inner == outer or outer.is_relative_to(inner) or inner.is_relative_to(outer):
        raise BlockFp8Error(
            "source and destination lie within each other",
            where=destination,
            expected=f"a folder apart from {source}",
            fix="choose another destination",
        )


def _check_space(root: Path, plans: Sequence[_Plan], carried: Sequence[tuple[str, Path]]) -> None:
    needed = sum(plan.nbytes for plan in plans) + sum(path.stat().st_size for _, path in carried)
    free = shutil.disk_usage(root).free
    if needed > free:
        raise BlockFp8Error(
            "too little disk space",
            where=root.parent,
            expected=f"{format_bytes(needed)} free",
            got=f"{format_bytes(free)} free",
            fix="free some space or choose another destination",
        )


def _explain(error: OSError, destination: Path) -> BlockFp8Error:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return BlockFp8Error(
            "no space left on the disk",
            where=f"{destination}.incomplete",
            fix="free some space and run the same command again; it continues where it stopped",
        )
    return BlockFp8Error(
        "the conversion cannot read or write its files",
        where=printable(str(error.filename or destination)),
        got=error.strerror,
        fix="mend the cause and run the same command again; it continues where it stopped",
    )
