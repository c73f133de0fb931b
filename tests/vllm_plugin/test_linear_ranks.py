"""Ranks of vLLM's own linear layers with our linear method: rows and columns that are cut anywhere."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    RowParallelLinear,
)

from qwen3_fp8_ascend import reference
from qwen3_fp8_ascend.errors import BlockFp8Error
from qwen3_fp8_ascend.format import Activation, BlockSize
from qwen3_fp8_ascend.testing.judges import assert_exact, random_problem
from qwen3_fp8_ascend.vllm_plugin import linear
from qwen3_fp8_ascend.vllm_plugin.linear import BlockFp8LinearMethod

from .linear_layers import config, finish, gate_up_layer, load, qkv_layer, split


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Pretend to be rank `rank` of `size`, for layers made afterwards."""

    def pretend(rank: int, size: int) -> None:
        for module in ("layers.linear", "parameter"):
            path = f"vllm.model_executor.{module}.get_tensor_model_parallel"
            monkeypatch.setattr(f"{path}_rank", lambda: rank)
            monkeypatch.setattr(f"{path}_world_size", lambda: size)

    return pretend


@pytest.mark.parametrize("size", [2, 4])
def test_tensor_parallel_shards_add_up(ranks: Callable[[int, int], None], size: int) -> None:
    """Query heads are split, the two key/value heads are split over two ranks and shared by four."""
    problem = random_problem(4, (1024, 256, 256), 512)
    whole = reference.block_linear(problem.x, problem.weight, problem.scale, grid=problem.grid)
    q, k, v = whole.split(problem.grid.widths, dim=1)  # type: ignore[arg-type]
    for rank in range(size):
        ranks(rank, size)
        layer = qkv_layer(config(), hidden_size=512, head_size=128, total_num_heads=8, total_num_kv_heads=2)
        load(layer, [(name, *tensors) for name, tensors in zip("qkv", split(problem), strict=True)])
        finish(layer)
        out = layer.quant_method.apply(layer, problem.x)
        kv_rank, kv_size = (rank, 2) if size == 2 else (rank // 2, 2)
        want = torch.cat([q.chunk(size, 1)[rank], k.chunk(kv_size, 1)[kv_rank], v.chunk(kv_size, 1)[kv_rank]], 1)
        assert (out == want).double().mean() > 0.995


def test_row_parallel_shards_add_up(ranks: Callable[[int, int], None]) -> None:
    problem = random_problem(4, (200,), 512, dtype=torch.float32)
    total = torch.zeros(4, 200)
    for rank in range(2):
        ranks(rank, 2)
        layer = RowParallelLinear(
            512, 200, bias=False, params_dtype=torch.float32, quant_config=config(), prefix="down_proj"
        )
        load(layer, [(None, problem.weight, problem.scale)])
        finish(layer)
        total += layer.quant_method.apply(layer, problem.x[:, rank * 256 : (rank + 1) * 256])
    assert_exact(total, problem)


@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(6, 2, 2), (9, 3, 3), (12, 3, 6), (4, 2, 4), (9, 3, 9)])
def test_rows_are_cut_anywhere(ranks: Callable[[int, int], None], heads: int, kv_heads: int, size: int) -> None:
    """Query heads of 64 rows are half a block; key/value heads are divided too, or shared by several ranks."""
    problem = random_problem(4, (heads * 64, kv_heads * 64, kv_heads * 64), 200)
    q, k, v = problem.oracle().split(problem.grid.widths, dim=1)  # type: ignore[arg-type]
    for rank in range(size):
        ranks(rank, size)
        layer = qkv_layer(config(), hidden_size=200, head_size=64, total_num_heads=heads, total_num_kv_heads=kv_heads)
        load(layer, [(name, *tensors) for name, tensors in zip("qkv", split(problem), strict=True)])
        out = finish(layer).quant_method.apply(layer, problem.x)
        kv_rank, kv_size = (rank * kv_heads // size, kv_heads) if size > kv_heads else (rank, size)
        want = torch.cat([q.chunk(size, 1)[rank], k.chunk(kv_size, 1)[kv_rank], v.chunk(kv_size, 1)[kv_rank]], 1)
        assert (out == want.to(out.dtype)).double().mean() > 0.995


def test_one_column_parallel_tensor_is_cut_anywhere(ranks: Callable[[int, int], None]) -> None:
    problem = random_problem(4, (600,), 200)
    want = problem.oracle().to(torch.bfloat16).chunk(4, 1)
    for rank in range(4):
        ranks(rank, 4)
        layer = ColumnParallelLinear(
            200, 600, bias=False, params_dtype=torch.bfloat16, quant_config=config(), prefix="model.layers.0.one_proj"
        )
        load(layer, [(None, problem.weight, problem.scale)])
        out = finish(layer).quant_method.apply(layer, problem.x)
        assert (out == want[rank]).double().mean() > 0.995


def test_a_merged_tensor_on_disk_is_cut_within_its_blocks(ranks: Callable[[int, int], None]) -> None:
    """Its shards are whole blocks, the parts of them on each rank are not."""
    problem = random_problem(5, (256, 128), 256)
    want = [part.chunk(4, 1) for part in problem.oracle().to(torch.bfloat16).split((256, 128), 1)]
    for rank in range(4):
        ranks(rank, 4)
        layer = gate_up_layer(256, 256, 128)
        load(layer, [(None, problem.weight, problem.scale)])
        out = finish(layer).quant_method.apply(layer, problem.x)
        assert (out == torch.cat([part[rank] for part in want], 1)).double().mean() > 0.995


def test_bad_values_behind_a_cut_are_named(ranks: Callable[[int, int], None]) -> None:
    problem = random_problem(4, (384, 128, 128), 200)
    parts = split(problem)
    parts[1][1][0, 1] = -1.0
    ranks(1, 2)
    layer = qkv_layer(config(), hidden_size=200, head_size=64, total_num_heads=6, total_num_kv_heads=2)
    load(layer, [(name, *tensors) for name, tensors in zip("qkv", parts, strict=True)])
    with pytest.raises(BlockFp8Error, match=r"where: model\.layers\.0\.self_attn\.k_proj\.weight_scale_inv"):
        finish(layer)


def down_proj(k: int, **changes: Any) -> RowParallelLinear:
    return RowParallelLinear(
        k, 200, **({"bias": False, "params_dtype": torch.float32, "quant_config": config()} | changes), prefix="down"
    )


@pytest.fixture
def tensor_parallel(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Pretend that vLLM's group is that of `ranks`, too."""

    def pretend(rank: int, size: int) -> None:
        monkeypatch.setattr(linear, "get_tp_group", lambda: SimpleNamespace(rank_in_group=rank, world_size=size))

    return pretend


@pytest.mark.parametrize("activation", list(Activation))
@pytest.mark.parametrize(("k", "size"), [(1152, 2), (320, 2), (640, 10), (1000, 4), (384, 3)])
def test_columns_are_cut_anywhere(
    ranks: Callable[[int, int], None],
    tensor_parallel: Callable[[int, int], None],
    monkeypatch: pytest.MonkeyPatch,
    activation: Activation,
    k: int,
    size: int,
) -> None:
    """The ranks take turns: what each gives to the exchange is collected first."""
    problem = random_problem(4, (200,), k, dtype=torch.float32)
    layers = []

    def method(layer: torch.nn.Module, prefix: str) -> BlockFp8LinearMethod:
        return BlockFp8LinearMethod(BlockSize(), prefix=prefix, activation=activation)

    for rank in range(size):
        ranks(rank, size)
        tensor_parallel(rank, size)
        quantization = config()
        quantization.get_quant_method = method  # type: ignore[method-assign]
        layer = down_proj(k, quant_config=quantization)
        load(layer, [(None, problem.weight, problem.scale)])
        layers.append(finish(layer))
    parts = problem.x.chunk(size, 1)
    given: list[torch.Tensor] = []

    def collect(own: torch.Tensor) -> torch.Tensor:
        given.append(own)
        return own.repeat(1, size)

    monkeypatch.setattr(linear, "tensor_model_parallel_all_gather", collect)
    for layer, x in zip(layers, parts, strict=True):
        layer.quant_method.apply(layer, x)
    exchanged = size if activation is not Activation.W8A16 and (k // size) % 128 else 0
    assert len(given) == exchanged
    monkeypatch.setattr(linear, "tensor_model_parallel_all_gather", lambda own: torch.cat(given, 1))
    total = sum(layer.quant_method.apply(layer, x) for layer, x in zip(layers, parts, strict=True))
    assert isinstance(total, torch.Tensor)
    assert_exact(total, problem, activation)


def test_columns_of_ranks_that_vllm_does_not_exchange_between_are_refused(ranks: Callable[[int, int], None]) -> None:
    ranks(0, 2)
    with pytest.raises(BlockFp8Error, match=r"columns a rank in multiples of 128") as refused:
        down_proj(1152)
    assert "divide this layer by 1 or 3 or 9," in str(refused.value)


def test_whole_blocks_that_all_ranks_hold(ranks: Callable[[int, int], None]) -> None:
    """As some models' layers load what they do not divide: with the first rank's number, on every rank."""
    problem = random_problem(4, (512,), 200)
    ranks(1, 2)
    layer = ColumnParallelLinear(
        200, 512, bias=False, params_dtype=torch.bfloat16, quant_config=config(), prefix="model.layers.0.one_proj"
    )
    layer.weight.tp_rank = layer.weight_scale_inv.tp_rank = 0
    load(layer, [(None, problem.weight, problem.scale)])
    out = finish(layer).quant_method.apply(layer, problem.x)
    assert (out == problem.oracle().to(out.dtype)[:, :256]).double().mean() > 0.995


def test_rows_that_vllm_gives_otherwise_are_refused(ranks: Callable[[int, int], None]) -> None:
    """Of a shard that starts within a block."""
    problem = random_problem(4, (600,), 200)
    ranks(1, 2)
    layer = ColumnParallelLinear(
        200, 600, bias=False, params_dtype=torch.bfloat16, quant_config=config(), prefix="model.layers.0.one_proj"
    )
    layer.weight_scale_inv.tp_rank = 0
    with pytest.raises(
        BlockFp8Error, match=r"(?s)one_proj\.weight_scale_inv.*rows for rank 0 are loaded, which start elsewhere"
    ):
        load(layer, [(None, problem.weight, problem.scale)])
