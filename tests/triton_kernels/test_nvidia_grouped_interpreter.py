"""Groups and layers of experts by the kernels for NVIDIA GPUs in upstream Triton's interpreter."""

import itertools
import os

import pytest

pytest.importorskip("triton", reason="upstream Triton lives in .venv-triton: `make test-triton`")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("the interpreter is chosen by TRITON_INTERPRET=1: `make test-triton`", allow_module_level=True)

import torch

from qwen3_fp8_ascend import ops
from qwen3_fp8_ascend.backends.nvidia import backend, launch
from qwen3_fp8_ascend.format import Activation
from qwen3_fp8_ascend.testing.experts import assert_layer_exact, random_experts
from qwen3_fp8_ascend.testing.judges import Problem, assert_exact
from qwen3_fp8_ascend.triton_kernels.nvidia import grouped_linear
from tests.support.groups import PATTERNS, ends_of, random_groups
from tests.support.products import ONE_OF_EACH, with_dtypes_and_activations

# The walk over the groups is the same for activations that are not quantized: one pattern with those.
PATTERNS_AND_ACTIVATIONS = [
    pytest.param(counts, activation, id=f"{name}-{activation}", marks=[] if short else pytest.mark.long)
    for activation in (Activation.W8A8, Activation.W8A16)
    for name, counts in PATTERNS.items()
    for short in [activation is Activation.W8A8 or name == "uneven and empty"]
]


@pytest.mark.parametrize(("counts", "activation"), PATTERNS_AND_ACTIVATIONS)
def test_a_grouped_linear_is_its_specification(counts, activation, monkeypatch):
    weights, scales, grid = random_groups(len(counts), (130, 62), 300)
    packed = ops.pack_experts(weights, scales, grid, "nvidia")
    x, owned = torch.randn(sum(counts) + 2, 300), sum(counts)  # two rows are nobody's
    values, x_scale = launch.quantize(x, activation, codes=False) if activation is Activation.W8A8 else (x, None)
    monkeypatch.setattr(torch, "empty", lambda *size, **named: torch.full(size, 7, **named))
    out = ops.grouped_linear(x, packed, ends_of(counts), activation)
    want = grouped_linear.grouped_linear_specification(
        values, x_scale, packed.tensors[0], packed.tensors[1], ends_of(counts), grid
    )
    assert (out[:owned] - want[:owned]).norm() <= 1e-6 * want[:owned].norm()
    assert (out[owned:] == 7.0).all(), "rows that are nobody's were written"


GROUPED = (((5, 0, 18), (130, 62), 300), ((2,), (1,), 1), ((70,), (128,), 128))
"""(counts, widths, k). Every dtype and activation meets the smallest one."""


@pytest.mark.parametrize(
    ("counts", "widths", "k", "dtype", "activation"), with_dtypes_and_activations(GROUPED, whole=GROUPED[1:2])
)
def test_a_grouped_linear_passes_the_gates_of_the_dense_one(counts, widths, k, dtype, activation):
    weights, scales, grid = random_groups(len(counts), widths, k)
    x = torch.randn(sum(counts) + 1, k).to(dtype)
    packed = ops.pack_experts(weights, scales, grid, "nvidia")
    got = ops.grouped_linear(x, packed, ends_of(counts), activation)
    unrounded = ops.grouped_linear(x, packed, ends_of(counts), activation, unrounded=True)
    assert got.shape == (len(x), grid.n) and got.dtype == dtype and unrounded.dtype == torch.float32
    for expert, (start, end) in enumerate(itertools.pairwise([0, *ends_of(counts).tolist()])):
        assert_exact(got[start:end], Problem(x[start:end], weights[expert], scales[expert], grid=grid), activation)
        assert torch.equal(unrounded[start:end].to(dtype), got[start:end])


# Two dtypes on whole blocks, and the one that is served on ragged ones, which take six times as long.
LAYERS = [
    pytest.param(*sizes, dtype, activation, marks=[] if (dtype, activation) in ONE_OF_EACH else pytest.mark.long)
    for sizes, dtype in (((256, 128), torch.float16), ((256, 128), torch.float32), ((300, 200), torch.bfloat16))
    for activation in Activation
]


@pytest.mark.parametrize(("hidden", "intermediate", "dtype", "activation"), LAYERS)
def test_a_layer_of_experts_is_the_specification(hidden, intermediate, dtype, activation):
    problem = random_experts(9, 5, 3, hidden, intermediate, dtype=dtype)
    problem.topk_ids[0] = -1
    problem.topk_ids[1, 2] = -1
    assert_layer_exact(problem.layer("nvidia", activation), problem, activation)


def test_lists_that_are_none_touch_nothing_outside(monkeypatch):
    """On a device nobody looks at the ends. Rows stay within x, and groups within the weights."""
    weights, scales, grid = random_groups(4, (128,), 128)
    codes, scale, spans = ops.pack_experts(weights, scales, grid, "nvidia").tensors
    wild = torch.tensor([[7, 3, 9, 1], [-5, 2, 1 << 40, 3], [1 << 62, 0, 0, 0], [-1, -1, -1, -(1 << 60)]])
    room = torch.full((3, 6, 128), 7.0)  # x and out in the middle of what must stay as it is
    honest = torch.empty
    for ends in wild:
        room.fill_(7.0)
        monkeypatch.setattr(
            torch, "empty", lambda *size, **named: room[1] if size == (6, 128) else honest(*size, **named)
        )
        launch.grouped_linear(torch.randn(6, 128), codes, scale, spans[0], ends, Activation.W8A16, torch.float32)
        monkeypatch.undo()
        assert (room[0] == 7.0).all() and (room[2] == 7.0).all()


def test_weights_beyond_32_bits_are_found():
    """A layer of 4.3 GB: memory that nothing touches is never there, so only two experts are real.

    Few programs (one a token and tile) and few experts, since the interpreter takes the list of ends number by number.
    """
    n, k = 128, 33280
    experts = (1 << 32) // (n * k) + 2
    codes = torch.empty(experts, n, k, dtype=torch.uint8)
    w_scale = torch.empty(experts, n // 128, k // 128)
    weights, scales, grid = random_groups(2, (n,), k)
    for place, expert in ((0, 0), (experts - 1, 1)):
        codes[place], w_scale[place], spans = backend.pack(weights[expert], scales[expert], grid)
    ends = torch.full((experts,), 1)
    ends[-1] = 2
    x = torch.randn(2, k)
    got = backend.nvidia_block_grouped_linear(x, codes, w_scale, spans, ends, "w8a8", torch.float32)
    for expert, rows in ((0, slice(0, 1)), (1, slice(1, 2))):
        assert_exact(got[rows], Problem(x[rows], weights[expert], scales[expert], grid=grid))
