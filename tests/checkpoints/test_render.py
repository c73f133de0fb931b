"""What `inspect` prints: what matters, safe for terminals, and not endless."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console

from qwen3_fp8_ascend.checkpoints.anomaly import Anomaly
from qwen3_fp8_ascend.checkpoints.inspect import CheckpointReport, inspect_checkpoint
from qwen3_fp8_ascend.checkpoints.render import format_bytes, render
from tests.support.checkpoint_folders import BLOCK_FP8, block_fp8_tensors, write_block_fp8, write_folder

DOWN = "model.layers.1.mlp.down_proj"


def rendered(report: CheckpointReport) -> str:
    console = Console(file=io.StringIO(), width=120, force_terminal=False)
    render(report, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_rendering_shows_what_matters(tmp_path: Path) -> None:
    tensors = block_fp8_tensors()
    tensors[f"{DOWN}.weight_scale_inv"] = torch.ones(3, 2)
    text = rendered(inspect_checkpoint(write_block_fp8(tmp_path / "m", tensors)))
    for part in ("14 linear layers", "128x128", "error: block scales do not fit", f"{DOWN}.weight_scale_inv", "[3, 2]"):
        assert part in text
    assert "no anomalies" in rendered(inspect_checkpoint(write_block_fp8(tmp_path / "good", block_fp8_tensors())))


def test_rendering_is_safe_for_terminals(tmp_path: Path) -> None:
    config = {"model_type": "\x1b[2J[bold]x", "architectures": ["\ud800"], "quantization_config": BLOCK_FP8}
    config["quantization_config"] = BLOCK_FP8 | {"ignored_layers": ["\x1b]0;title\x07"]}
    folder = write_folder(tmp_path / "m", {"model.safetensors": block_fp8_tensors()}, config)
    text = rendered(inspect_checkpoint(folder))
    assert "\x1b" not in text
    assert "[bold]x" in text
    text.encode()


@pytest.mark.parametrize("count", [0, 200])
def test_long_lists_are_cut(count: int) -> None:
    anomalies = tuple(Anomaly(f"thing {i}", tensor=f"t{i}") for i in range(count))
    report = CheckpointReport("m", "a", "b", None, 1, 0, 0, {}, {}, (), anomalies)
    assert len(rendered(report).splitlines()) < 130


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (999, "999 B"), (1536, "1.5 kB"), (16e9, "16.0 GB"), (2.5e15, "2500.00 TB")]
)
def test_bytes_are_said_as_disks_count_them(size: float, text: str) -> None:
    assert format_bytes(size) == text
