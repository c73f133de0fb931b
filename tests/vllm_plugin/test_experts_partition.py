"""Experts whose intermediate channels are cut within blocks, without ranks: all parts together are the uncut layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3_fp8_ascend import ops
from qwen3_fp8_ascend.backends import cpu
from qwen3_fp8_ascend.format import Activation, BlockSize
from qwen3_fp8_ascend.glu import SILU
from qwen3_fp8_ascend.testing.experts import ExpertsProblem, assert_layer_exact, random_experts
from qwen3_fp8_ascend.testing.judges import rel_l2
from qwen3_fp8_ascend.vllm_plugin.partition import Partition, partitions_of_experts
from tests.support.cpu_levels import ISAS, instruction_set, needs_cpu_backend, same_bits
from tests.support.cut_experts import Part, cut

pytestmark = needs_cpu_backend

FP32_SUMS = 2e-6
"""Relative distance of sums of the same fp32 numbers in another order: the ranks', each rounded to fp32."""

PATTERNS = {
    "192 of 384": (384, 2),  # one block is shared by two ranks: Qwen3-235B on 8 ranks, Qwen3-30B on 4
    "96 of 768": (768, 8),  # ranks that share their first block, their last one, or both: Qwen3-30B on 8
    "64 of 512": (512, 8),  # two ranks have one block: Qwen3-Next on 8
    "320 of 640": (640, 2),
    "32 of 256": (256, 8),  # four ranks have one block
    "80 of 400": (400, 5),  # the last block is ragged
    "1 of 3": (3, 3),
}
"""Intermediate channels and ranks."""

Between = Callable[[torch.Tensor], torch.Tensor]


