"""The hand-over to torch's block-scaled product: what it is given, the bound on its sums, and what stays exact.

Torch's product itself needs a GPU; here its sums are imitated.
"""

import dataclasses
import os

import pytest

pytest.importorskip("triton", reason="upstream Triton lives in .venv-triton: `make test-triton`")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("the interpreter is chosen by TRITON_INTERPRET=1: `make test-triton`", allow_module_level=True)

import torch

from qwen3_fp8_ascend.backends import nvidia_scaled_mm
from qwen3_fp8_ascend.backends.nvidia import backend
from qwen3_fp8_ascend.format import Activation
from qwen3_fp8_ascend.testing.judges import assert_exact, judge_exact, judge_scaled_mm, random_problem


def sums_of_14_bits(codes, scale, weight, w_scale):
    """Hopper's FP8 products, by measurements of others: 32 at once, cut off 13 bits below the largest."""
    assert scale.stride(0) == 1 and scale.stride(1) % 4 == 0 and codes.shape[0] % 16 == 0
    out = torch.zeros(codes.shape[0], weight.shape[0])
    for block in range(codes.shape[1] // 128):
        part = torch.zeros_like(out)
        for first in range(128 * block, 128 * (block + 1), 32):
            products = codes[:, None, first : first + 32].float() * weight[None, :, first : first + 32].float()
            largest = products.abs().amax(2, keepdim=True).maximum(part.abs()[..., None]).clamp_min(2.0**-100)
            unit = torch.exp2(torch.frexp(largest)[1].float() - 14)
            part = ((products / unit).trunc() * unit).sum(2) + (part / unit[..., 0]).trunc() * unit[..., 0]
        out += part * scale[:, block, None] * w_scale.repeat_interleave(128, 0)[: len(weight), block]
    return out.bfloat16()


@pytest.mark.parametrize("activation", (Activation.W8A8, Activation.W8A8_UE8M0))
@pytest.mark.parametrize("m", [65, 80])
def test_the_hand_over_gives_torch_what_it_takes_and_has_a_bound_of_its_own(m, activation, monkeypatch):
    problem = random_problem(m, (128, 128), 640)
    packed = backend.pack(problem.weight, problem.scale, problem.grid)
    monkeypatch.setattr(nvidia_scaled_mm, "product", sums_of_14_bits)
    out = nvidia_scaled_mm.nvidia_scaled_mm_linear(problem.x, *packed, activation.value)
    assert out.is_contiguous() and judge_scaled_mm(out, problem, activation).faults == []
    assert judge_exact(out, problem, activation).faults, "it is not exact, which is why it has a name"
    wrong = dataclasses.replace(problem, scale=problem.scale.roll(1, 1))
    assert judge_scaled_mm(out, wrong, activation).faults
    assert judge_scaled_mm((out.float() * 1.004).bfloat16(), problem, activation).faults


def test_what_torch_does_not_take_stays_exact(monkeypatch):
    monkeypatch.setattr(nvidia_scaled_mm, "product", lambda *_: pytest.fail("it was handed over"))
    w8a8, w8a16 = Activation.W8A8, Activation.W8A16
    for m, widths, k, dtype, bias, activation in (
        (64, (128,), 256, torch.bfloat16, False, w8a8),
        (65, (128,), 256, torch.float16, False, w8a8),
        (65, (128,), 256, torch.bfloat16, True, w8a8),
        (65, (128,), 256, torch.bfloat16, False, w8a16),
        (65, (100, 28), 256, torch.bfloat16, False, w8a8),
        (65, (128,), 200, torch.bfloat16, False, w8a8),
    ):
        problem = random_problem(m, widths, k, dtype=dtype, bias=bias)
        packed = backend.pack(problem.weight, problem.scale, problem.grid)
        out = nvidia_scaled_mm.nvidia_scaled_mm_linear(problem.x, *packed, activation.value, problem.bias)
        assert_exact(out, problem, activation)
