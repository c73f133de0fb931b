"""Checkpoints whose scales are powers of two (``"scale_fmt": "ue8m0"``), stored as fp32 or as e8m0, and checkpoints
in other blocks than 128 x 128, through vLLM.

In fp32, against the specification in transformers' own model.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen3_fp8_ascend.checkpoints.inspect import check_checkpoint
from qwen3_fp8_ascend.checkpoints.quantize import quantize_checkpoint
from qwen3_fp8_ascend.format import Activation
from qwen3_fp8_ascend.testing.models import write_qwen3
from tests.support.logprobs import distance, transformers_logprobs
from tests.support.offline import Run, answers

pytestmark = pytest.mark.server

W8A8: dict[str, Any] = {"quantization": "ascend"}
W8A16 = W8A8 | {"additional_config": {"qwen3_fp8_ascend": {"activation": "w8a16"}}}
NEAR = 1e-4
"""In nats a token; the order of sums moves a model of this size by a fiftieth of it."""


def with_e8m0_scales(source: Path, folder: Path) -> Path:
    """A copy of a checkpoint whose scales are stored in a byte each."""
    shutil.copytree(source, folder)
    tensors = load_file(source / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("_scale_inv"):
            tensors[name] = tensor.to(torch.float8_e8m0fnu)
            assert torch.equal(tensors[name].float(), tensor)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def without_scale_fmt(source: Path, folder: Path) -> Path:
    """A copy that says nothing of powers of two."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]["scale_fmt"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_log_probabilities(tmp_path: Path) -> None:
    """Weights alone, exactly. With activations quantized, far nearer to powers of two than to any scales."""
    model = tmp_path / "fp32"
    quantize_checkpoint(write_qwen3(tmp_path / "bf16"), model, scale_fmt="ue8m0", progress=False)
    in_bytes, other = with_e8m0_scales(model, tmp_path / "e8m0"), without_scale_fmt(model, tmp_path / "other")
    for folder in (model, in_bytes):
        assert check_checkpoint(folder).anomalies == ()
    runs = [Run(str(f), options) for f, options in ((model, W8A8), (in_bytes, W8A8), (in_bytes, W8A16), (other, W8A8))]
    fp32, e8m0, weights_only, any_scales = (answer.logprobs for answer in answers(runs, tmp_path))
    wanted = transformers_logprobs(in_bytes, activation=Activation.W8A8)
    near, far = distance(e8m0, wanted), distance(any_scales, wanted)
    exact = distance(weights_only, transformers_logprobs(in_bytes))
    print(f"\nnats a token against the specification: w8a16 {exact:.7f}, w8a8 {near:.6f}, with any scales {far:.6f}")
    assert distance(fp32, e8m0) == 0
    assert exact < NEAR
    assert near < far / 4
    assert distance(any_scales, transformers_logprobs(other, activation=Activation.W8A8)) < far / 4


BY_NAME = "reference"
"""The backend that serves blocks of single rows, which no fast one does."""


def test_other_blocks(tmp_path: Path) -> None:
    """Served by the CPU backend, or by the specification if it is asked for; activations in groups of `block.k`."""
    source = write_qwen3(tmp_path / "bf16")
    sizes = {"64x64": (64, 64), "128x64": (128, 64), "1x128": (1, 128)}
    models = {name: tmp_path / name for name in sizes}
    for name, block in sizes.items():
        quantize_checkpoint(source, models[name], block=block, progress=False)
    runs = []
    for name, model in models.items():
        settings = {"backend": BY_NAME} if name == "1x128" else {}
        for activation in ("w8a16", "w8a8"):
            given = {"qwen3_fp8_ascend": settings | {"activation": activation}}
            runs.append(Run(str(model), W8A8 | {"additional_config": given}))
    made = iter(answers(runs, tmp_path))
    for name, model in models.items():
        weights_only, w8a8 = next(made).logprobs, next(made).logprobs
        near = distance(weights_only, transformers_logprobs(model))
        quantized = transformers_logprobs(model, activation=Activation.W8A8)
        noise, quantizing = distance(w8a8, quantized), distance(w8a8, weights_only)
        print(
            f"\n{name}, nats a token against the specification: w8a16 {near:.7f}, w8a8 {noise:.6f} of {quantizing:.4f}"
        )
        assert near < NEAR
        assert noise < quantizing / 2
