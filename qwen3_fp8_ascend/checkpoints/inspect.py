"""Say what a checkpoint is, from its headers alone, and name everything that would keep it from being served.

Imports neither torch nor vllm: vLLM's processes call `check_checkpoint` before any weight is read.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from qwen3_fp8_ascend.checkpoints.anomaly import Anomaly, CheckpointError, collect, fault
from qwen3_fp8_ascend.checkpoints.experts import ExpertsSummary, summarize_experts
from qwen3_fp8_ascend.checkpoints.folder import survey_checkpoint
from qwen3_fp8_ascend.checkpoints.plan import Plan, make_plan
from qwen3_fp8_ascend.checkpoints.rules import find_undeclared, is_fp8_weight, is_scale
from qwen3_fp8_ascend.checkpoints.weight_file import TensorEntry
from qwen3_fp8_ascend.errors import BlockFp8Error, describe, printable
from qwen3_fp8_ascend.format import BlockFp8Config


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
    experts: ExpertsSummary | None = None
    plan: Plan | None = None

    @property
    def warnings(self) -> tuple[Anomaly, ...]:
        """The anomalies that may be wrong and do not make the checkpoint unusable."""
        return tuple(anomaly for anomaly in self.anomalies if anomaly.severity == "warning")

    @property
    def notes(self) -> tuple[Anomaly, ...]:
        """What is left aside, though nothing is wrong with it."""
        return tuple(anomaly for anomaly in self.anomalies if anomaly.severity == "note")

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
            "experts": asdict(self.experts) if self.experts else None,
            "tensors_by_kind": dict(self.tensors_by_kind),
            "bytes_by_kind": dict(self.bytes_by_kind),
            "unused_files": list(self.unused_files),
            "plan": self.plan.to_dict() if self.plan else None,
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
    plan: Plan | None = None
    if checkpoint.quantization is not None:
        try:
            config = BlockFp8Config.from_dict(*checkpoint.quantization)
        except BlockFp8Error as error:
            findings.append([_as_anomaly(error)])
    else:
        findings.append(find_undeclared(checkpoint))
    if config is not None:
        plan = make_plan(checkpoint, config)
        findings.append(plan.anomalies)
    anomalies = collect(chain.from_iterable(findings))
    kinds = {name: _kind(tensor, checkpoint.tensors, config) for name, tensor in checkpoint.tensors.items()}
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
        experts=summarize_experts(checkpoint, config.block) if config else None,
        tensors_by_kind=dict(sorted(counts.items())),
        bytes_by_kind=dict(sorted(sizes.items())),
        unused_files=checkpoint.unused,
        anomalies=tuple(anomalies),
        plan=plan,
    )


def check_checkpoint(folder: str | os.PathLike[str], config: BlockFp8Config | None = None) -> CheckpointReport:
    """Refuse a checkpoint that cannot be served as block FP8; return its report otherwise.

    config: given to a checkpoint that has no quantization_config (``--hf-overrides``), so that FP8 weights may come
        later. Its own weights are then not judged.
    Raises:
        BlockFp8Error: the first error, saying how many more there are.
    """
    report = inspect_checkpoint(folder)
    if report.errors:
        raise CheckpointError(report.errors[0], len(report.errors) - 1)
    if report.config is None and config is None:
        raise fault(
            "this is not a block-FP8 checkpoint: its config.json has no quantization_config",
            file=report.folder,
            fix="quantize it first: `qwen3-fp8-ascend quantize`",
        )
    return report


def _kind(tensor: TensorEntry, tensors: Mapping[str, TensorEntry], config: BlockFp8Config | None) -> str:
    config = config or BlockFp8Config()
    if is_fp8_weight(tensor) and config.scale_of(tensor.name) in tensors:
        return "block FP8 weights"
    if is_scale(tensor.name, config):
        return "block scales"
    return f"other {tensor.dtype}"


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
