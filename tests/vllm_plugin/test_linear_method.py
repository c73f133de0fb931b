"""vLLM's own linear layers with our linear method: loading of shards, results, compilation, memory."""

import dataclasses
import gc
import logging
import weakref
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)

from qwen3_fp8_ascend import reference
from qwen3_fp8_ascend.format import Activation, BlockFp8Config
from qwen3_fp8_ascend.testing.judges import Problem, assert_exact, random_problem
from qwen3_fp8_ascend.vllm_plugin import linear, loading

from .linear_layers import config, finish, gate_up_layer, load, loaded_qkv, qkv_layer, split


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
def test_ragged_qkv(scale_dtype: torch.dtype) -> None:
    problem = random_problem(7, (576, 192, 192), 576)
    problem = Problem(problem.x, problem.weight, problem.scale.to(scale_dtype), grid=problem.grid)
    layer = finish(loaded_qkv(problem))
    out, _ = layer(problem.x)
    assert_exact(out, problem)


@pytest.mark.parametrize("stored", ["fp32", "e8m0", "not powers of two"])
@pytest.mark.parametrize("asked", [Activation.W8A8, Activation.W8A16])
def test_scales_that_are_powers_of_two(stored: str, asked: Activation, caplog: pytest.LogCaptureFixture) -> None:
    """The setting stays w8a8 or w8a16: what w8a8 is, the checkpoint says."""
    problem = random_problem(7, (576, 192, 192), 576)
    powers = reference.round_up_to_power_of_two(problem.scale)
    problem = dataclasses.replace(problem, scale=problem.scale if stored == "not powers of two" else powers)
    on_disk = problem.scale.to(torch.float8_e8m0fnu) if stored == "e8m0" else problem.scale
    form = BlockFp8Config(scale_fmt="ue8m0")
    layer = qkv_layer(config())
    layer.quant_method.activation = form.activation(asked)
    codes = [weight for weight, _ in split(problem)]
    load(layer, list(zip("qkv", codes, on_disk.split(problem.grid.scale_rows), strict=True)))
    with patch.object(loading, "scale_note", loading.ScaleNote()) as note, patch.object(linear, "scale_note", note):
        finish(layer)
    assert note.said is (stored == "not powers of two" and asked is Activation.W8A8)
    assert_exact(layer(problem.x)[0], problem, form.activation(asked))
    with pytest.raises(AssertionError):
        assert_exact(layer(problem.x)[0], problem, Activation.W8A16 if asked is Activation.W8A8 else Activation.W8A8)


def test_bias() -> None:
    problem = random_problem(3, (576, 192, 192), 576, bias=True)
    layer = loaded_qkv(problem, bias=True)
    assert problem.bias is not None
    for name, part in zip("qkv", problem.bias.split([576, 192, 192]), strict=True):
        layer.bias.weight_loader(layer.bias, part, name)
    out, _ = finish(layer)(problem.x)
    assert_exact(out, problem)


LAYERS: dict[str, tuple[Callable[..., torch.nn.Module], tuple[int, ...], list[Any]]] = {
    "gate_up_proj": (lambda k, widths, **kw: MergedColumnParallelLinear(k, list(widths), **kw), (1536, 1536), [0, 1]),
    "ragged_merge": (
        lambda k, widths, **kw: MergedColumnParallelLinear(k, list(widths), **kw),
        (100, 300, 28),
        [0, 1, 2],
    ),
    "down_proj": (lambda k, widths, **kw: RowParallelLinear(k, widths[0], **kw), (576,), [None]),
    "column": (lambda k, widths, **kw: ColumnParallelLinear(k, widths[0], **kw), (200,), [None]),
    "replicated": (lambda k, widths, **kw: ReplicatedLinear(k, widths[0], **kw), (70,), [None]),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("k", [576, 200])
def test_every_kind_of_linear_layer(name: str, k: int) -> None:
    make, widths, shard_ids = LAYERS[name]
    problem = random_problem(5, widths, k)
    layer = make(
        k, widths, bias=False, params_dtype=torch.bfloat16, quant_config=config(), prefix=f"model.layers.0.mlp.{name}"
    )
    load(layer, [(i, *tensors) for i, tensors in zip(shard_ids, split(problem), strict=True)])
    out, _ = finish(layer)(problem.x)
    assert_exact(out, problem)


def test_a_whole_merged_tensor_on_disk() -> None:
    problem = random_problem(5, (256, 128), 256)
    layer = gate_up_layer(256, 256, 128)
    load(layer, [(None, problem.weight, problem.scale)])
    assert_exact(finish(layer)(problem.x)[0], problem)


def test_compiled_with_a_dynamic_batch() -> None:
    problem = random_problem(7, (576, 192, 192), 576)
    layer = finish(loaded_qkv(problem))
    compiled = torch.compile(lambda x: layer(x)[0] * 2, fullgraph=True, dynamic=True, backend="aot_eager")
    for m in (1, 5, 7):
        assert torch.equal(compiled(problem.x[:m]), layer(problem.x[:m])[0] * 2)


def test_one_resident_copy_at_one_byte_a_weight() -> None:
    problem = random_problem(1, (1536, 1536), 576)
    layer = gate_up_layer(576, 1536, 1536)
    load(layer, [(i, *tensors) for i, tensors in enumerate(split(problem))])
    originals = [weakref.ref(t.untyped_storage()) for t in (layer.weight.data, layer.weight_scale_inv.data)]
    finish(layer)
    gc.collect()
    assert [ref() for ref in originals] == [None, None]
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in (*layer.packed_weight.tensors, *layer.parameters(), *layer.buffers())
    }
    weights = 2 * 1536 * 576
    assert weights <= sum(storages.values()) <= 1.01 * weights + 64 * problem.scale.numel() * 4


def test_packing_reports_its_progress(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(loading, "REPORT_BYTES", 1000)
    monkeypatch.setattr(linear, "packing", loading.PackingProgress())
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    with caplog.at_level("INFO", logger="qwen3_fp8_ascend"):
        finish(loaded_qkv(random_problem(1, (576, 192, 192), 576)))
    assert "packed 1 block-FP8 layers" in caplog.text