def layer(
    p: ExpertsProblem,
    parts: list[Part],
    activation: Activation,
    backend: str = "cpu",
    pad: Callable[[Part, torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The sum over the ranks, and the activation that each rank's down projection takes.

    pad: what a rank does with its activation and what all gave to the exchange.
    """
    packed = [part.packed(backend) for part in parts]
    pad = pad or (lambda part, a, gathered: part.down.pad(a, lambda _: gathered))
    given: list[torch.Tensor] = []
    taken: list[torch.Tensor] = []

    def collect(own: torch.Tensor) -> torch.Tensor:
        given.append(own)
        return own.repeat(1, len(parts))

    def run(number: int, between: Between) -> torch.Tensor:
        needed = between if parts[number].down.pads else None
        return ops.block_experts(p.x, *packed[number], p.topk_weights, p.topk_ids, activation, between=needed)

    for number, part in enumerate(parts):
        run(number, lambda a, part=part: part.down.pad(a, collect))  # type: ignore[misc]
    divided = any(part.down.shared for part in parts)
    assert len(given) == (len(parts) if divided else 0)
    gathered = torch.cat(given, 1) if given else torch.zeros(0)

    def padded(part: Part, a: torch.Tensor) -> torch.Tensor:
        taken.append(pad(part, a, gathered))
        return taken[-1]

    outs = [run(number, lambda a, part=part: padded(part, a)) for number, part in enumerate(parts)]  # type: ignore[misc]
    return torch.stack(outs).sum(0), taken


def uncut_activation(p: ExpertsProblem, activation: Activation) -> torch.Tensor:
    """What the uncut layer's down projection takes, a row for each slot, sorted by expert."""
    flat = p.topk_ids.flatten()
    order = flat.sort(stable=True).indices
    ends = torch.bincount(flat, minlength=p.w2.shape[0]).cumsum(0)
    h = ops.grouped_linear(p.x[order // p.topk_ids.shape[1]], p.pack("cpu")[0], ends, activation)
    return cpu.glu_product(h, SILU)


@pytest.mark.parametrize("activation", list(Activation))
@pytest.mark.parametrize("pattern", PATTERNS)
def test_parts_add_up(pattern: str, activation: Activation) -> None:
    """To the oracle, and to the uncut layer but for the order of the last sums."""
    inner, ranks = PATTERNS[pattern]
    p = random_experts(9, 5, 3, 200, inner, dtype=torch.float32, seed=ranks)
    total, _ = layer(p, cut(p, ranks, activation), activation)
    assert_layer_exact(total, p, activation)
    assert rel_l2(total, p.layer("cpu", activation)) < FP32_SUMS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("isa", ISAS)
def test_every_rank_has_the_codes_and_scales_of_the_uncut_layer(isa: str, pattern: str, dtype: torch.dtype) -> None:
    """Bit for bit, on every instruction set."""
    inner, ranks = PATTERNS[pattern]
    p = random_experts(7, 4, 2, 136, inner, dtype=dtype, seed=1)
    for activation in (Activation.W8A8, Activation.W8A8_UE8M0):
        with instruction_set(isa):
            parts = cut(p, ranks, activation)
            _, taken = layer(p, parts, activation)
            want = uncut_activation(p, activation)
            codes, scale = ops.quantize_activation(want, activation=activation, backend="cpu")
            assert len(taken) == ranks
            for part, a in zip(parts, taken, strict=True):
                down = part.down
                own_codes, own_scale = ops.quantize_activation(a, activation=activation, backend="cpu")
                own, columns = own_codes.view(torch.uint8)[:, down.front : down.front + down.k], down.scale_columns
                assert torch.equal(own, codes.view(torch.uint8)[:, down.column : down.column + down.k])
                assert same_bits(own_scale, scale[:, columns.first : columns.first + columns.count])


@pytest.mark.parametrize("activation", list(Activation))
@settings(max_examples=25)
@given(
    ranks=st.integers(1, 8),
    inner=st.integers(1, 150),
    block=st.sampled_from([BlockSize(), BlockSize(64, 64), BlockSize(32, 256), BlockSize(1, 128), BlockSize(128, 4)]),
    m=st.integers(1, 9),
    top_k=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_any_cut_of_any_block_adds_up(
    activation: Activation, ranks: int, inner: int, block: BlockSize, m: int, top_k: int, seed: int
) -> None:
    """By the specification's linears, which take every block."""
    p = random_experts(m, 3, top_k, 72, ranks * inner, block=block, dtype=torch.float32, seed=seed)
    total, _ = layer(p, cut(p, ranks, activation), activation, "reference")
    assert_layer_exact(total, p, activation)


FAULTS: dict[str, Callable[[Part, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "no exchange": lambda part, a, _: torch.nn.functional.pad(a, (part.down.front, part.down.back)),
    "the first rank's maxima for all": lambda part, a, gathered: part.down.pad(
        a, lambda _: gathered[:, :2].repeat(1, 4)
    ),
    "no phase of columns": lambda part, a, gathered: part.down.pad(a, lambda _: gathered).roll(-part.down.front, 1),
}


@pytest.mark.parametrize("fault", [*FAULTS, "no phase of rows", "no phase of scales"])
def test_what_is_left_out_is_noticed(fault: str) -> None:
    p = random_experts(9, 5, 3, 200, 768, dtype=torch.float32)
    parts = cut(p, 4, Activation.W8A8)
    good, _ = layer(p, parts, Activation.W8A8)
    assert_layer_exact(good, p)
    if fault == "no phase of rows":  # each rank's rows as if a block began with them
        grid = dataclasses.replace(parts[1].gate_up.grid, widths=(128, 64, 128, 64))
        parts = [
            dataclasses.replace(part, gate_up=_with_grid(part.gate_up, grid)) if part.down.front else part
            for part in parts
        ]
    elif fault == "no phase of scales":  # as vLLM's own loader cuts them: two of the six blocks for each rank, unless
        parts = [  # there are no more
            dataclasses.replace(part, w2_scale=p.w2_scale[:, :, first : first + 2].contiguous())
            for first, part in zip((0, 2, 3, 4), parts, strict=True)
        ]
    bad, _ = layer(p, parts, Activation.W8A8, pad=FAULTS.get(fault))
    with pytest.raises(AssertionError):
        assert_layer_exact(bad, p)
    assert rel_l2(good, p.layer("cpu")) < FP32_SUMS < 1e-4 < rel_l2(bad, p.layer("cpu"))


def _with_grid(partition: Partition, grid: object) -> Partition:
    """A partition that is packed by another grid."""
    changed = dataclasses.replace(partition)
    changed.__dict__["grid"] = grid
    return changed


@pytest.mark.parametrize("activation", list(Activation))
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_with_its_token(activation: Activation, value: float) -> None:
    p = random_experts(6, 4, 2, 136, 384, dtype=torch.float32, seed=2)
    p.x[3, 77] = value
    want = p.layer("cpu", activation)
    total, _ = layer(p, cut(p, 2, activation), activation)
    assert torch.equal(total.isfinite(), want.isfinite()) and torch.equal(total.isnan(), want.isnan())
    assert total[[0, 1, 2, 4, 5]].isfinite().all() and not total[3].isfinite().all()


def test_what_a_cut_costs() -> None:
    """Only the columns of down are filled up to the block's beginning: 64 columns of zeros beside 192."""
    gate_up, down = partitions_of_experts(BlockSize(), 2048, 192, 1, 4, Activation.W8A8)
    assert (gate_up.grid.widths, gate_up.grid.k) == ((64, 128, 64, 128), 2048)
    assert (down.front, down.back, down.grid.k) == (64, 0, 256)
    whole = partitions_of_experts(BlockSize(), 2048, 256, 1, 3, Activation.W8A8)
    assert not whole[1].pads and whole[0].grid.widths == (256, 256)
