"""A checkpoint is described from its headers, refused if it cannot be served; looking costs next to nothing."""

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

from qwen3_fp8_ascend.checkpoints.inspect import check_checkpoint, inspect_checkpoint
from qwen3_fp8_ascend.checkpoints.render import render
from qwen3_fp8_ascend.errors import BlockFp8Error
from qwen3_fp8_ascend.format import scale_shape
from tests.support.checkpoint_folders import (  # noqa: F401
    BLOCK_FP8,
    block_fp8_tensors,
    linear_weights,
    one_thread,
    write_block_fp8,
    write_folder,
    write_sparse,
)
from tests.support.own_time import at_pace

E4M3 = torch.float8_e4m3fn


def test_a_good_checkpoint_has_no_anomalies(tmp_path: Path) -> None:
    report = check_checkpoint(write_block_fp8(tmp_path / "m", block_fp8_tensors()))
    assert report.anomalies == ()
    assert report.block_fp8_layers == 14
    assert report.architecture == "Qwen3ForCausalLM"
    weights = linear_weights(2, 200, 300, 72).values()
    assert report.bytes_by_kind["block FP8 weights"] == sum(n * k for n, k in weights)
    assert report.bytes_by_kind["block scales"] == sum(4 * torch.Size(scale_shape(n, k)).numel() for n, k in weights)
    assert sum(report.tensors_by_kind.values()) == report.tensors == len(block_fp8_tensors())
    assert json.loads(json.dumps(report.to_dict()))["block_fp8_layers"] == 14


@pytest.mark.parametrize(
    "quantization",
    [
        {"activation_scheme": "static"},
        {"weight_block_size": None},
        {"scale_fmt": "ue4m3"},
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
    folder = write_block_fp8(tmp_path / "m", block_fp8_tensors(), **quantization)
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


def test_a_damaged_file_does_not_hide_other_anomalies(tmp_path: Path) -> None:
    tensors = block_fp8_tensors()
    tensors["model.layers.1.mlp.down_proj.input_scale"] = torch.ones(1)
    norm = {"model.norm.weight": torch.ones(200)}
    config = {"quantization_config": BLOCK_FP8}
    folder = write_folder(tmp_path / "m", {"a.safetensors": tensors, "b.safetensors": norm}, config)
    (folder / "b.safetensors").write_bytes((folder / "b.safetensors").read_bytes()[:-3])
    whats = [a.what for a in inspect_checkpoint(folder).anomalies]
    assert any("truncated" in what for what in whats)
    assert any("static" in what for what in whats)


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
        "import re, sys, time; start = time.process_time()\n"
        "from qwen3_fp8_ascend.checkpoints.inspect import check_checkpoint\n"
        "report = check_checkpoint(sys.argv[1])\n"
        "assert report.block_fp8_layers == 252, report\n"
        "assert not {'torch', 'vllm', 'transformers'} & set(sys.modules), 'heavy imports'\n"
        "seconds = time.process_time() - start\n"
        "peak = int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
        "print(seconds, peak / 1024)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seconds, megabytes = map(float, done.stdout.split())
    print(f"inspect of {size / 1e9:.1f} GB: {seconds:.3f} s, {megabytes:.0f} MiB")
    assert at_pace(seconds, 1) <= 1
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
            n, k = (2048, 768) if "down" in name else (768, 2048)
            tensors |= {name: ("F8_E4M3", (n, k)), f"{name}_scale_inv": ("F32", scale_shape(n, k))}
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
    assert report.experts is not None
    assert (report.experts.layers, report.experts.experts) == (layers, experts)
    assert report.experts.whole_block_ranks == (1, 2, 3, 6)
    assert report.anomalies == ()


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
