"""Checkpoints in compressed-tensors' and ModelOpt's containers: read, written, dequantized, as their own code does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen3_fp8_ascend.checkpoints.dequantize import dequantize_checkpoint
from qwen3_fp8_ascend.checkpoints.inspect import check_checkpoint, inspect_checkpoint
from qwen3_fp8_ascend.checkpoints.quantize import quantize_checkpoint
from qwen3_fp8_ascend.errors import BlockFp8Error
from qwen3_fp8_ascend.testing.models import write_qwen3
from tests.support.checkpoint_folders import in_files, one_thread, random_model, write_folder  # noqa: F401
from tests.test_containers import LLM_COMPRESSOR, MODELOPT_CONFIG, MODELOPT_FILE

Tensors = dict[str, torch.Tensor]


def load(folder: Path) -> Tensors:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def edit(folder: Path, **changes: Any) -> None:
    """Change config.json; None takes a key out."""
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


@pytest.fixture
def quantized(tmp_path: Path) -> dict[str, Path]:
    """A ragged model in both containers that are written."""
    source = write_folder(tmp_path / "source", in_files(random_model(), 2), {"num_hidden_layers": 3})
    for container in ("fp8", "compressed-tensors"):
        quantize_checkpoint(source, tmp_path / container, container=container, progress=False)
    return {container: tmp_path / container for container in ("fp8", "compressed-tensors")}


def test_what_is_written_differs_in_names_only(quantized: dict[str, Path], tmp_path: Path) -> None:
    fp8, theirs = load(quantized["fp8"]), load(quantized["compressed-tensors"])
    assert {name.removesuffix("_inv") for name in fp8} == set(theirs)
    assert len(fp8) == len(theirs)
    for name, tensor in fp8.items():
        other = theirs[name.removesuffix("_inv")]
        assert tensor.dtype == other.dtype and torch.equal(tensor.view(torch.uint8), other.view(torch.uint8))
    reports = [check_checkpoint(folder) for folder in quantized.values()]
    assert reports[0].anomalies == reports[1].anomalies == ()
    assert reports[0].plan is not None and reports[1].plan is not None
    assert reports[0].plan.kinds() == reports[1].plan.kinds()
    for container, folder in quantized.items():
        dequantize_checkpoint(folder, tmp_path / f"{container}-back", progress=False)
    back, other_back = load(tmp_path / "fp8-back"), load(tmp_path / "compressed-tensors-back")
    assert all(torch.equal(tensor, other_back[name]) for name, tensor in back.items())


def test_unknown_containers_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(BlockFp8Error, match="unknown container"):
        quantize_checkpoint(tmp_path, tmp_path / "out", container="modelopt")


WHOLE = {"hidden": 256, "inner": 384, "kv": 128}
"""Whole blocks, since compressed-tensors' own dequantizer takes no others."""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_compressed_tensors_reads_what_is_written(tmp_path: Path, dtype: torch.dtype) -> None:
    """Its dequantizer, on our files with our config.json: names, list and blocks mean to it what we mean."""
    converters = pytest.importorskip(
        "compressed_tensors.entrypoints.convert.converters", reason="compressed-tensors is not installed"
    )
    model = {name: t for name, t in random_model(**WHOLE).items() if not name.endswith(".bias")}  # which it refuses
    source = write_folder(tmp_path / "source", {"model.safetensors": model}, {"num_hidden_layers": 3})
    quantize_checkpoint(source, tmp_path / "ct", container="compressed-tensors", progress=False)
    dequantize_checkpoint(tmp_path / "ct", tmp_path / "back", dtype=dtype, progress=False)
    not_linear = ("re:.*embed_tokens$",)  # it sees tensors and no classes of modules
    converter = converters.CompressedTensorsDequantizer(str(tmp_path / "ct"), not_linear, dtype)
    tensors = load(tmp_path / "ct")
    converter.validate(tensors)
    theirs, ours = converter.process(tensors), load(tmp_path / "back")
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], tensor) for name, tensor in ours.items())


