"""What experts compute of gate and up: against vLLM's modules, in every form, and the numbers that are refused."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwen3_fp8_ascend.errors import BlockFp8Error
from qwen3_fp8_ascend.glu import GELU_TANH, SILU, Glu
from qwen3_fp8_ascend.testing.expert_strategies import GLUS

GATE = torch.cat([torch.linspace(-12, 12, 97), torch.tensor([0.0, -0.0, 1e-30, -200.0, 200.0])]).double()
UP = GATE.roll(31)


def test_without_bounds_it_is_silu() -> None:
    assert torch.equal(SILU(GATE, UP), torch.nn.functional.silu(GATE) * UP)
    unbounded = Glu(beta=1e-30)  # takes the other way
    assert unbounded != SILU
    torch.testing.assert_close(unbounded(GATE, UP), SILU(GATE, UP), rtol=1e-15, atol=1e-27)


def test_gelu_by_tanh() -> None:
    gelu = torch.nn.functional.gelu(GATE, approximate="tanh") * UP
    torch.testing.assert_close(
        GELU_TANH(GATE, UP), gelu, rtol=1e-6, atol=1e-13
    )  # its numbers are fp32's; 1 + tanh loses digits
    assert not torch.allclose(GELU_TANH(GATE, UP), torch.nn.functional.gelu(GATE) * UP, rtol=1e-4, atol=1e-4)


def test_bounds_are_where_they_are_said_to_be() -> None:
    """Numbers written out: gate 3, and up 5 and -5, within 2."""
    gate, up = torch.full((2,), 3.0).double(), torch.tensor([5.0, -5.0]).double()
    two, three = 2 / (1 + math.exp(-2)), 3 / (1 + math.exp(-3))
    assert Glu.clamped(2.0)(gate, up).tolist() == pytest.approx([2 * two, -2 * two])
    assert Glu.step(2.0)(gate, up).tolist() == pytest.approx([4, -4])
    assert Glu.step(2.9)(gate, up).tolist() == pytest.approx([2.9 * three, -2.9 * three])
    sharp = 2 / (1 + math.exp(-1.75 * 2))
    assert Glu.clamped(2.0, alpha=1.75, beta=1.0)(gate, up).tolist() == pytest.approx([3 * sharp, -sharp])


@pytest.mark.parametrize("glu", dict.fromkeys(GLUS), ids=str)
def test_nan_stays_nan(glu: Glu) -> None:
    numbers = torch.tensor([1.0, math.nan])
    assert glu(numbers, numbers.flip(0)).isnan().all()


@pytest.mark.parametrize("limit", [7.0, 1.0])
def test_it_is_what_vllm_computes(limit: float) -> None:
    activation = pytest.importorskip("vllm.model_executor.layers.activation", reason="vLLM is not installed")
    config = pytest.importorskip("vllm.config")
    x = torch.cat([GATE, UP])
    with config.set_current_vllm_config(config.VllmConfig()):
        theirs = {
            Glu.step(limit): activation.SwigluStepAndMul(limit),
            Glu.clamped(limit): activation.SiluAndMulWithClamp(limit),
            Glu.clamped(limit, 1.702, 1.0): activation.SiluAndMulWithClamp(limit, Glu(alpha=1.702).alpha, 1.0),
        }
    for glu, module in theirs.items():
        torch.testing.assert_close(glu(GATE, UP), module.forward_native(x), rtol=1e-14, atol=0)


@pytest.mark.parametrize("field", ["gate_limit", "act_limit", "up_limit", "alpha", "cubic", "beta"])
@given(number=st.one_of(st.floats(), st.sampled_from([None, "7", [7.0], 10**400, 1e39])))
def test_any_number_is_taken_as_fp32_or_refused(field: str, number: object) -> None:
    try:
        taken = getattr(Glu(**{field: number}), field)
    except BlockFp8Error as error:
        assert field in str(error) and "number of fp32" in str(error)
        good = isinstance(number, float) and math.isfinite(number) and 2.0**-149 <= abs(number) < 2.0**128
        assert not good or (number < 0 and field != "beta") or math.isinf(torch.tensor(number).item())
    else:
        assert isinstance(number, float) and taken == torch.tensor(number, dtype=torch.float32).item()
        assert field == "beta" or taken > 0 or (field == "cubic" and taken == 0)
        assert math.isfinite(taken) or field.endswith("_limit")
