"""Back from block FP8: against the specification, compressed-tensors and transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qwen3_fp8_ascend import reference
from qwen3_fp8_ascend.checkpoints import tiles
from qwen3_fp8_ascend.checkpoints.dequantize import dequantize_checkpoint
from qwen3_fp8_ascend.checkpoints.inspect import inspect_checkpoint
from qwen3_fp8_ascend.checkpoints.quantize import quantize_checkpoint, quantize_weight
from qwen3_fp8_ascend.checkpoints.tiles import TILE_ELEMENTS
from qwen3_fp8_ascend.checkpoints.weight_file import read_header
from qwen3_fp8_ascend.errors import BlockFp8Error
from qwen3_fp8_ascend.format import BlockGrid, BlockSize, scale_shape
from tests.support.checkpoint_folders import (  # noqa: F401
    BLOCK_FP8,
    digests,
    in_files,
    one_thread,
    random_model,
    raw_file,
    write_folder,
)

E4M3 = torch.float8_e4m3fn
NAME = "model.layers.0.mlp.up_proj.weight"


def load(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def by_compressed_tensors(weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    module = pytest.importorskip("compressed_tensors.entrypoints.convert", reason="compressed-tensors is not installed")
    converter = module.FP8BlockDequantizer(targets=["re:.*"], dtype=dtype)
    done: dict[str, torch.Tensor] = converter.process({"m.weight": weight, "m.weight_scale_inv": scale})
    return done["m.weight"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("count", [1, 3])
def test_round_trip(tmp_path: Path, dtype: torch.dtype, count: int) -> None:
    model = random_model()
    files = in_files(model, count) if count > 1 else {"model.safetensors": model}
    config = {"torch_dtype": "float64", "text_config": {"dtype": 1}, "num_hidden_layers": 3}
    source = write_folder(tmp_path / "source", files, config)
    quantize_checkpoint(source, tmp_path / "fp8", progress=False)
    summary = dequantize_checkpoint(tmp_path / "fp8", tmp_path / "back", dtype=dtype, progress=False)
    assert summary.converted == 21
    back = load(tmp_path / "back")
    assert back.keys() == model.keys()
    for name, tensor in model.items():
        if name.endswith("_proj.weight"):
            codes, scale = quantize_weight(tensor)
            assert torch.equal(back[name], reference.dequantize_weight(codes, scale, dtype=dtype))
        else:
            assert torch.equal(back[name], tensor)
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert "quantization_config" not in written
    assert written["torch_dtype"] == str(dtype).removeprefix("torch.")
    report = inspect_checkpoint(tmp_path / "back")
    assert report.anomalies == ()
    assert report.block_fp8_layers == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_agrees_with_compressed_tensors(tmp_path: Path, dtype: torch.dtype) -> None:
    """An implementation that nobody here wrote, on every weight of a ragged model."""
    source = write_folder(tmp_path / "source", {"model.safetensors": random_model()})
    quantize_checkpoint(source, tmp_path / "fp8", progress=False)
    dequantize_checkpoint(tmp_path / "fp8", tmp_path / "back", dtype=dtype, progress=False)
    quantized, back = load(tmp_path / "fp8"), load(tmp_path / "back")
    checked = 0
    for name, codes in quantized.items():
        if codes.dtype == E4M3:
            assert torch.equal(back[name], by_compressed_tensors(codes, quantized[f"{name}_scale_inv"], dtype)), name
            checked += 1
    assert checked == 21


def test_agrees_with_transformers() -> None:
    """transformers derives the block from the shapes, so it can judge whole blocks only."""
    module = pytest.importorskip("transformers.integrations.finegrained_fp8", reason="transformers is not installed")
    codes, scale = quantize_weight(torch.randn(384, 256, generator=torch.Generator().manual_seed(0)))
    judged = module.Fp8Dequantize(None)._dequantize_one(codes, scale, torch.bfloat16)
    assert torch.equal(reference.dequantize_weight(codes, scale), judged)


def test_scales_in_another_file_and_in_bf16(tmp_path: Path) -> None:
    codes, scale = quantize_weight(torch.randn(200, 300, generator=torch.Generator().manual_seed(0)))
    scale = scale.bfloat16()
    files = {
        "model-00001-of-00002.safetensors": {NAME: codes},
        "model-00002-of-00002.safetensors": {f"{NAME}_scale_inv": scale},
    }
    source = write_folder(tmp_path / "fp8", files, {"quantization_config": BLOCK_FP8})
    dequantize_checkpoint(source, tmp_path / "back", progress=False)
    assert torch.equal(load(tmp_path / "back")[NAME], reference.dequantize_weight(codes, scale))
    assert len(list((tmp_path / "back").glob("*.safetensors"))) == 1, "a file of scales only leaves nothing"


def test_text_config_holds_the_declaration(tmp_path: Path) -> None:
    codes, scale = quantize_weight(torch.ones(4, 4))
    config = {"text_config": {"quantization_config": BLOCK_FP8, "x": 1}}
    source = write_folder(tmp_path / "fp8", {"model.safetensors": {NAME: codes, f"{NAME}_scale_inv": scale}}, config)
    dequantize_checkpoint(source, tmp_path / "back", progress=False)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["text_config"] == {"x": 1}


def test_every_finite_code_and_larger_than_a_chunk(tmp_path: Path) -> None:
    k = 3000
    n = 2 * (TILE_ELEMENTS // k) + 77
    codes = torch.randint(0, 256, (n, k), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    codes = torch.where((codes & 0x7F) == 0x7F, codes ^ 1, codes).view(E4M3)
    scale = torch.rand(scale_shape(n, k), generator=torch.Generator().manual_seed(1))
    tensors = {NAME: codes, f"{NAME}_scale_inv": scale}
    source = write_folder(tmp_path / "fp8", {"model.safetensors": tensors}, {"quantization_config": BLOCK_FP8})
    dequantize_checkpoint(source, tmp_path / "back", progress=False)
    assert torch.equal(load(tmp_path / "back")[NAME], by_compressed_tensors(codes, scale, torch.bfloat16))


@pytest.mark.parametrize("block", [(1, 1 << 20), (1 << 20, 1), (1 << 20, 1 << 20), (1, 1), (128, 128), (3, 5)])
@pytest.mark.parametrize("shape", [(700, 9), (9, 700), (1, 3000), (3000, 1)])
def test_any_block_and_any_tile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: tuple[int, int], shape: tuple[int, int]
) -> None:
    monkeypatch.setattr(tiles, "TILE_ELEMENTS", 256)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 0x7F, shape, generator=generator, dtype=torch.uint8).view(E4M3)
    scale = torch.rand(scale_shape(*shape, BlockSize(*block)), generator=generator)
    config = {"quantization_config": BLOCK_FP8 | {"weight_block_size": list(block)}}
    source = write_folder(tmp_path / "fp8", {"model.safetensors": {NAME: codes, f"{NAME}_scale_inv": scale}}, config)
    dequantize_checkpoint(source, tmp_path / "back", progress=False)
    small = BlockSize(min(block[0], shape[0]), min(block[1], shape[1]))  # the same blocks, without their empty parts
    grid = BlockGrid((shape[0],), shape[1], small)
    assert torch.equal(load(tmp_path / "back")[NAME], reference.dequantize_weight(codes, scale, grid))


@pytest.mark.parametrize("shape", [(1 << 50, 0), (0, 1 << 50), (0, 0)])
def test_weights_without_elements_take_no_time(tmp_path: Path, shape: tuple[int, int]) -> None:
    scale = scale_shape(*shape)
    source = write_folder(tmp_path / "fp8", {}, {"quantization_config": BLOCK_FP8})
    entries = {
        NAME: {"dtype": "F8_E4M3", "shape": shape, "data_offsets": [0, 0]},
        f"{NAME}_scale_inv": {"dtype": "F32", "shape": scale, "data_offsets": [0, 0]},
    }
    (source / "model.safetensors").write_bytes(raw_file(entries, 0))
    dequantize_checkpoint(source, tmp_path / "back", progress=False)
    (tensor,) = read_header(tmp_path / "back" / "model.safetensors").tensors
    assert (tensor.dtype, tensor.shape) == ("BF16", shape)


def nan_code(codes: torch.Tensor, scale: torch.Tensor) -> None:
    codes.view(torch.uint8)[1, 1] = 0x7F
    codes.view(torch.uint8)[150, 299] = 0xFF


def nan_scale(codes: torch.Tensor, scale: torch.Tensor) -> None:
    scale[1, 2] = float("nan")


def infinite_scale(codes: torch.Tensor, scale: torch.Tensor) -> None:
    scale[1, 2] = float("inf")


def negative_scale(codes: torch.Tensor, scale: torch.Tensor) -> None:
    scale[1, 2] = -1


def large_scale(codes: torch.Tensor, scale: torch.Tensor) -> None:
    scale[0, 0] = 1e30


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (nan_code, "2 NaN of 60000"),
        (nan_scale, "1 of 6 bad"),
        (infinite_scale, "1 of 6 bad"),
        (negative_scale, "1 of 6 bad"),
        (large_scale, "beyond the range of F16"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_damaged_weights_are_named(tmp_path: Path, damage: Any, words: str) -> None:
    codes, scale = quantize_weight(torch.randn(200, 300, generator=torch.Generator().manual_seed(0)))
    damage(codes, scale)
    tensors = {NAME: codes, f"{NAME}_scale_inv": scale}
    source = write_folder(tmp_path / "fp8", {"model.safetensors": tensors}, {"quantization_config": BLOCK_FP8})
    with pytest.raises(BlockFp8Error, match=words) as caught:
        dequantize_checkpoint(source, tmp_path / "back", dtype=torch.float16, progress=False)
    assert NAME in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fp8"]


def test_what_cannot_be_dequantized(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", {"model.safetensors": random_model(1)})
    with pytest.raises(BlockFp8Error, match="not a block-FP8 checkpoint"):
        dequantize_checkpoint(source, tmp_path / "back", progress=False)
    with pytest.raises(BlockFp8Error, match="floating-point dtype"):
        dequantize_checkpoint(source, tmp_path / "back", dtype=torch.int8, progress=False)
    codes, _ = quantize_weight(torch.ones(4, 4))
    bad = write_folder(tmp_path / "bad", {"model.safetensors": {NAME: codes}}, {"quantization_config": BLOCK_FP8})
    with pytest.raises(BlockFp8Error, match="no block scales"):
        dequantize_checkpoint(bad, tmp_path / "back", progress=False)


def test_it_resumes_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qwen3_fp8_ascend.checkpoints import output

    source = write_folder(tmp_path / "source", in_files(random_model(1), 3))
    quantize_checkpoint(source, tmp_path / "fp8", progress=False)
    dequantize_checkpoint(tmp_path / "fp8", tmp_path / "whole", progress=False)
    original, calls = output.UnfinishedOutput.write, 0

    def write(self: Any, file: str, produce: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        original(self, file, produce)

    with monkeypatch.context() as patch:
        patch.setattr(output.UnfinishedOutput, "write", write)
        with pytest.raises(KeyboardInterrupt):
            dequantize_checkpoint(tmp_path / "fp8", tmp_path / "back", progress=False)
    with pytest.raises(BlockFp8Error, match="settings"):
        dequantize_checkpoint(tmp_path / "fp8", tmp_path / "back", dtype=torch.float32, progress=False)
    assert dequantize_checkpoint(tmp_path / "fp8", tmp_path / "back", progress=False).reused == 2
    assert digests(tmp_path / "back") == digests(tmp_path / "whole")
