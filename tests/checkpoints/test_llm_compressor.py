"""Checkpoints that llm-compressor itself writes: read, and dequantized as compressed-tensors' own dequantizer does.

It is not among the test tools, since it wants a compressed-tensors of its own and a gigabyte of packages. To run this:
`pip install --no-deps --target FOLDER llmcompressor==0.14.0.1 compressed-tensors==0.19.0 loguru accelerate datasets
pyarrow dill xxhash multiprocess pandas`, then `PYTHONPATH=FOLDER`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qwen3_fp8_ascend.checkpoints.dequantize import dequantize_checkpoint
from qwen3_fp8_ascend.checkpoints.inspect import check_checkpoint

pytest.importorskip("llmcompressor", reason="llm-compressor is not installed")

from tests.support.public_models import write_model


@pytest.mark.parametrize(("family", "layers"), [("qwen3", 14), ("phi3", 8), ("qwen3_moe", 56)])
def test_what_llm_compressor_writes(tmp_path: Path, family: str, layers: int) -> None:
    from compressed_tensors.entrypoints.convert.converters import CompressedTensorsDequantizer
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(write_model(tmp_path / "bf16", family), dtype=torch.bfloat16)
    ignore = ["lm_head", "re:.*mlp.gate$"]
    oneshot(model=model, recipe=QuantizationModifier(targets="Linear", scheme="FP8_BLOCK", ignore=ignore))
    model.save_pretrained(tmp_path / "ct", save_compressed=True)
    report = check_checkpoint(tmp_path / "ct")
    assert (report.anomalies, report.block_fp8_layers) == ((), layers)
    dequantize_checkpoint(tmp_path / "ct", tmp_path / "back", progress=False)
    not_linear = ("re:.*embed_tokens$",)  # it sees tensors and no classes of modules
    judge = CompressedTensorsDequantizer(str(tmp_path / "ct"), not_linear, torch.bfloat16)
    theirs = judge.process(load_file(tmp_path / "ct" / "model.safetensors"))
    ours = load_file(tmp_path / "back" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
