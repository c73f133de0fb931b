"""Quantized checkpoints: the numbers against outside judges, and what is written around them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from qwen3_fp8_ascend.checkpoints import tiles
from qwen3_fp8_ascend.checkpoints.folder import INDEX
from qwen3_fp8_ascend.checkpoints.inspect import check_checkpoint
from qwen3_fp8_ascend.checkpoints.quantize import quantize_checkpoint, quantize_weight
from qwen3_fp8_ascend.checkpoints.tiles import TILE_ELEMENTS
from qwen3_fp8_ascend.checkpoints.weight_file import read_header
from qwen3_fp8_ascend.errors import BlockFp8Error
from qwen3_fp8_ascend.format import BlockSize, scale_shape
from tests.support.checkpoint_folders import (  # noqa: F401
    BLOCK_FP8,
    digests,
    in_files,
    one_thread,
    random_model,
    raw_file,
    write_folder,
)

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def judge(weight: torch.Tensor, block: BlockSize) -> tuple[np.ndarray, np.ndarray]:
    """The specification once more, block by block, in numpy and with ml_dtypes' encoder."""
    w = weight.float().numpy()
    n, k = w.shape
    scale = np.ones(scale_shape(n, k, block), np.float32)
    codes = np.zeros((n, k), np.uint8)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            where = np.s_[i * block.n : (i + 1) * block.n, j * block.k : (j + 1) * block.k]
            amax = np.abs(w[where]).max()
            if amax / np.float32(448) > 0:
                scale[i, j] = amax / np.float32(448)
            scaled = np.clip(w[where] / scale[i, j], -448, 448)
            codes[where] = scaled.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    return codes, scale


@st.composite
def weights(draw: st.DrawFn) -> tuple[torch.Tensor, BlockSize]:
    n, k = draw(st.integers(1, 300)), draw(st.integers(1, 300))
    block = draw(st.sampled_from([BlockSize(), BlockSize(), BlockSize(64, 32), BlockSize(1, 7), BlockSize(512, 512)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 31)))
    exponent = draw(st.sampled_from([-149, -140, -130, -20, 0, 0, 4, 100]))
    weight = torch.randn(n, k, generator=generator, dtype=torch.float64) * 2.0**exponent
    if draw(st.booleans()):
        weight[: min(n, block.n), : min(k, block.k)] = 0
    for _ in range(draw(st.integers(0, 4))):
        row, column = draw(st.integers(0, n - 1)), draw(st.integers(0, k - 1))
        weight[row, column] = draw(st.sampled_from([0.0, -0.0, 448.0, -65504.0, 2.0**-24, 2.0**-126]))
    dtype = draw(st.sampled_from(DTYPES))
    weight = weight.clamp(-65504, 65504) if dtype == torch.float16 else weight
    return weight.to(dtype), block


@settings(max_examples=150, deadline=None)
@given(weights())
def test_quantize_weight_is_the_specification(problem: tuple[torch.Tensor, BlockSize]) -> None:
    weight, block = problem
    codes, scale = quantize_weight(weight, block)
    want_codes, want_scale = judge(weight, block)
    assert np.array_equal(scale.numpy().view(np.uint32), want_scale.view(np.uint32))
    assert np.array_equal(codes.view(torch.uint8).numpy(), want_codes)
    assert not ((codes.view(torch.uint8) & 0x7F) == 0x7F).any()


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_quantize_weight_of_nothing(shape: tuple[int, int]) -> None:
    codes, scale = quantize_weight(torch.empty(shape))
    assert codes.shape == shape
    assert scale.shape == scale_shape(*shape)


