"""Experts behind vLLM-Ascend's all-to-all and MC2: its dispatchers whole, on two ranks, around this package's scheme.

The ranks are threads. Of what an NPU or HCCL does there are stand-ins by documentation: the exchange of rows among
ranks, sorting them by expert, and the two MC2 operators. What these really do on NPUs is not shown here.
"""

import copy
import dataclasses
import itertools
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from .conftest import BEFORE_SCHEMES

if BEFORE_SCHEMES:
    pytest.skip("vLLM-Ascend 0.23.0 has no such schemes: experts are refused there", allow_module_level=True)

import torch_npu
from torch.nn.functional import silu
from vllm_ascend.ascend_forward_context import MoECommType
from vllm_ascend.ops.fused_moe import moe_comm_method, token_dispatcher

from qwen3_fp8_ascend import ops
from qwen3_fp8_ascend.errors import BlockFp8Error
from qwen3_fp8_ascend.testing.experts import ExpertsProblem, random_experts
from qwen3_fp8_ascend.vllm_plugin import ascend_schemes

from .expert_layer import EXPERTS, HIDDEN, INTERMEDIATE, TOP_K, Layer, loaded_layer, unpermute  # noqa: F401

RANKS = 2
LOCAL = EXPERTS // RANKS
TOKENS = (9, 5)
"""Of each rank."""


