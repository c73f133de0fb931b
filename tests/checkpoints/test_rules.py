"""Every anomaly is found, named and told apart from what is normal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen3_fp8_ascend.checkpoints.inspect import check_checkpoint, inspect_checkpoint
from qwen3_fp8_ascend.checkpoints.plan import EXCLUDED_FP8
from qwen3_fp8_ascend.errors import BlockFp8Error
from tests.support.checkpoint_folders import block_fp8_tensors, one_thread, write_block_fp8, write_folder  # noqa: F401

E4M3 = torch.float8_e4m3fn
DOWN = "model.layers.1.mlp.down_proj"
UP = "model.layers.1.mlp.up_proj"
Tensors = dict[str, torch.Tensor]


def drop_scale(t: Tensors) -> None:
    del t[f"{DOWN}.weight_scale_inv"]


def drop_weight(t: Tensors) -> None:
    del t[f"{DOWN}.weight"]


def wrong_scale_shape(t: Tensors) -> None:
    t[f"{DOWN}.weight_scale_inv"] = torch.ones(3, 2)


def half_scale(t: Tensors) -> None:
    t[f"{DOWN}.weight_scale_inv"] = torch.ones(2, 3).half()


def e5m2_scale(t: Tensors) -> None:
    t[f"{DOWN}.weight_scale_inv"] = torch.ones(2, 3).to(torch.float8_e5m2)


def fp8_scale(t: Tensors) -> None:
    t[f"{DOWN}.weight_scale_inv"] = torch.ones(2, 3).to(E4M3)


def float_weight(t: Tensors) -> None:
    drop_scale(t)
    t[f"{DOWN}.weight"] = torch.ones(200, 300).bfloat16()


def drop_both(t: Tensors) -> None:
    drop_scale(t)
    drop_weight(t)


def float_weight_with_scale(t: Tensors) -> None:
    t[f"{DOWN}.weight"] = torch.ones(200, 300).bfloat16()


def integer_weight(t: Tensors) -> None:
    drop_scale(t)
    t[f"{DOWN}.weight"] = torch.ones(200, 300, dtype=torch.int8)


def float_shard(t: Tensors) -> None:
    del t[f"{UP}.weight_scale_inv"]
    t[f"{UP}.weight"] = torch.ones(300, 200).bfloat16()


def narrow_shard(t: Tensors) -> None:
    t[f"{UP}.weight"] = torch.zeros(299, 200).to(E4M3)


def short_down(t: Tensors) -> None:
    t[f"{DOWN}.weight"] = torch.zeros(200, 299).to(E4M3)


def fp8_embedding(t: Tensors) -> None:
    t["model.embed_tokens.weight"] = t["model.embed_tokens.weight"].to(E4M3)


def e5m2(t: Tensors) -> None:
    t[f"{DOWN}.weight"] = t[f"{DOWN}.weight"].to(torch.float8_e5m2)


def input_scale(t: Tensors) -> None:
    t[f"{DOWN}.input_scale"] = torch.ones(1)


def tensor_scale(t: Tensors) -> None:
    drop_scale(t)
    t[f"{DOWN}.weight_scale"] = torch.ones(1)


def three_dimensions(t: Tensors) -> None:
    t["model.layers.1.mlp.experts.weight"] = torch.zeros(2, 4, 4).to(E4M3)


def fp8_cache_scale(t: Tensors) -> None:
    t["model.layers.1.self_attn.k_cache"] = torch.zeros(4).to(E4M3)


def no_fp8(t: Tensors) -> None:
    for name in [name for name in t if name.endswith("weight_scale_inv")]:
        del t[name]
        weight = name.removesuffix("_scale_inv")
        t[weight] = t[weight].bfloat16()


def missing_layer(t: Tensors) -> None:
    for name in [name for name in t if ".layers.0." in name]:
        del t[name]


CASES = {
    drop_scale: ("no block scales", f"{DOWN}.weight"),
    drop_weight: ("scales have no FP8 weight", f"{DOWN}.weight_scale_inv"),
    wrong_scale_shape: ("do not fit", f"{DOWN}.weight_scale_inv"),
    half_scale: ("unsupported dtype", f"{DOWN}.weight_scale_inv"),
    e5m2_scale: ("unsupported dtype", f"{DOWN}.weight_scale_inv"),
    fp8_scale: ("unsupported dtype", f"{DOWN}.weight_scale_inv"),
    float_weight_with_scale: ("scales have no FP8 weight", f"{DOWN}.weight_scale_inv"),
    integer_weight: ("neither FP8 nor float", f"{DOWN}.weight"),
    float_shard: ("FP8 only in part", f"{UP}.weight"),
    narrow_shard: ("does not fit the others", f"{UP}.weight"),
    short_down: ("does not fit the others", f"{DOWN}.weight"),
    fp8_embedding: ("no weight of a linear layer", "model.embed_tokens.weight"),
    e5m2: ("another FP8 dtype", f"{DOWN}.weight"),
    input_scale: ("static or per-tensor", f"{DOWN}.input_scale"),
    tensor_scale: ("static or per-tensor", f"{DOWN}.weight_scale"),
    three_dimensions: ("no weight of a linear layer", "model.layers.1.mlp.experts.weight"),
    fp8_cache_scale: ("no weight of a linear layer", "model.layers.1.self_attn.k_cache"),
    no_fp8: ("no tensor is FP8", None),
    missing_layer: ("layers have no tensors", None),
}


@pytest.mark.parametrize("damage", CASES, ids=lambda f: f.__name__)
def test_every_anomaly_is_found(tmp_path: Path, damage: Any) -> None:
    what, tensor = CASES[damage]
    tensors = block_fp8_tensors()
    damage(tensors)
    folder = write_block_fp8(tmp_path / "m", tensors)
    found = [a for a in inspect_checkpoint(folder).errors if what in a.what]
    assert [a.tensor for a in found] == [tensor]
    assert found[0].fix
    assert found[0].got
    assert found[0].expected
    if tensor:
        assert found[0].file == "model.safetensors"
    with pytest.raises(BlockFp8Error):
        check_checkpoint(folder)


def test_damage_is_told_once(tmp_path: Path) -> None:
    """One cause, one anomaly (two where two tensors contradict each other)."""
    for damage in CASES:
        tensors = block_fp8_tensors()
        damage(tensors)
        twice = damage in (float_weight_with_scale, tensor_scale, float_shard, drop_weight)
        count = len(inspect_checkpoint(write_block_fp8(tmp_path / damage.__name__, tensors)).anomalies)
        assert count == 1 + twice, damage.__name__


def test_all_anomalies_are_listed_and_counted(tmp_path: Path) -> None:
    tensors = block_fp8_tensors()
    for damage in (input_scale, wrong_scale_shape, fp8_embedding):
        damage(tensors)
    folder = write_block_fp8(tmp_path / "m", tensors)
    assert len(inspect_checkpoint(folder).anomalies) == 3
    with pytest.raises(BlockFp8Error, match="and 2 more"):
        check_checkpoint(folder)


@pytest.mark.parametrize("damage", [float_weight, drop_both])
def test_what_the_tensors_decide_is_a_warning_that_names_the_module(tmp_path: Path, damage: Any) -> None:
    tensors = block_fp8_tensors()
    damage(tensors)
    anomalies = check_checkpoint(write_block_fp8(tmp_path / "m", tensors)).anomalies
    assert {(anomaly.severity, anomaly.tensor) for anomaly in anomalies} == {("warning", f"{DOWN}.weight")}


def test_a_list_that_excludes_what_is_fp8_is_a_warning(tmp_path: Path) -> None:
    report = check_checkpoint(write_block_fp8(tmp_path / "m", block_fp8_tensors(), modules_to_not_convert=["mlp"]))
    assert {(a.severity, a.what) for a in report.anomalies} == {("warning", EXCLUDED_FP8)}
    assert len(report.anomalies) == 6
    assert report.plan is not None and report.plan.kinds()[DOWN] == "fp8"
    assert report.plan.modules[DOWN].listed and not report.plan.modules["lm_head"].listed


def test_an_unknown_float_module_is_only_a_warning(tmp_path: Path) -> None:
    tensors = block_fp8_tensors() | {"model.layers.0.indexer.weights_thing.weight": torch.ones(4, 200).bfloat16()}
    report = check_checkpoint(write_block_fp8(tmp_path / "m", tensors))
    assert [(a.severity, a.tensor) for a in report.anomalies] == [
        ("warning", "model.layers.0.indexer.weights_thing.weight")
    ]


def test_bf16_scales_and_other_blocks_are_normal(tmp_path: Path) -> None:
    tensors = {name: t.bfloat16() if name.endswith("_inv") else t for name, t in block_fp8_tensors().items()}
    check_checkpoint(write_block_fp8(tmp_path / "bf16", tensors))
    for name in [name for name in tensors if name.endswith("_inv")]:
        n, k = tensors[name.removesuffix("_scale_inv")].shape
        tensors[name] = torch.ones(-(-n // 64), -(-k // 32))
    check_checkpoint(write_block_fp8(tmp_path / "64x32", tensors, weight_block_size=[64, 32]))


def test_ignored_layers_may_be_float(tmp_path: Path) -> None:
    tensors = block_fp8_tensors()
    float_weight(tensors)
    check_checkpoint(write_block_fp8(tmp_path / "one", tensors, ignored_layers=[DOWN]))
    ignored = ["lm_head", "model.layers.1.mlp"]
    check_checkpoint(write_block_fp8(tmp_path / "mlp", float_mlp(tensors), modules_to_not_convert=ignored))


def float_mlp(tensors: Tensors) -> Tensors:
    return {
        name: t.bfloat16() if name.startswith("model.layers.1.mlp") else t
        for name, t in tensors.items()
        if not (name.startswith("model.layers.1.mlp") and name.endswith("_inv"))
    }


def test_fp8_without_a_declaration_is_an_anomaly(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", {"model.safetensors": block_fp8_tensors()})
    assert "no quantization_config" in inspect_checkpoint(folder).anomalies[0].what


def test_files_that_vllm_would_load_too_are_refused(tmp_path: Path) -> None:
    """Beside model.safetensors and without an index; the conversions go by model.safetensors alone."""
    folder = write_block_fp8(tmp_path / "m", block_fp8_tensors())
    (folder / "extra.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(BlockFp8Error, match="on top of each other") as caught:
        check_checkpoint(folder)
    assert "extra.safetensors" in str(caught.value)
    weight_map = dict.fromkeys(block_fp8_tensors(), "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert check_checkpoint(folder).anomalies == ()
    (folder / "extra.safetensors").rename(folder / "consolidated.safetensors")
    (anomaly,) = check_checkpoint(folder).anomalies
    assert (anomaly.severity, anomaly.file) == ("warning", "consolidated.safetensors")
