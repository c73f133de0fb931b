"""From the checkpoint's tensors to a layer's output, FP8 is only ever viewed: A2 and A3 can neither cast nor copy it.

The NPU backend that needs no kernels, on the CPU with real values; what is dispatched is the same on a device. Its
operators, and the other backends', are watched on FakeTensors in tests/vllm_ascend/test_graph_capture.py.
"""

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, RowParallelLinear

from qwen3_fp8_ascend import ops
from qwen3_fp8_ascend.backends import ascendc, registry, soc, torch_npu
from qwen3_fp8_ascend.errors import BlockFp8Error
from qwen3_fp8_ascend.testing.judges import random_problem
from tests.support.npu_graph import FP8_VIEWS, Watch

from .linear_layers import config, finish, load, loaded_qkv, split


@pytest.fixture(params=["A2", "A3"], autouse=True)
def chip(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Backends for NPUs on the CPU, as if it were a chip of that generation."""
    generation = next(g for g in soc.GENERATIONS if g.name == request.param)
    monkeypatch.setattr(soc, "current_generation", lambda: generation)
    for backend in (torch_npu.BACKEND, ascendc.BACKEND):
        on_cpu = dataclasses.replace(backend, device_types=frozenset({"cpu"}), unusable=lambda: None)
        monkeypatch.setitem(registry.LOADED, backend.name, on_cpu)
    monkeypatch.setenv(registry.ENVIRONMENT_VARIABLE, "torch_npu")
    registry.select_backend.cache_clear()
    yield request.param
    registry.select_backend.cache_clear()


def test_qkv_of_ragged_shards() -> None:
    problem = random_problem(5, (576, 192, 192), 576)
    with Watch() as watch:
        layer = finish(loaded_qkv(problem))
        out = layer.quant_method.apply(layer, problem.x.bfloat16())
    assert out.shape == (5, 960) and layer.packed_weight.backend == "torch_npu"
    assert watch.touched_fp8 and watch.touched_fp8 <= FP8_VIEWS
    assert "aten::copy_" in watch.seen, "the checkpoint was not copied"


def test_other_layers() -> None:
    gate_up = MergedColumnParallelLinear(
        256, [256, 256], bias=False, params_dtype=torch.bfloat16, quant_config=config(), prefix="mlp.gate_up_proj"
    )
    down = RowParallelLinear(256, 128, bias=False, quant_config=config(), prefix="mlp.down_proj")
    problem = random_problem(3, (256, 256), 256)
    second = random_problem(3, (128,), 256)
    with Watch() as watch:
        load(gate_up, [(index, *tensors) for index, tensors in enumerate(split(problem))])
        load(down, [(None, second.weight, second.scale)])
        for layer in (gate_up, down):
            finish(layer)
    assert watch.touched_fp8 and watch.touched_fp8 <= FP8_VIEWS


def test_a_damaged_weight_is_named() -> None:
    problem = random_problem(1, (576, 192, 192), 576)
    problem.weight.view(torch.uint8)[600, 3] = 0xFF
    with Watch() as watch, pytest.raises(BlockFp8Error, match=r"k_proj\.weight"):
        finish(loaded_qkv(problem))
    assert watch.touched_fp8 <= FP8_VIEWS


@pytest.mark.parametrize("backend", ["torch_npu", "ascendc"])
def test_packing_a_strided_weight(backend: str) -> None:
    problem = random_problem(1, (256,), 384)
    strided = torch.cat([problem.weight.view(torch.uint8)] * 2, 1)[:, :384].view(torch.float8_e4m3fn)
    assert not strided.is_contiguous()
    with Watch() as watch:
        packed = ops.pack_weight(strided, problem.scale, backend=backend)
    assert watch.touched_fp8 <= FP8_VIEWS
    expected = ops.pack_weight(problem.weight, problem.scale, backend=backend)
    assert all(torch.equal(*pair) for pair in zip(packed.tensors, expected.tensors, strict=True))


def test_what_touches_fp8_is_noticed() -> None:
    weight = random_problem(1, (128,), 128).weight
    with Watch() as watch:
        weight.float(), weight.t().contiguous()
    assert watch.touched_fp8 - FP8_VIEWS
