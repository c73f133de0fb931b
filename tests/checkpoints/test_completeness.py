"""Tensors that a checkpoint has lost: told by the rest of it, since vLLM would compute with what is in memory there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen3_fp8_ascend.checkpoints.inspect import inspect_checkpoint
from qwen3_fp8_ascend.checkpoints.quantize import quantize_checkpoint
from tests.support.checkpoint_folders import one_thread  # noqa: F401
from tests.support.expert_models import write_experts
from tests.support.public_models import write_model


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    quantize_checkpoint(write_model(folder / "bf16", "qwen2"), folder / "fp8", progress=False)
    return folder / "fp8"


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_experts(tmp_path_factory.mktemp("experts") / "bf16", "minimax_m2")


def without(folder: Path, target: Path, *lost: str, **config: Any) -> list[tuple[str, str | None, str]]:
    """What `inspect` says of a copy without some tensors: severity, tensor and what."""
    tensors = load_file(folder / "model.safetensors")
    for name in lost:
        del tensors[name]
    target.mkdir()
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | config
    (target / "config.json").write_text(json.dumps(config))
    found = inspect_checkpoint(target).anomalies
    assert all(anomaly.expected and anomaly.got and anomaly.fix for anomaly in found)
    return [(anomaly.severity, anomaly.tensor, anomaly.what) for anomaly in found]


LACKS = "a layer lacks a weight that the others have"
UNTIED = "no output head is in the checkpoint, and config.json does not tie it to the embedding"
WARNINGS: dict[str, str] = {
    "model.layers.1.input_layernorm.weight": LACKS,
    "model.layers.0.post_attention_layernorm.weight": LACKS,
    "model.layers.1.self_attn.k_proj.bias": LACKS,
    "model.embed_tokens.weight": "no token embedding is in the checkpoint",
    "model.norm.weight": "no norm behind the decoder layers is in the checkpoint",
    "lm_head.weight": UNTIED,
}


@pytest.mark.parametrize("lost", WARNINGS)
def test_what_a_model_without_it_may_be_is_a_warning(tmp_path: Path, dense: Path, lost: str) -> None:
    assert without(dense, tmp_path / "whole") == []
    (found,) = without(dense, tmp_path / "damaged", lost)
    assert found == ("warning", lost if WARNINGS[lost] == LACKS else None, WARNINGS[lost])


def test_a_head_that_is_tied_or_that_no_one_asks_for_is_not_lost(tmp_path: Path, dense: Path) -> None:
    assert without(dense, tmp_path / "tied", "lm_head.weight", tie_word_embeddings=True) == []
    assert without(dense, tmp_path / "unknown", "lm_head.weight", tie_word_embeddings=None) == []
    assert without(dense, tmp_path / "scores", "lm_head.weight", architectures=["Qwen2ForSequenceClassification"]) == []
    assert without(dense, tmp_path / "hostile", "lm_head.weight", architectures={"a": 1}) == []


@pytest.mark.parametrize("lost", ["gate.weight", "e_score_correction_bias"])
def test_what_chooses_among_experts_is_missed(tmp_path: Path, experts: Path, lost: str) -> None:
    assert without(experts, tmp_path / "whole") == []
    name = f"model.layers.1.block_sparse_moe.{lost}"
    (found,) = without(experts, tmp_path / "damaged", name)
    assert found == ("error", name, "a layer of experts lacks what chooses among them")


def test_layers_for_token_prediction_have_norms_of_their_own(tmp_path: Path, dense: Path) -> None:
    """Told by the number of layers, or by their name."""
    tensors = load_file(dense / "model.safetensors")
    for name in ("model.layers.2.enorm.weight", "mtp.layers.0.enorm.weight"):
        folder = tmp_path / name
        folder.mkdir()
        save_file(tensors | {name: torch.ones(256).bfloat16()}, folder / "model.safetensors", {"format": "pt"})
        config = json.loads((dense / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))
        assert inspect_checkpoint(folder).warnings == ()


def test_layers_of_two_kinds_lack_nothing(tmp_path: Path, dense: Path) -> None:
    """Kimi-Linear calls both of its attentions `self_attn`."""
    tensors = {
        name.replace("layers.1.self_attn.o_proj", "layers.1.self_attn.g_proj"): tensor
        for name, tensor in load_file(dense / "model.safetensors").items()
    }
    folder = tmp_path / "hybrid"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text((dense / "config.json").read_text())
    assert inspect_checkpoint(folder).anomalies == ()


def test_keys_and_values_that_a_model_does_without(tmp_path: Path, dense: Path) -> None:
    """Gemma 4: the last layers use another's, and values may be the keys."""

    def parts(layer: int, *projections: str) -> list[str]:
        endings = ("weight", "weight_scale_inv", "bias")
        return [f"model.layers.{layer}.self_attn.{name}.{ending}" for name in projections for ending in endings]

    shared = {"num_kv_shared_layers": 1}
    assert without(dense, tmp_path / "shared", *parts(1, "k_proj", "v_proj"), **shared) == []
    assert {what for _, _, what in without(dense, tmp_path / "first", *parts(0, "k_proj"), **shared)} == {LACKS}
    assert {what for _, _, what in without(dense, tmp_path / "query", *parts(1, "q_proj"), **shared)} == {LACKS}
    alike = {"attention_k_eq_v": True}
    assert without(dense, tmp_path / "alike", *parts(1, "v_proj"), **alike) == []
    assert {what for _, _, what in without(dense, tmp_path / "keys", *parts(1, "k_proj"), **alike)} == {LACKS}
    assert {what for _, _, what in without(dense, tmp_path / "not alike", *parts(1, "v_proj"))} == {LACKS}
