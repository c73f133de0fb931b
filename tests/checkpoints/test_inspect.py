"""Every anomaly is found, named and told apart from what is normal; looking costs next to nothing."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from qwen3_fp8_ascend.checkpoints.anomaly import Anomaly
from qwen3_fp8_ascend.checkpoints.inspect import CheckpointReport, check_checkpoint, inspect_checkpoint, render
from qwen3_fp8_ascend.checkpoints.layers import is_decoder_linear, is_ignored, layer_index
from qwen3_fp8_ascend.errors import BlockFp8Error
from qwen3_fp8_ascend.format import scale_shape
from tests.support.checkpoint_folders import (  # noqa: F401
    BLOCK_FP8,
    linear_weights,
    one_thread,
    write_folder,
    write_sparse,
)

E4M3 = torch.float8_e4m3fn
DOWN = "model.layers.1.mlp.down_proj"
Tensors = dict[str, torch.Tensor]


def block_fp8_tensors() -> Tensors:
    tensors: Tensors = {
        "model.embed_tokens.weight": torch.zeros(9, 200).bfloat16(),
        "lm_head.weight": torch.zeros(9, 200),
    }
    for name, (n, k) in linear_weights(2, 200, 300, 72).items():
        tensors[name] = torch.zeros(n, k).to(E4M3)
        tensors[f"{name}_scale_inv"] = torch.ones(scale_shape(n, k))
    for i in range(2):
        tensors[f"model.layers.{i}.input_layernorm.weight"] = torch.ones(200).bfloat16()
        tensors[f"model.layers.{i}.self_attn.q_proj.bias"] = torch.ones(200).bfloat16()
        tensors[f"model.layers.{i}.mlp.gate.weight"] = torch.ones(8, 200).bfloat16()
        tensors[f"model.layers.{i}.conv1d.weight"] = torch.ones(8, 1, 4).bfloat16()
    return tensors


def write(folder: Path, tensors: Tensors, **quantization: Any) -> Path:
    config = {
        "quantization_config": BLOCK_FP8 | quantization,
        "num_hidden_layers": 2,
        "architectures": ["Qwen3ForCausalLM"],
    }
    return write_folder(folder, {"model.safetensors": tensors}, config)


def test_a_good_checkpoint_has_no_anomalies(tmp_path: Path) -> None:
    report = check_checkpoint(write(tmp_path / "m", block_fp8_tensors()))
    assert report.anomalies == ()
    assert report.block_fp8_layers == 14
    assert report.architecture == "Qwen3ForCausalLM"
    weights = linear_weights(2, 200, 300, 72).values()
    assert report.bytes_by_kind["block FP8 weights"] == sum(n * k for n, k in weights)
    assert report.bytes_by_kind["block scales"] == sum(4 * torch.Size(scale_shape(n, k)).numel() for n, k in weights)
    assert sum(report.tensors_by_kind.values()) == report.tensors == len(block_fp8_tensors())
    assert json.loads(json.dumps(report.to_dict()))["block_fp8_layers"] == 14


def drop_scale(t: Tensors) -> None:
    del t[f"{DOWN}.weight_scale_inv"]


def drop_weight(t: Tensors) -> None:
    del t[f"{DOWN}.weight"]


def wrong_scale_shape(t: Tensors) -> None:
    t[f"{DOWN}.weight_scale_inv"] = torch.ones(3, 2)


def half_scale(t: Tensors) -> None:
    t[f"{DOWN}.weight_scale_inv"] = torch.ones(2, 3).half()


def ue8m0_scale(t: Tensors) -> None:
    t[f"{DOWN}.weight_scale_inv"] = torch.ones(2, 3).to(torch.float8_e8m0fnu)


def fp8_scale(t: Tensors) -> None:
    t[f"{DOWN}.weight_scale_inv"] = torch.ones(2, 3).to(E4M3)


def float_weight(t: Tensors) -> None:
    drop_scale(t)
    t[f"{DOWN}.weight"] = torch.ones(200, 300).bfloat16()


def float_weight_with_scale(t: Tensors) -> None:
    t[f"{DOWN}.weight"] = torch.ones(200, 300).bfloat16()


def ignored_fp8(t: Tensors) -> None:
    t["lm_head.weight"] = torch.zeros(9, 200).to(E4M3)
    t["lm_head.weight_scale_inv"] = torch.ones(1, 2)


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
    ue8m0_scale: ("unsupported dtype", f"{DOWN}.weight_scale_inv"),
    fp8_scale: ("unsupported dtype", f"{DOWN}.weight_scale_inv"),
    float_weight: ("is not FP8", f"{DOWN}.weight"),
    float_weight_with_scale: ("is not FP8", f"{DOWN}.weight"),
    ignored_fp8: ("excludes from quantization", "lm_head.weight"),
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
    folder = write(tmp_path / "m", tensors)
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
        twice = damage in (float_weight_with_scale, tensor_scale)
        count = len(inspect_checkpoint(write(tmp_path / damage.__name__, tensors)).anomalies)
        assert count == 1 + twice, damage.__name__


def test_all_anomalies_are_listed_and_counted(tmp_path: Path) -> None:
    tensors = block_fp8_tensors()
    for damage in (input_scale, wrong_scale_shape, ignored_fp8):
        damage(tensors)
    folder = write(tmp_path / "m", tensors)
    assert len(inspect_checkpoint(folder).anomalies) == 3
    with pytest.raises(BlockFp8Error, match="and 2 more"):
        check_checkpoint(folder)


def test_an_unknown_float_module_is_only_a_warning(tmp_path: Path) -> None:
    tensors = block_fp8_tensors() | {"model.layers.0.indexer.weights_thing.weight": torch.ones(4, 200).bfloat16()}
    report = check_checkpoint(write(tmp_path / "m", tensors))
    assert [(a.severity, a.tensor) for a in report.anomalies] == [
        ("warning", "model.layers.0.indexer.weights_thing.weight")
    ]


def test_bf16_scales_and_other_blocks_are_normal(tmp_path: Path) -> None:
    tensors = {name: t.bfloat16() if name.endswith("_inv") else t for name, t in block_fp8_tensors().items()}
    check_checkpoint(write(tmp_path / "bf16", tensors))
    for name in [name for name in tensors if name.endswith("_inv")]:
        n, k = tensors[name.removesuffix("_scale_inv")].shape
        tensors[name] = torch.ones(-(-n // 64), -(-k // 32))
    check_checkpoint(write(tmp_path / "64x32", tensors, weight_block_size=[64, 32]))


def test_ignored_layers_may_be_float(tmp_path: Path) -> None:
    tensors = block_fp8_tensors()
    float_weight(tensors)
    for key, ignored in (("ignored_layers", [DOWN]), ("modules_to_not_convert", ["lm_head", "model.layers.1.mlp"])):
        check_checkpoint(
            write(tmp_path / key, tensors if key == "ignored_layers" else float_mlp(tensors), **{key: ignored})
        )


def float_mlp(tensors: Tensors) -> Tensors:
    return {
        name: t.bfloat16() if name.startswith("model.layers.1.mlp") else t
        for name, t in tensors.items()
        if not (name.startswith("model.layers.1.mlp") and name.endswith("_inv"))
    }


@pytest.mark.parametrize(
    "quantization",
    [
        {"activation_scheme": "static"},
        {"weight_block_size": None},
        {"scale_fmt": "ue8m0"},
        {"quant_method": "awq"},
        {"fmt": "e5m2"},
        {"weight_block_size": [0, 128]},
        {"weight_block_size": "128"},
        {"ignored_layers": "lm_head"},
        {"ignored_layers": 5},
        {"modules_to_not_convert": True},
        {"ignored_layers": [3]},
    ],
)
def test_unusable_quantization_configs_are_anomalies(tmp_path: Path, quantization: dict[str, Any]) -> None:
    folder = write(tmp_path / "m", block_fp8_tensors(), **quantization)
    report = inspect_checkpoint(folder)
    assert report.config is None
    assert "quantization_config" in str(report.anomalies[0].file)
    with pytest.raises(BlockFp8Error, match=next(iter(quantization))):
        check_checkpoint(folder)


def test_plain_checkpoints_are_described_but_not_served(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", {"model.safetensors": {"model.embed_tokens.weight": torch.ones(2, 2)}})
    assert inspect_checkpoint(folder).anomalies == ()
    with pytest.raises(BlockFp8Error, match="no quantization_config"):
        check_checkpoint(folder)


def test_fp8_without_a_declaration_is_an_anomaly(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", {"model.safetensors": block_fp8_tensors()})
    assert "no quantization_config" in inspect_checkpoint(folder).anomalies[0].what


def test_files_that_vllm_would_load_too_are_refused(tmp_path: Path) -> None:
    """Beside model.safetensors and without an index; the conversions go by model.safetensors alone."""
    folder = write(tmp_path / "m", block_fp8_tensors())
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


def test_a_damaged_file_does_not_hide_other_anomalies(tmp_path: Path) -> None:
    tensors = block_fp8_tensors()
    input_scale(tensors)
    norm = {"model.norm.weight": torch.ones(200)}
    config = {"quantization_config": BLOCK_FP8}
    folder = write_folder(tmp_path / "m", {"a.safetensors": tensors, "b.safetensors": norm}, config)
    (folder / "b.safetensors").write_bytes((folder / "b.safetensors").read_bytes()[:-3])
    whats = [a.what for a in inspect_checkpoint(folder).anomalies]
    assert any("truncated" in what for what in whats)
    assert any("static" in what for what in whats)


def rendered(report: CheckpointReport) -> str:
    console = Console(file=io.StringIO(), width=120, force_terminal=False)
    render(report, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_rendering_shows_what_matters(tmp_path: Path) -> None:
    tensors = block_fp8_tensors()
    wrong_scale_shape(tensors)
    text = rendered(inspect_checkpoint(write(tmp_path / "m", tensors)))
    for part in ("14 linear layers", "128x128", "error: block scales do not fit", f"{DOWN}.weight_scale_inv", "[3, 2]"):
        assert part in text
    assert "no anomalies" in rendered(inspect_checkpoint(write(tmp_path / "good", block_fp8_tensors())))


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


def test_inspecting_eight_billion_weights_is_instant(tmp_path: Path) -> None:
    """Qwen3-8B-FP8's real shapes in sparse files; a process of its own, so that imports count."""
    weights = linear_weights(36, 4096, 12288, 1024)
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {"lm_head.weight": ("BF16", (151936, 4096))}
    tensors["model.embed_tokens.weight"] = ("BF16", (151936, 4096))
    for name, (n, k) in weights.items():
        tensors |= {name: ("F8_E4M3", (n, k)), f"{name}_scale_inv": ("BF16", scale_shape(n, k))}
    size = write_sparse(tmp_path / "model.safetensors", tensors)
    assert size > 9e9
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": BLOCK_FP8, "num_hidden_layers": 36}))
    code = (
        "import re, sys, time; start = time.perf_counter()\n"
        "from qwen3_fp8_ascend.checkpoints.inspect import check_checkpoint\n"
        "report = check_checkpoint(sys.argv[1])\n"
        "assert report.block_fp8_layers == 252, report\n"
        "assert not {'torch', 'vllm', 'numpy', 'transformers'} & set(sys.modules), 'heavy imports'\n"
        "seconds = time.perf_counter() - start\n"
        "peak = int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
        "print(seconds, peak / 1024)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seconds, megabytes = map(float, done.stdout.split())
    print(f"inspect of {size / 1e9:.1f} GB: {seconds:.3f} s, {megabytes:.0f} MiB")
    assert seconds < 1
    assert megabytes < 300


@pytest.mark.parametrize(
    ("layers", "experts", "files"), [(61, 256, 163), (48, 128, 1)], ids=["DeepSeek-V3", "Qwen3-30B-A3B in one file"]
)
def test_the_bounds_leave_room_for_the_largest_models(tmp_path: Path, layers: int, experts: int, files: int) -> None:
    """Their numbers of tensors and files, in sparse files of the right order of size."""
    names = [
        f"model.layers.{layer}.mlp.experts.{expert}.{projection}_proj.weight"
        for layer in range(layers)
        for expert in range(experts)
        for projection in ("gate", "up", "down")
    ]
    weight_map = {}
    for number in range(files):
        file = f"model-{number + 1:05}-of-{files:06}.safetensors" if files > 1 else "model.safetensors"
        tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
        for name in names[number::files]:
            tensors |= {name: ("F8_E4M3", (768, 2048)), f"{name}_scale_inv": ("F32", scale_shape(768, 2048))}
        write_sparse(tmp_path / file, tensors)
        weight_map |= dict.fromkeys(tensors, file)
    if files > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": BLOCK_FP8, "num_hidden_layers": layers}))
    started = time.process_time()
    report = check_checkpoint(tmp_path)
    print(f"{report.tensors} tensors in {report.files} files: {time.process_time() - started:.2f} s")
    assert report.block_fp8_layers == len(names)
    assert report.anomalies == ()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.0.self_attn.q_proj.weight", True),
        ("layers.11.mlp.gate_proj.weight", True),
        ("model.language_model.layers.3.mlp.down_proj.weight", True),
        ("model.layers.0.mlp.experts.7.up_proj.weight", True),
        ("model.layers.0.mlp.shared_expert.up_proj.weight", True),
        ("model.layers.0.self_attn.kv_a_proj_with_mqa.weight", True),
        ("conversation.layers.0.mlp.up_proj.weight", True),
        ("model.layers.0.mlp.gate.weight", False),
        ("model.layers.0.block_sparse_moe.router.weight", False),
        ("model.layers.0.mlp.shared_expert_gate.weight", False),
        ("model.layers.0.input_layernorm.weight", False),
        ("model.layers.0.self_attn.q_proj.bias", False),
        ("model.layers.0.self_attn.q_proj.weight_scale_inv", False),
        ("model.embed_tokens.weight", False),
        ("model.layers.0.embed.weight", False),
        ("lm_head.weight", False),
        ("visual.blocks.0.attn.qkv.weight", False),
        ("vision_tower.encoder.layers.0.self_attn.q_proj.weight", False),
        ("audio_tower.layers.0.fc1.weight", False),
    ],
)
def test_which_weights_are_decoder_linears(name: str, expected: bool) -> None:
    assert is_decoder_linear(name, (8, 8)) is expected
    assert not is_decoder_linear(name, (8,))
    assert not is_decoder_linear(name, (8, 8, 8))


def test_ignore_lists_match_whole_path_components() -> None:
    module = "model.layers.1.self_attn.q_proj"
    assert all(is_ignored(module, {name}) for name in (module, "model.layers.1", "q_proj", "self_attn.q_proj"))
    assert not any(is_ignored(module, {name}) for name in ("", "proj", "model.layers.11", "attn.q_proj", f"{module}.x"))
    assert layer_index("model.layers.12.mlp.up_proj") == 12


JSON = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-3, 300), st.floats(), st.sampled_from(["fp8", "e4m3", "dynamic", ""])
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=2)),
    max_leaves=5,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from([*BLOCK_FP8, "scale_fmt", "ignored_layers"]), JSON), JSON, JSON)
def test_any_config_is_described_or_refused(
    tmp_path: Path, changes: dict[str, Any], text_config: Any, layers: Any
) -> None:
    config = {"quantization_config": BLOCK_FP8 | changes, "text_config": text_config, "num_hidden_layers": layers}
    folder = write_folder(tmp_path / "m", {"model.safetensors": {"a.weight": torch.zeros(2, 2).to(E4M3)}}, config)
    render(inspect_checkpoint(folder), Console(file=io.StringIO()))
