"""Which of vLLM's layers are FP8: by the checkpoint's tensors, under the names of vLLM's real models."""

from __future__ import annotations

import importlib
import json
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, ReplicatedLinear, UnquantizedLinearMethod

from qwen3_fp8_ascend.checkpoints.inspect import check_checkpoint
from qwen3_fp8_ascend.checkpoints.quantize import quantize_checkpoint
from qwen3_fp8_ascend.errors import BlockFp8Error
from qwen3_fp8_ascend.format import BlockFp8Config
from qwen3_fp8_ascend.testing.models import write_qwen3
from qwen3_fp8_ascend.vllm_plugin.config import BlockFp8AscendConfig
from qwen3_fp8_ascend.vllm_plugin.linear import BlockFp8LinearMethod
from qwen3_fp8_ascend.vllm_plugin.modules import Modules

QKV = ("q_proj", "k_proj", "v_proj")
QWEN3_VL = ("qwen3_vl", "Qwen3VLForConditionalGeneration")
QWEN3_5 = ("qwen3_5", "Qwen3_5ForConditionalGeneration")
MISTRAL = ("mistral3", "Mistral3ForConditionalGeneration")


def mapper(model: tuple[str, str]) -> Any:
    """The mapper of names that vLLM gives a quantization config of this model."""
    try:
        module = importlib.import_module(f"vllm.model_executor.models.{model[0]}")
    except ImportError as error:  # Mistral's vision tower needs a torchvision that loads
        pytest.skip(f"this vLLM cannot import {model[1]} here: {error}")
    return getattr(module, model[1]).hf_to_vllm_mapper.get_rename_mapper()


def modules(ignored: tuple[str, ...] = (), targets: tuple[str, ...] = (), **kinds: str) -> Modules:
    made = Modules(BlockFp8Config(ignored=ignored, targets=targets))
    made.obey({name.replace("__", "."): kind for name, kind in kinds.items()})
    return made


def shards_of(prefix: str, names: tuple[str, ...]) -> list[str]:
    return [f"{prefix.rpartition('.')[0]}.{name}" for name in names]


CHECKPOINT = {
    "model.language_model.layers.0.self_attn.q_proj": "fp8",
    "model.language_model.layers.0.self_attn.k_proj": "fp8",
    "model.language_model.layers.0.self_attn.v_proj": "fp8",
    "model.language_model.layers.1.linear_attn.in_proj_qkv": "fp8",
    "model.language_model.layers.1.linear_attn.in_proj_z": "fp8",
    "model.language_model.layers.1.linear_attn.in_proj_b": "float",
    "model.language_model.layers.1.linear_attn.in_proj_a": "float",
    "model.language_model.layers.1.mlp.experts": "fp8",
    "model.visual.blocks.0.attn.qkv": "float",
    "model.visual.merger.linear_fc1": "float",
    "lm_head": "float",
}


@pytest.mark.parametrize("model", [QWEN3_VL, QWEN3_5], ids=lambda m: m[0])
@pytest.mark.parametrize("ignored", [(), ("model.visual",), ("re:.*",), ("nothing that exists",)])
def test_the_tensors_decide_whatever_the_list_says(model: tuple[str, str], ignored: tuple[str, ...]) -> None:
    made = Modules(BlockFp8Config(ignored=ignored))
    made.obey(CHECKPOINT)
    made.rename(mapper(model))
    made = pickle.loads(pickle.dumps(made))
    layer = "language_model.model.layers"
    qkv = shards_of(f"{layer}.0.self_attn.qkv_proj", QKV)
    assert made.skipped(f"{layer}.0.self_attn.qkv_proj", qkv) == []
    qkvz = shards_of(f"{layer}.1.linear_attn.in_proj_qkvz", ("in_proj_qkv", "in_proj_z"))
    assert made.skipped(f"{layer}.1.linear_attn.in_proj_qkvz", qkvz) == []
    ba = shards_of(f"{layer}.1.linear_attn.in_proj_ba", ("in_proj_b", "in_proj_a"))
    assert made.skipped(f"{layer}.1.linear_attn.in_proj_ba", ba) == ba
    assert made.skipped(f"{layer}.1.mlp.experts", [f"{layer}.1.mlp.experts.0.gate_proj"]) == []
    for vision in ("visual.blocks.0.attn.qkv", "visual.merger.linear_fc1", "language_model.lm_head"):
        assert made.skipped(vision, ()) == [vision]