def test_quantization_error_is_that_of_e4m3() -> None:
    weight = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    codes, scale = quantize_weight(weight)
    back = codes.double() * scale.double().repeat_interleave(128, 0).repeat_interleave(128, 1)
    error = ((back - weight.double()).norm() / weight.double().norm()).item()
    assert 0.020 < error < 0.030  # three mantissa bits: uniform rounding within a binade gives 0.026


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 3])
def test_checkpoint_holds_what_quantize_weight_gives(tmp_path: Path, dtype: torch.dtype, count: int) -> None:
    model = random_model(dtype=dtype)
    files = in_files(model, count) if count > 1 else {"model.safetensors": model}
    source = write_folder(tmp_path / "source", files, {"tie_word_embeddings": False, "num_hidden_layers": 3})
    summary = quantize_checkpoint(source, tmp_path / "fp8", progress=False)
    assert (summary.converted, summary.reused) == (21, 0)
    out = {}
    for file in files:
        written = load_file(tmp_path / "fp8" / file)
        out |= written
        assert {name.removesuffix("_scale_inv") for name in written} == set(files[file]), "files keep their tensors"
    for name, tensor in model.items():
        if f"{name}_scale_inv" in out:
            codes, scale = quantize_weight(tensor)
            assert torch.equal(out[name].view(torch.uint8), codes.view(torch.uint8))
            assert torch.equal(out[f"{name}_scale_inv"], scale)
            assert out[name].dtype == torch.float8_e4m3fn
        else:
            assert torch.equal(out[name], tensor), name
            assert out[name].dtype == tensor.dtype
    report = check_checkpoint(tmp_path / "fp8")
    assert report.block_fp8_layers == 21
    assert report.anomalies == ()
    index = tmp_path / "fp8" / INDEX
    assert index.exists() == (count > 1)
    if count > 1:
        content = json.loads(index.read_text())
        assert content["weight_map"].keys() == out.keys()
        assert content["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in out.values())


def test_weights_larger_than_a_chunk(tmp_path: Path) -> None:
    """Streaming must not show: pieces are whole blocks, in rows and in columns."""
    k = 20_000
    n = 2 * (TILE_ELEMENTS // k) + 257
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(1)).bfloat16()
    name = "model.layers.0.mlp.up_proj.weight"
    source = write_folder(tmp_path / "source", {"model.safetensors": {name: weight}})
    quantize_checkpoint(source, tmp_path / "fp8", progress=False)
    out = load_file(tmp_path / "fp8" / "model.safetensors")
    codes, scale = quantize_weight(weight)
    assert torch.equal(out[name].view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(out[f"{name}_scale_inv"], scale)


def test_config_and_other_files_are_carried_over(tmp_path: Path) -> None:
    config = {"model_type": "qwen3", "torch_dtype": "bfloat16", "名": "模型", "quantization_config": None}
    source = write_folder(tmp_path / "source", {"model.safetensors": random_model(1)}, config)
    carried = {
        "tokenizer.json": "{}",
        "generation_config.json": "{}",
        "chat_template.jinja": "{{ x }}",
        "LICENSE": "free",
    }
    carried |= {"README.md": "# 你好", "modeling_own.py": "pass", "additional_chat_templates/tool.jinja": "t"}
    left = [
        "pytorch_model.bin",
        "model.gguf",
        "onnx/model.onnx",
        ".git/config",
        ".cache/x",
        "pytorch_model.bin.index.json",
    ]
    for name in (*carried, *left):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(carried.get(name, "old weights"))
    quantize_checkpoint(source, tmp_path / "fp8", progress=False)
    names = set(digests(tmp_path / "fp8"))
    assert names == {*carried, "config.json", "model.safetensors"}
    for name, text in carried.items():
        assert (tmp_path / "fp8" / name).read_text() == text
    written = json.loads((tmp_path / "fp8" / "config.json").read_text())
    assert written.pop("quantization_config") == BLOCK_FP8
    config.pop("quantization_config")
    assert written == config


def test_what_is_not_a_decoder_linear_stays_and_is_listed(tmp_path: Path) -> None:
    linear = torch.randn(64, 64)
    stays = {
        "lm_head.weight": "lm_head",
        "model.layers.0.mlp.gate.weight": "model.layers.0.mlp.gate",
        "visual.blocks.0.attn.qkv.weight": "visual.blocks.0.attn.qkv",
        "score.weight": "score",
    }
    unlisted = ["model.embed_tokens.weight", "model.norm.weight", "model.layers.0.conv.weight"]
    expert = [f"model.layers.0.mlp.experts.0.{name}_proj.weight" for name in ("gate", "up", "down")]
    becomes = ["model.layers.0.self_attn.q_proj.weight", *expert]
    tensors = {name: linear.clone() for name in (*stays, *unlisted, *becomes)}
    source = write_folder(tmp_path / "source", {"model.safetensors": tensors})
    quantize_checkpoint(source, tmp_path / "fp8", progress=False)
    out = load_file(tmp_path / "fp8" / "model.safetensors")
    assert {name for name, t in out.items() if t.dtype == torch.float8_e4m3fn} == set(becomes)
    config = json.loads((tmp_path / "fp8" / "config.json").read_text())["quantization_config"]
    assert config["modules_to_not_convert"] == sorted(stays.values())
    check_checkpoint(tmp_path / "fp8")


def test_ignored_modules_stay_and_are_listed(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", {"model.safetensors": random_model(3)})
    quantize_checkpoint(source, tmp_path / "fp8", ignore=["model.layers.0.*", "*.down_proj"], progress=False)
    report = check_checkpoint(tmp_path / "fp8")
    assert report.block_fp8_layers == 12
    assert report.config is not None
    assert set(report.config.ignored) == {
        "lm_head",
        *(f"model.layers.{i}.mlp.down_proj" for i in range(3)),
        *(f"model.layers.0.self_attn.{p}_proj" for p in "qkvo"),
        *(f"model.layers.0.mlp.{p}_proj" for p in ("gate", "up")),
    }


def test_another_block_size(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", {"model.safetensors": random_model(1)})
    quantize_checkpoint(source, tmp_path / "fp8", block=(64, 32), progress=False)
    report = check_checkpoint(tmp_path / "fp8")
    assert report.config is not None
    assert report.config.block == (64, 32)


def test_power_of_two_scales_that_the_container_cannot_name(tmp_path: Path) -> None:
    """They would be written, and served as if they were any others."""
    source = write_folder(tmp_path / "source", {"model.safetensors": random_model(1)})
    refused(source, "only the container fp8 can say", scale_fmt="ue8m0", container="compressed-tensors")


def test_a_pattern_for_a_checkpoint_without_tensors(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", {"model.safetensors": {}})
    refused(source, r"(?s)matches no module.*no tensors", ignore=["*.q_proj"])


def refused(source: Path, words: str, **options: Any) -> str:
    destination = source.parent / "refused"
    with pytest.raises(BlockFp8Error, match=words) as caught:
        quantize_checkpoint(source, destination, progress=False, **options)
    assert not destination.exists()
    assert not destination.with_name("refused.incomplete").exists(), "nothing was finished, so nothing is left"
    return str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ignore": ["*.nonsense"]}, "matches no module"),
        ({"ignore": ["*.q_proj"]}, "merged when served"),
        ({"ignore": ["*.up_proj"]}, "merged when served"),
        ({"ignore": ["*"]}, "no linear weights"),
        ({"ignore": "*.q_proj"}, "a list"),
        ({"block": (0, 128)}, "two positive sizes"),
        ({"block": (128,)}, "two positive sizes"),
        ({"block": (1.5, 2)}, "two positive sizes"),
    ],
)
def test_bad_options_are_refused(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    source = write_folder(tmp_path / "source", {"model.safetensors": random_model(1)})
    refused(source, words, **options)


@pytest.mark.parametrize("config", [{"quantization_config": BLOCK_FP8}, {"text_config": {"quantization_config": {}}}])
def test_quantized_sources_are_refused(tmp_path: Path, config: dict[str, Any]) -> None:
    refused(write_folder(tmp_path / "source", {"model.safetensors": random_model(1)}, config), "already quantized")


def test_undeclared_fp8_sources_are_refused(tmp_path: Path) -> None:
    tensors = random_model(1) | {"model.layers.0.mlp.extra_proj.weight": torch.ones(3, 3).to(torch.float8_e5m2)}
    refused(write_folder(tmp_path / "source", {"model.safetensors": tensors}), "does not say so")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_that_are_not_finite_are_counted_and_named(tmp_path: Path, bad: float, dtype: torch.dtype) -> None:
    model = random_model(1, dtype=dtype)
    name = "model.layers.0.mlp.up_proj.weight"
    model[name][1, 2] = model[name][300, 5] = bad
    source = write_folder(tmp_path / "source", {"model.safetensors": model})
    message = refused(source, "NaN or infinite")
    assert name in message
    assert f"2 bad of {320 * 192}" in message
    ignore = ["*.up_proj", "*.gate_proj"]
    quantize_checkpoint(source, tmp_path / "refused", ignore=ignore, progress=False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.uint8])
def test_other_dtypes_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    source = write_folder(tmp_path / "source", {"model.safetensors": {name: torch.ones(4, 4).to(dtype)}})
    assert name in refused(source, "cannot be quantized")


def test_damaged_sources_are_refused(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", in_files(random_model(1), 2))
    file = source / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert file.name in refused(source, "truncated")


@pytest.mark.parametrize("block", [(1, 1 << 20), (1 << 20, 1), (1 << 20, 1 << 20), (1, 1), (3, 5)])
@pytest.mark.parametrize("shape", [(70, 9), (9, 70), (1, 3000), (3000, 1)])
def test_any_block_and_any_tile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: tuple[int, int], shape: tuple[int, int]
) -> None:
    monkeypatch.setattr(tiles, "TILE_ELEMENTS", 64)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    name = "model.layers.0.mlp.up_proj.weight"
    source = write_folder(tmp_path / "source", {"model.safetensors": {name: weight}})
    quantize_checkpoint(source, tmp_path / "fp8", block=block, progress=False)
    out = load_file(tmp_path / "fp8" / "model.safetensors")
    codes, scale = quantize_weight(weight, BlockSize(*block))
    assert torch.equal(out[name].view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(out[f"{name}_scale_inv"], scale)
    assert scale.shape == scale_shape(*shape, BlockSize(*block))


@pytest.mark.parametrize("shape", [(1 << 50, 0), (0, 1 << 50)])
def test_weights_without_elements_take_no_time(tmp_path: Path, shape: tuple[int, int]) -> None:
    source = write_folder(tmp_path / "source", {})
    entry = {"dtype": "BF16", "shape": shape, "data_offsets": [0, 0]}
    (source / "model.safetensors").write_bytes(raw_file({"model.layers.0.mlp.up_proj.weight": entry}, 0))
    quantize_checkpoint(source, tmp_path / "fp8", progress=False)
    assert {t.shape for t in read_header(tmp_path / "fp8" / "model.safetensors").tensors} == {
        shape,
        scale_shape(*shape),
    }


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_weights_and_config_behind_a_link_out_of_the_folder_are_not_copied(tmp_path: Path, name: str) -> None:
    source = write_folder(tmp_path / "source", {"model.safetensors": random_model(1)})
    (source / name).rename(tmp_path / "secret")
    (source / name).symlink_to(tmp_path / "secret")
    with pytest.raises(BlockFp8Error, match="leaves the checkpoint folder"):
        quantize_checkpoint(source, tmp_path / "fp8", progress=False)
    assert not (tmp_path / "fp8").exists()


def test_a_loop_of_links_is_left_out(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", {"model.safetensors": random_model(1)})
    (source / "notes.txt").symlink_to("more.txt")
    (source / "more.txt").symlink_to("notes.txt")
    quantize_checkpoint(source, tmp_path / "fp8", progress=False)
    assert "notes.txt" not in digests(tmp_path / "fp8")


def test_a_link_out_of_the_folder_is_not_copied(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", {"model.safetensors": random_model(1)})
    (tmp_path / "secret").write_text("key")
    (source / "notes.txt").symlink_to(tmp_path / "secret")
    assert "notes.txt" in refused(source, "link leaves")


def test_a_download_cache_is_a_source(tmp_path: Path) -> None:
    """snapshots/<revision>/* -> ../../blobs/<digest>, as huggingface_hub lays it out."""
    cache = tmp_path / "models--a--b"
    source = write_folder(cache / "snapshots" / "0123", {"model.safetensors": random_model(1)})
    (source / "tokenizer.json").write_text("{}")
    (cache / "blobs").mkdir()
    for path in list(source.iterdir()):
        path.rename(cache / "blobs" / path.name)
        path.symlink_to(Path("../../blobs") / path.name)
    quantize_checkpoint(source, tmp_path / "fp8", progress=False)
    assert not any(path.is_symlink() for path in (tmp_path / "fp8").iterdir())
    assert (tmp_path / "fp8" / "tokenizer.json").read_text() == "{}"


def test_output_is_quiet_when_not_a_terminal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = write_folder(tmp_path / "source", {"model.safetensors": random_model(1)})
    quantize_checkpoint(source, tmp_path / "fp8", progress=True)
    assert capfd.readouterr() == ("", "")


def test_output_does_not_depend_on_the_source_layout(tmp_path: Path) -> None:
    """The same tensors in another order within the file give the same bytes."""
    model = random_model(1)
    first = write_folder(tmp_path / "first", {"model.safetensors": model})
    second = write_folder(tmp_path / "second", {})
    save_file(dict(reversed(model.items())), second / "model.safetensors")
    for source in (first, second):
        quantize_checkpoint(source, source.with_name(f"{source.name}-fp8"), progress=False)
    assert digests(tmp_path / "first-fp8") == digests(tmp_path / "second-fp8")