class Hub:
    """What threads that are ranks hand to each other."""

    def __init__(self) -> None:
        self.barrier = threading.Barrier(RANKS, timeout=120)
        self.local = threading.local()
        self.slots: dict[int, Any] = {}

    @property
    def rank(self) -> int:
        return int(self.local.rank)

    def exchange(self, value: Any) -> list[Any]:
        """Everyone's value, by rank."""
        self.slots[self.rank] = value
        self.barrier.wait()
        everyone = [self.slots[rank] for rank in range(RANKS)]
        self.barrier.wait()
        return everyone

    def group(self) -> Any:
        backend = SimpleNamespace(get_hccl_comm_name=lambda rank: "name")
        device_group = SimpleNamespace(_get_backend=lambda device: backend)
        return SimpleNamespace(device_group=device_group, rank_in_group=self.rank, world_size=RANKS)

    def all_to_all(self, rows: torch.Tensor, receive: Any, send: Any, group: Any) -> tuple[Any, torch.Tensor, Any]:
        """all_to_all_single with splits; the sender may free its rows afterwards."""
        parts = [part.clone() for part in rows.split([int(size) for size in send])]
        got = [parts[self.rank] for parts in self.exchange(parts)]
        assert [len(part) for part in got] == [int(size) for size in receive]
        return rows, torch.cat(got), SimpleNamespace(wait=lambda: None)

    def gather(self, tensor: torch.Tensor, group: Any) -> torch.Tensor:
        return torch.cat(self.exchange(tensor.clone()))

    def run(self, of_rank: Callable[[int], torch.Tensor]) -> list[torch.Tensor]:
        """`of_rank` on every rank at once; an error of any of them is raised, the first one that is not a wait's."""
        outs: dict[int, torch.Tensor] = {}
        errors: list[BaseException] = []

        def work(rank: int) -> None:
            self.local.rank = rank
            try:
                with torch.no_grad():
                    outs[rank] = of_rank(rank)
            except BaseException as error:
                errors.append(error)
                self.barrier.abort()

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(RANKS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for error in sorted(errors, key=lambda e: isinstance(e, threading.BrokenBarrierError)):
            raise error
        return [outs[rank] for rank in range(RANKS)]


def permute(
    tokens: torch.Tensor, indices: torch.Tensor, num_out_tokens: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """aclnnMoeTokenPermute: each token once for each of its indices, sorted by index, stably; and where each went."""
    order = indices.flatten().long().sort(stable=True).indices
    assert num_out_tokens in (None, len(order))
    place = torch.empty(len(order), dtype=torch.int32)
    place[order] = torch.arange(len(order), dtype=torch.int32)
    return tokens[order // (indices.shape[1] if indices.dim() == 2 else 1)], place


def unpermute_all(
    permuted_tokens: torch.Tensor, sorted_indices: torch.Tensor, probs: torch.Tensor | None = None, **shape: Any
) -> torch.Tensor:
    """aclnnMoeTokenUnpermute, also without weights: then every row goes back to its place."""
    if probs is None:
        return permuted_tokens[sorted_indices.long()]
    return unpermute(permuted_tokens, sorted_indices, probs)


class Mc2:
    """aclnnMoeDistributeDispatchV2 and CombineV2 without quantization, over a hub.

    Rows of a rank's experts are sorted by expert, then by the rank they come from; the list is cumulative. The buffer
    is larger than what comes, and the rest of it is not written (here NaN).
    """

    def __init__(self, hub: Hub) -> None:
        self.hub = hub

    def dispatch(self, *, x: torch.Tensor, expert_ids: torch.Tensor, **options: Any) -> tuple[Any, ...]:
        assert (options["quant_mode"], options["expert_token_nums_type"], options["scales"]) == (0, 0, None)
        assert options["moe_expert_num"] == EXPERTS and options["ep_rank_id"] == self.hub.rank
        everyone = self.hub.exchange((x.clone(), expert_ids.clone()))
        came, counts = [], []
        for expert in range(self.hub.rank * LOCAL, (self.hub.rank + 1) * LOCAL):
            found = [
                (source, token, slot)
                for source, (_, ids) in enumerate(everyone)
                for token, slot in (ids == expert).nonzero().tolist()
            ]
            came += found
            counts.append(len(found))
        rows = torch.full((sum(TOKENS) * TOP_K, x.shape[1]), torch.nan, dtype=x.dtype)
        for row, (source, token, _) in enumerate(came):
            rows[row] = everyone[source][0][token]
        ends = torch.tensor(list(itertools.accumulate(counts)), dtype=torch.int64)
        return rows, None, torch.tensor(came).view(-1, 3), ends, None, None, None

    def combine(self, *, expand_x: torch.Tensor, expert_scales: torch.Tensor, **options: Any) -> torch.Tensor:
        assert expert_scales.dtype == torch.float32 and options["comm_quant_mode"] == 0
        assert expand_x.dtype in (torch.bfloat16, torch.float16)
        everyone = self.hub.exchange((expand_x.clone(), options["assist_info_for_combine"]))
        out = torch.zeros(expert_scales.shape[0], TOP_K, expand_x.shape[1])
        for rows, came in everyone:
            for row, (source, token, slot) in enumerate(came.tolist()):
                if source == self.hub.rank:
                    out[token, slot] = rows[row].float() * expert_scales[token, slot]
        return out.sum(1).to(expand_x.dtype)


@dataclasses.dataclass
class Served:
    """The layer on two ranks, and how to call it."""

    layer: Layer
    hub: Hub
    problems: tuple[ExpertsProblem, ...]

    def __call__(self) -> list[torch.Tensor]:
        routed = [self._of(rank) for rank in range(RANKS)]

        def of_rank(rank: int) -> torch.Tensor:
            given = self.problems[rank]
            out: torch.Tensor = (
                routed[rank]
                .quant_method.apply(routed[rank], given.x, given.topk_weights, given.topk_ids, None, None)
                .routed_out
            )
            return out

        return self.hub.run(of_rank)

    def _of(self, rank: int) -> Any:
        mine = slice(rank * LOCAL, (rank + 1) * LOCAL)
        routed = copy.copy(self.layer.routed)
        for name in ("packed_w13_weight", "packed_w2_weight"):
            whole = getattr(self.layer.routed, name)
            part = dataclasses.replace(whole, tensors=tuple(t[mine] for t in whole.tensors), groups=LOCAL)
            object.__setattr__(routed, name, part)
        return routed

    def expected(self, rank: int, in_fp32: bool) -> torch.Tensor:
        """Every stage rounded to the activations' dtype; the sum in fp32 (MC2) or in that dtype (all-to-all)."""
        given, w13, w2 = self.problems[rank], self.layer.routed.packed_w13_weight, self.layer.routed.packed_w2_weight
        rows, place = permute(given.x, given.topk_ids)
        ends = torch.bincount(given.topk_ids.flatten().long(), minlength=EXPERTS).cumsum(0)
        gate, up = ops.grouped_linear(rows, w13, ends, self.layer.activation).float().chunk(2, dim=1)
        y = ops.grouped_linear((silu(gate) * up).to(rows.dtype), w2, ends, self.layer.activation)
        if not in_fp32:
            return unpermute(y, place, given.topk_weights.to(y.dtype))
        slots = y[place.long()].view(*given.topk_ids.shape, -1).float() * given.topk_weights.float().unsqueeze(-1)
        return slots.sum(1).to(y.dtype)


@pytest.fixture
def served(layer: Layer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    hub = Hub()
    problems = tuple(random_experts(m, EXPERTS, TOP_K, HIDDEN, INTERMEDIATE, seed=m) for m in TOKENS)
    mc2 = Mc2(hub)
    maps = torch.full((RANKS, EXPERTS), -1, dtype=torch.int32)
    for rank in range(RANKS):
        maps[rank, rank * LOCAL : (rank + 1) * LOCAL] = torch.arange(LOCAL, dtype=torch.int32)
    monkeypatch.setattr(type(layer.routed), "ascend_expert_map", property(lambda routed: maps[hub.rank]))
    config = SimpleNamespace(parallel_config=SimpleNamespace(tensor_parallel_size=1))
    for name, stand_in in {
        "get_ep_group": hub.group,
        "get_mc2_group": hub.group,
        "async_all_to_all": hub.all_to_all,
        "gather_from_sequence_parallel_region": hub.gather,
        "get_mc2_tokens_capacity": lambda: 16,
        "should_skip_allreduce_across_dp_group": lambda config: False,
        "get_current_vllm_config": lambda: config,
    }.items():
        monkeypatch.setattr(token_dispatcher, name, stand_in)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda group=None: hub.rank)
    monkeypatch.setattr(torch.npu, "current_device", lambda: torch.device("cpu"))
    # Of whole numbers, which a CPU's has not.
    monkeypatch.setattr(torch, "histc", lambda ids, bins, min, max: torch.bincount(ids.flatten(), minlength=bins))
    monkeypatch.setattr(torch_npu, "npu_moe_token_permute", permute)
    monkeypatch.setattr(torch_npu, "npu_moe_token_unpermute", unpermute_all)
    monkeypatch.setattr(torch_npu, "npu_moe_distribute_dispatch_v2", mc2.dispatch)
    monkeypatch.setattr(torch_npu, "npu_moe_distribute_combine_v2", mc2.combine)
    yield Served(layer, hub, problems)


KINDS = {
    MoECommType.ALLTOALL: moe_comm_method.AlltoAllCommImpl,
    MoECommType.MC2: moe_comm_method.MC2CommImpl,
}


def communicate(served: Served, kind: MoECommType) -> None:
    """Each rank's own communication method, without what prepares a model's tokens for it."""

    def make() -> Any:
        method = object.__new__(KINDS[kind])
        method.moe_config = copy.copy(served.layer.routed.moe_config)
        method.moe_config.num_local_experts = LOCAL
        method.lora_context = None
        method.token_dispatcher = method._get_token_dispatcher()
        return method

    def fused_experts(**options: Any) -> Any:
        return make().fused_experts(**options)

    served.layer.context.moe_comm_type = kind
    served.layer.context.moe_comm_method = SimpleNamespace(fused_experts=fused_experts)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_tokens_of_two_ranks_go_to_their_experts_and_back(served: Served, kind: MoECommType) -> None:
    """Bit for bit what one rank with all experts computes."""
    communicate(served, kind)
    for rank, got in enumerate(served()):
        assert torch.equal(got, served.expected(rank, in_fp32=kind is MoECommType.MC2))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_rank_to_which_nothing_comes(served: Served, kind: MoECommType) -> None:
    communicate(served, kind)
    for problem in served.problems:
        problem.topk_ids[:] %= LOCAL
    for rank, got in enumerate(served()):
        assert torch.equal(got, served.expected(rank, in_fp32=kind is MoECommType.MC2))


def always_counts(given: Any) -> torch.Tensor:
    return torch.as_tensor(given.group_list.to(torch.int64).cumsum(0))


def always_cumulative(given: Any) -> torch.Tensor:
    return torch.as_tensor(given.group_list.to(torch.int64))


@pytest.mark.parametrize(
    ("kind", "defect"), [(MoECommType.ALLTOALL, always_cumulative), (MoECommType.MC2, always_counts)]
)
def test_a_list_of_the_other_kind_is_found(
    served: Served, kind: MoECommType, defect: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All-to-all hands out counts, MC2 ends; a CPU looks at the list, and results differ where it looks right."""
    communicate(served, kind)
    monkeypatch.setattr(ascend_schemes, "cumulative", defect)
    try:
        outs = served()
    except BlockFp8Error as error:
        assert "ends of the experts' rows" in str(error)
        return
    assert any(
        not torch.equal(got, served.expected(rank, in_fp32=kind is MoECommType.MC2)) for rank, got in enumerate(outs)
    )


def test_rows_that_go_to_the_wrong_rank_are_found(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test itself can fail: an exchange that swaps what comes back is seen."""
    communicate(served, MoECommType.ALLTOALL)
    honest = served.hub.all_to_all

    def swapped(rows: torch.Tensor, *splits: Any) -> Any:
        kept, got, handle = honest(rows, *splits)
        return kept, got.flip(0), handle

    monkeypatch.setattr(token_dispatcher, "async_all_to_all", swapped)
    outs = served()
    assert not all(torch.equal(got, served.expected(rank, in_fp32=False)) for rank, got in enumerate(outs))