def compress(weight: torch.Tensor, scale_dtype: torch.dtype) -> Tensors:
    """An FP8_BLOCK weight by compressed-tensors' own compressor, as llm-compressor saves it."""
    compressors = pytest.importorskip("compressed_tensors.compressors", reason="compressed-tensors is not installed")
    from compressed_tensors.quantization import preset_name_to_scheme

    scheme = preset_name_to_scheme("FP8_BLOCK", ["Linear"])
    n, k = weight.shape
    blocks = weight.float().reshape(n // 128, 128, k // 128, 128)
    scale = (blocks.abs().amax(dim=(1, 3)) / 448).to(scale_dtype)
    compressor = compressors.BaseCompressor.get_value_from_registry("float-quantized")
    made: Tensors = compressor.compress({"weight": weight.to(scale_dtype), "weight_scale": scale}, scheme)
    return made


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float32])
def test_what_compressed_tensors_writes_is_read(tmp_path: Path, scale_dtype: torch.dtype) -> None:
    """Codes and scales from its compressor, with the config that llm-compressor writes."""
    model = random_model(**WHOLE)
    stored: Tensors = {}
    expected: Tensors = {}
    for name, tensor in model.items():
        if not name.endswith("_proj.weight"):
            stored[name] = tensor
            continue
        made = compress(tensor, scale_dtype)
        stored |= {name: made["weight"], f"{name}_scale": made["weight_scale"]}
        grown = made["weight_scale"].float().repeat_interleave(128, 0).repeat_interleave(128, 1)
        expected[name] = (made["weight"].float() * grown).bfloat16()
    folder = write_folder(
        tmp_path / "ct",
        {"model.safetensors": stored},
        {"num_hidden_layers": 3, "quantization_config": LLM_COMPRESSOR | {"ignore": ["lm_head"]}},
    )
    report = check_checkpoint(folder)
    assert report.anomalies == ()
    assert report.block_fp8_layers == 21
    dequantize_checkpoint(folder, tmp_path / "back", progress=False)
    back = load(tmp_path / "back")
    assert all(torch.equal(back[name], tensor) for name, tensor in expected.items())
    assert "quantization_config" not in json.loads((tmp_path / "back" / "config.json").read_text())


@pytest.mark.parametrize("place", ["config.json", "hf_quant_config.json"])
def test_modelopts_files(tmp_path: Path, place: str) -> None:
    """Scales of (rows, 1, columns, 1), and a config of its own as ModelOpt up to 0.29 has it."""
    source = write_folder(tmp_path / "source", {"model.safetensors": random_model()}, {"num_hidden_layers": 3})
    quantize_checkpoint(source, tmp_path / "m", container="compressed-tensors", progress=False)
    dequantize_checkpoint(tmp_path / "m", tmp_path / "expected", progress=False)
    file = tmp_path / "m" / "model.safetensors"
    tensors = {
        name: t[:, None, :, None].contiguous() if name.endswith("_scale") else t for name, t in load_file(file).items()
    }
    save_file(tensors, file, {"format": "pt"})
    edit(tmp_path / "m", quantization_config=MODELOPT_CONFIG if place == "config.json" else None)
    if place == "hf_quant_config.json":
        (tmp_path / "m" / place).write_text(json.dumps(MODELOPT_FILE))
    assert check_checkpoint(tmp_path / "m").anomalies == ()
    dequantize_checkpoint(tmp_path / "m", tmp_path / "back", progress=False)
    back, expected = load(tmp_path / "back"), load(tmp_path / "expected")
    assert all(torch.equal(back[name], tensor) for name, tensor in expected.items())
    assert not (tmp_path / "back" / "hf_quant_config.json").exists()
    with pytest.raises(BlockFp8Error, match="already quantized"):
        quantize_checkpoint(tmp_path / "m", tmp_path / "again", progress=False)


def test_scales_of_the_other_container_are_named(quantized: dict[str, Path]) -> None:
    """A config of one container with the tensors of another."""
    config = json.loads((quantized["fp8"] / "config.json").read_text())["quantization_config"]
    edit(quantized["compressed-tensors"], quantization_config=config)
    whats = {a.what for a in inspect_checkpoint(quantized["compressed-tensors"]).errors}
    assert "an FP8 weight has no block scales" in whats
    assert any("static or per-tensor scheme" in what for what in whats)


def test_scales_of_a_cache_are_a_note(tmp_path: Path) -> None:
    source = write_qwen3(tmp_path / "source")
    quantize_checkpoint(source, tmp_path / "m", progress=False)
    file = tmp_path / "m" / "model.safetensors"
    attention = "model.layers.0.self_attn"
    names = ("k_scale", "v_scale", "attn.k_scale", "k_proj.k_scale", "v_proj.v_scale", "kv_scale", "k_zero_point")
    scales = {f"{attention}.{name}": torch.ones(1) for name in names}
    save_file(load_file(file) | scales, file, {"format": "pt"})
    report = check_checkpoint(tmp_path / "m")
    (note,) = report.anomalies
    assert (note.severity, note.got, report.errors, report.warnings) == ("note", "7 tensors", (), ())
    assert "KV cache" in note.what and report.notes == (note,)
    dequantize_checkpoint(tmp_path / "m", tmp_path / "back", progress=False)
    assert load(tmp_path / "back").keys() == load(source).keys()