def test_a_model_within_a_model_maps_again() -> None:
    """Each model class that vLLM builds hands its own mapper to the one config."""
    made = Modules(BlockFp8Config(ignored=("model.visual",)))
    made.obey(CHECKPOINT)
    for model in (QWEN3_VL, QWEN3_5, QWEN3_VL):
        made.rename(mapper(model))
    assert made.skipped("language_model.model.layers.0.self_attn.q_proj", ()) == []
    assert made.skipped("visual.blocks.0.attn.qkv", ()) == ["visual.blocks.0.attn.qkv"]


@pytest.mark.parametrize(
    ("model", "entry", "prefix"),
    [
        (QWEN3_VL, "model.visual", "visual.blocks.0.attn.qkv"),
        (QWEN3_VL, "model.visual.blocks.0.attn.qkv", "visual.blocks.0.attn.qkv"),
        (QWEN3_VL, "re:model.visual.*", "visual.blocks.0.attn.proj"),
        (QWEN3_5, "re:.*in_proj_[ab]$", "language_model.model.layers.1.linear_attn.in_proj_ba"),
        (QWEN3_5, "*.linear_attn.in_proj_*", "language_model.model.layers.1.linear_attn.in_proj_ba"),
        (MISTRAL, "model.vision_tower", "vision_tower.transformer.layers.0.attention.q_proj"),
        (MISTRAL, "multi_modal_projector", "multi_modal_projector.linear_1"),
    ],
)
def test_without_headers_the_list_decides(model: tuple[str, str], entry: str, prefix: str) -> None:
    made = Modules(BlockFp8Config(ignored=(entry,)))
    made.rename(mapper(model))
    shards = shards_of(prefix, ("in_proj_b", "in_proj_a")) if prefix.endswith("in_proj_ba") else []
    assert made.skipped(prefix, shards) == (shards or [prefix])
    qkv = "language_model.model.layers.0.self_attn.qkv_proj"
    assert made.skipped(qkv, shards_of(qkv, QKV)) == []


def test_experts_under_other_names_are_what_their_block_is() -> None:
    """GraniteMoE has them as `input_linear` and `output_linear`."""
    moe = "model.layers.0.block_sparse_moe"
    experts = [f"{moe}.experts.0.gate_proj", f"{moe}.experts.0.up_proj"]
    around = {"model.layers.0.self_attn.o_proj": "fp8", f"{moe}.router.layer": "float"}
    assert modules(**around, **{f"{moe}.input_linear": "float"}).skipped(f"{moe}.experts", experts) == experts
    assert modules(**around, **{f"{moe}.input_linear": "fp8"}).skipped(f"{moe}.experts", experts) == []
    assert modules(**around).skipped("model.layers.1.mlp.experts", experts) == []


def test_one_of_two_shards_without_headers() -> None:
    ba = "model.layers.1.linear_attn.in_proj_ba"
    made = modules(("model.layers.1.linear_attn.in_proj_b",))
    assert made.skipped(ba, shards_of(ba, ("in_proj_b", "in_proj_a"))) == shards_of(ba, ("in_proj_b",))


def test_targets_without_headers() -> None:
    made = modules(targets=("re:.*self_attn.*", "re:.*down_proj$"))
    assert made.skipped("model.layers.0.self_attn.o_proj", ()) == []
    assert made.skipped("model.layers.0.mlp.gate_proj", ()) == ["model.layers.0.mlp.gate_proj"]


def test_a_pattern_that_is_not_understood_is_refused_only_without_headers() -> None:
    with pytest.raises(BlockFp8Error, match="not understood, and there are no tensors"):
        modules(("re:(?!x)",)).skipped("model.layers.0.x", ())
    assert modules(("re:(?!x)",), y="fp8").skipped("model.layers.0.x", ()) == []


