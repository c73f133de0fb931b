"""Rollout engines of trainers: a bf16 folder, dummy weights, and FP8 weights that are pushed into the live model."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from qwen3_fp8_ascend.testing.models import write_block_fp8_qwen3
from tests.support.expert_models import write_experts
from tests.support.logprobs import distance
from tests.support.offline import Run, answers

from .test_experts import W8A8

pytestmark = pytest.mark.server

LAYER, EXPERT = (re.compile(rf"\.{name}\.(\d+)\.") for name in ("layers", "experts"))


def rollout(master: Path, fp8: Path, **options: Any) -> Run:
    """verl and NeMo-RL start engines so; the folder's own config.json says nothing of FP8."""
    quantization = json.loads((fp8 / "config.json").read_text())["quantization_config"]
    overrides = {"load_format": "dummy", "hf_overrides": {"quantization_config": quantization}}
    return Run(str(master), W8A8 | overrides | options, push=str(fp8))


def exchanged(source: Path, folder: Path, which: re.Pattern[str]) -> Path:
    """A copy in which each layer, or each expert, has its neighbour's weights; all else is the same."""
    shutil.copytree(source, folder)
    tensors = load_file(source / "model.safetensors")
    count = 1 + max(int(found[1]) for name in tensors if (found := which.search(name)))

    def renamed(name: str) -> str:
        return which.sub(lambda m: m[0].replace(m[1], str((int(m[1]) + 1) % count)), name)

    save_file({renamed(n): t for n, t in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_model_that_got_its_weights_from_a_trainer_is_the_one_that_loaded_them(tmp_path: Path) -> None:
    """Bit for bit, dense and with experts: dummy weights renewed, and real ones."""
    dense, experts = write_block_fp8_qwen3(tmp_path / "dense"), write_experts(tmp_path / "experts", "qwen3_moe")
    turned = exchanged(dense, tmp_path / "layers", LAYER), exchanged(experts, tmp_path / "neighbours", EXPERT)
    runs = {
        "dense": Run(str(dense), W8A8),
        "dense, turned": Run(str(turned[0]), W8A8),
        "dense, renewed": Run(str(turned[0]), W8A8, push=str(dense)),
        "dense, dummy": rollout(Path(f"{dense}-bf16"), dense),
        "experts": Run(str(experts), W8A8),
        "experts, turned": Run(str(turned[1]), W8A8),
        "experts, renewed": Run(str(turned[1]), W8A8, push=str(experts)),
        "experts, dummy": rollout(tmp_path / "experts", experts),
    }
    made = dict(zip(runs, answers(list(runs.values()), tmp_path), strict=True))
    for name in ("dense", "experts"):
        assert distance(made[f"{name}, turned"].logprobs, made[name].logprobs) > 0.1
        assert made[name].packed and made[f"{name}, dummy"].packed == made[name].packed
        np.testing.assert_array_equal(made[f"{name}, renewed"].logprobs, made[name].logprobs)


@pytest.mark.long
def test_a_compiled_model_that_got_its_weights_from_a_trainer_is_the_one_that_loaded_them(tmp_path: Path) -> None:
    """The short suite renews a compiled model's weights in tests/server/test_experts.py, by reloading."""
    dense, compiled = write_block_fp8_qwen3(tmp_path / "dense"), W8A8 | {"enforce_eager": False}
    turned = exchanged(dense, tmp_path / "layers", LAYER)
    given = (Run(str(dense), compiled), Run(str(turned), compiled), Run(str(turned), compiled, push=str(dense)))
    loaded, other, renewed = (answer.logprobs for answer in answers(given, tmp_path))
    assert distance(other, loaded) > 0.1
    np.testing.assert_array_equal(renewed, loaded)
