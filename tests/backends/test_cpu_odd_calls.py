"""Calls of the public operations that are wrong, and some with very many rows or none, on the CPU backend."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from qwen3_fp8_ascend import ops
from qwen3_fp8_ascend.errors import BlockFp8Error
from qwen3_fp8_ascend.format import Activation
from qwen3_fp8_ascend.testing.judges import random_problem
from tests.support.cpu_levels import needs_cpu_backend, same_bits

pytestmark = needs_cpu_backend

OPERATORS = torch.ops.qwen3_fp8_ascend


def _public_misuses() -> dict[str, Callable[[], object]]:
    problem = random_problem(2, (40,), 36)
    packed = ops.pack_weight(problem.weight, problem.scale, backend="cpu")
    x, weight, scale = problem.x, problem.weight, problem.scale
    return {
        "x on another device": lambda: ops.block_linear(x.to("meta"), packed),
        "a bias on another device": lambda: ops.block_linear(x, packed, torch.zeros(40, device="meta")),
        "x of fp64": lambda: ops.block_linear(x.double(), packed),
        "x of e4m3": lambda: ops.block_linear(x.to(torch.float8_e4m3fn), packed),
        "x of complex numbers": lambda: ops.block_linear(x.to(torch.complex64), packed),
        "x of another k": lambda: ops.block_linear(x[:, 1:], packed),
        "a scalar": lambda: ops.block_linear(torch.tensor(1.0), packed),
        "a short bias": lambda: ops.block_linear(x, packed, torch.zeros(39)),
        "a bias of two dimensions": lambda: ops.block_linear(x, packed, torch.zeros(1, 40)),
        "an unknown activation": lambda: ops.block_linear(x, packed, None, "static"),
        "x on the meta device": lambda: ops.quantize_activation(x.to("meta")),
        "a block of nothing": lambda: ops.quantize_activation(x, block_k=0),
        "a weight on the meta device": lambda: ops.pack_weight(weight.to("meta"), scale.to("meta"), check_values=False),
        "a scale on the meta device": lambda: ops.pack_weight(weight, scale.to("meta")),
        "a scale of another shape": lambda: ops.pack_weight(weight, scale.repeat(2, 1)),
        "a weight of three dimensions": lambda: ops.pack_weight(weight[None], scale),
        "to integers": lambda: ops.dequantize_weight(weight, scale, dtype=torch.int32),
    }


@pytest.mark.parametrize("misuse", _public_misuses())
def test_the_public_operations_say_what_to_do(misuse: str) -> None:
    with pytest.raises(BlockFp8Error):
        _public_misuses()[misuse]()


@pytest.mark.parametrize(("n", "k"), [(40, 64), (1, 1), (33, 129)])
def test_a_hundred_thousand_rows(n: int, k: int) -> None:
    """One call is the calls on its parts: row by row as long as the parts take the same path."""
    m = 100_000
    problem = random_problem(m, (n,), k)
    packed = ops.pack_weight(problem.weight, problem.scale, backend="cpu")
    for activation in Activation:
        whole = ops.block_linear(problem.x, packed, None, activation)
        parts = [ops.block_linear(x, packed, None, activation) for x in problem.x.split(9_973)]
        assert whole.shape == (m, n) and same_bits(whole, torch.cat(parts))
    codes, scale = ops.quantize_activation(problem.x, backend="cpu")
    pieces = [ops.quantize_activation(x, backend="cpu") for x in problem.x.split(9_973)]
    assert same_bits(codes, torch.cat([c for c, _ in pieces])) and same_bits(scale, torch.cat([s for _, s in pieces]))


def test_no_columns_and_no_rows_take_no_time() -> None:
    """2^62 rows of nothing are nothing to do."""
    codes, scale = OPERATORS.cpu_quantize_activation(torch.empty(2**62, 0), 128, 1)
    assert codes.shape == scale.shape == (2**62, 0)
    empty = {"codes": torch.empty(0, 4, 32, dtype=torch.uint8), "panels": torch.empty(0, 4, dtype=torch.int32)}
    x = torch.zeros(1, 4).expand(2**40, 4)
    y = OPERATORS.cpu_block_linear(
        x=x, **empty, scales=torch.empty(0, 1), bias=None, n=0, k=4, block_k=128, quantization=1
    )
    assert y.shape == (2**40, 0)