def test_what_the_headers_do_not_know_is_asked_of_the_list() -> None:
    made = modules(("model.draft",), model__layers__0__x="fp8")
    assert made.skipped("model.draft.fc", ()) == ["model.draft.fc"]
    assert made.skipped("model.other.fc", ()) == []


def test_some_shards_only() -> None:
    made = modules((), a__q_proj="fp8", a__k_proj="float")
    assert made.skipped("a.qkv_proj", shards_of("a.qkv_proj", QKV)) == ["a.k_proj"]
    config = BlockFp8AscendConfig(BlockFp8Config())
    config.modules = made
    config.packed_modules_mapping = {"qkv_proj": list(QKV)}
    with pytest.raises(BlockFp8Error, match=r"(?s)only some.*a\.qkv_proj.*1, the first is a\.k_proj"):
        config._is_skipped("a.qkv_proj")


def test_the_plan_reaches_the_layers(tmp_path: Path) -> None:
    """A folder whose list names the wrong layers, through the config that vLLM makes of it, as its workers get it."""
    source = write_qwen3(tmp_path / "source")
    folder = tmp_path / "fp8"
    quantize_checkpoint(source, folder, ignore=["model.layers.1.mlp.*"], progress=False)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["modules_to_not_convert"] = ["model.layers.0.mlp", "re:(?!)"]
    (folder / "config.json").write_text(json.dumps(config))
    assert {a.severity for a in check_checkpoint(folder).anomalies} == {"warning"}
    made = BlockFp8AscendConfig.from_config(config["quantization_config"])
    made.maybe_update_config(str(folder))
    made = pickle.loads(pickle.dumps(made))
    made.packed_modules_mapping = {"gate_up_proj": ["gate_proj", "up_proj"]}
    methods = [
        type(
            MergedColumnParallelLinear(
                256, [512] * 2, bias=False, quant_config=made, prefix=f"model.layers.{i}.mlp.gate_up_proj"
            ).quant_method
        )
        for i in (0, 1)
    ]
    assert methods == [BlockFp8LinearMethod, UnquantizedLinearMethod]


@pytest.mark.parametrize("scale_shape", [(2, 2), (2, 1, 2, 1)])
def test_weight_scale_is_declared_under_the_checkpoints_name(scale_shape: tuple[int, ...]) -> None:
    config = BlockFp8AscendConfig(BlockFp8Config(container="modelopt"))
    layer = ReplicatedLinear(256, 256, bias=False, params_dtype=torch.bfloat16, quant_config=config, prefix="a.fc1")
    assert {name for name, _ in layer.named_parameters()} == {"weight", "weight_scale"}
    weight = torch.randn(256, 256).to(torch.float8_e4m3fn)
    scale = torch.rand(scale_shape).bfloat16()
    layer.weight.weight_loader(layer.weight, weight)
    layer.weight_scale.weight_loader(layer.weight_scale, scale)
    assert torch.equal(layer.weight_scale.data, scale.reshape(2, 2).float())
    layer.quant_method.process_weights_after_loading(layer)
    grown = scale.reshape(2, 2).float().repeat_interleave(128, 0).repeat_interleave(128, 1)
    x = torch.randn(3, 256)
    layer.quant_method.activation = "w8a16"
    out, _ = layer(x)
    assert torch.allclose(out, x @ (weight.float() * grown).T, rtol=1e-4, atol=1e-3)


def test_scales_of_a_cache_are_said_in_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source = write_qwen3(tmp_path / "source")
    quantize_checkpoint(source, tmp_path / "m", container="compressed-tensors", progress=False)
    file = tmp_path / "m" / "model.safetensors"
    tensors = load_file(file) | {"model.layers.0.self_attn.k_scale": torch.ones(1)}
    save_file(tensors, file, {"format": "pt"})
    quantization = json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    with caplog.at_level("INFO", "qwen3_fp8_ascend"):
        made = BlockFp8AscendConfig.from_config(quantization | {"kv_cache_scheme": {"num_bits": 8}})
        made.maybe_update_config(str(tmp_path / "m"))
    said = {id(r) for r in caplog.records if "scales of a quantized KV cache are ignored" in r.getMessage()}
    assert len(said) == 1  # pytest 9 may catch a record twice
    assert "not obeyed: kv_cache_scheme" in caplog.text
