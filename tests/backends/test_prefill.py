"""The scratch that all layers share."""

import pytest
import torch

from qwen3_fp8_ascend.backends import prefill
from qwen3_fp8_ascend.errors import BlockFp8Error

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill, "_scratch", {})


def test_one_buffer_as_large_as_the_largest_weight() -> None:
    for elements in (1000, 5000, 2000):
        prefill.reserve(elements, CPU)
    assert prefill.reserved_bytes(CPU) == 10000
    first = prefill.scratch(50, 100, torch.bfloat16, CPU)
    second = prefill.scratch(10, 20, torch.float16, CPU)
    assert first.shape == (50, 100) and first.is_contiguous() and second.dtype == torch.float16
    assert first.data_ptr() == second.data_ptr()
    assert prefill.reserved_bytes(CPU) == 10000


def test_a_weight_beyond_the_limit_reserves_nothing() -> None:
    prefill.reserve(prefill.SCRATCH_LIMIT // 2 + 1, CPU)
    assert prefill.reserved_bytes(CPU) == 0


def test_it_grows_for_fp32_but_not_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    prefill.reserve(1000, CPU)
    assert prefill.scratch(10, 100, torch.float32, CPU).numel() == 1000
    monkeypatch.setattr(prefill, "_capturing", lambda device: True)
    assert prefill.scratch(10, 100, torch.float32, CPU).numel() == 1000
    with pytest.raises(BlockFp8Error, match="while a graph is captured"):
        prefill.scratch(11, 100, torch.float32, CPU)


@pytest.mark.parametrize(("k", "columns", "n", "rows"), [(128, 128, 64, 64), (100, 128, 60, 64)])
def test_the_product_ignores_padding(k: int, columns: int, n: int, rows: int) -> None:
    x, weight, bias = torch.randn(5, k), torch.randn(rows, columns), torch.randn(n)
    weight[:, k:] = 0
    got = prefill.multiply(x, weight, n, bias)
    torch.testing.assert_close(got, x @ weight[:n, :k].T + bias)
    assert got.is_contiguous()
