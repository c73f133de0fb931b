"""Experts inside vLLM-Ascend 0.30.0rc2: its model, its loader, its dispatch and combine around this package's scheme.

A small mixture of experts as vLLM-Ascend builds it, on a CPU, with real weights. A token meets two operators of the
NPU, and here they are what CANN's documentation says of them (`init_routing`, `unpermute`).
"""

import copy
import dataclasses
import importlib.metadata
import multiprocessing
import pickle
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

if importlib.metadata.version("vllm-ascend") == "0.23.0":
    pytest.skip("vLLM-Ascend 0.23.0 has no such schemes: experts are refused there", allow_module_level=True)

import torch_npu
from torch._subclasses.fake_tensor import FakeTensorMode
from vllm.config import set_current_vllm_config
from vllm.forward_context import override_forward_context
from vllm_ascend.ascend_config import init_ascend_config
from vllm_ascend.ascend_forward_context import MoECommType
from vllm_ascend.ops.fused_moe import token_dispatcher
from vllm_ascend.ops.fused_moe.moe_comm_method import AllGatherCommImpl
from vllm_ascend.quantization.quant_type import QuantType

from qwen3_fp8_ascend import ops
from qwen3_fp8_ascend.errors import BlockFp8Error
from qwen3_fp8_ascend.format import Activation, BlockSize
from qwen3_fp8_ascend.serving import free_port
from qwen3_fp8_ascend.testing.experts import ExpertsProblem, assert_layer_exact, random_experts
from qwen3_fp8_ascend.testing.models import QWEN3_30B_A3B
from qwen3_fp8_ascend.vllm_plugin import ascend_schemes, loading
from qwen3_fp8_ascend.vllm_plugin.ascend_schemes import NpuExpertsMethod, NpuLinearMethod
from tests.test_containers import LLM_COMPRESSOR

from .conftest import BLOCK_FP8, MOE, NPU, engine_config, initialize, prepare_rank, write_config

EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = 6, 3, 256, 128
SMALL = MOE | {
    "num_experts": EXPERTS,
    "num_experts_per_tok": TOP_K,
    "moe_intermediate_size": INTERMEDIATE,
    "num_hidden_layers": 1,
}


def init_routing(
    x: torch.Tensor,
    expert_idx: torch.Tensor,
    *,
    scale: torch.Tensor | None,
    active_num: int,
    expert_num: int,
    expert_tokens_num_type: int,
    expert_tokens_num_flag: bool,
    active_expert_range: list[int],
    quant_mode: int,
) -> tuple[torch.Tensor, ...]:
    """aclnnMoeInitRoutingV2, dropless, without quantization: rows of x sorted by expert, stably.

    Only the experts of a range have rows; what stands behind theirs is not written (here NaN), and the place of a row
    that is not there is -1. Type 1: each expert's count.
    """
    assert (scale, quant_mode, expert_tokens_num_type, expert_tokens_num_flag) == (None, -1, 1, True)
    first, last = active_expert_range
    assert 0 <= first < last <= expert_num and active_num == expert_idx.numel()
    flat = expert_idx.flatten().long()
    active = (flat >= first) & (flat < last)
    order = torch.where(active, flat, expert_num).sort(stable=True).indices[: int(active.sum())]
    expanded = torch.full((active_num, x.shape[1]), torch.nan, dtype=x.dtype)
    expanded[: len(order)] = x[order // expert_idx.shape[1]]
    place = torch.full((active_num,), -1, dtype=torch.int32)
    place[order] = torch.arange(len(order), dtype=torch.int32)
    return expanded, place, torch.bincount(flat[active] - first, minlength=last - first), torch.empty(0)


def unpermute(permuted_tokens: torch.Tensor, sorted_indices: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
    """aclnnMoeTokenUnpermute: the weighted sum of each token's rows, weights and rows of one dtype."""
    assert probs.dtype == permuted_tokens.dtype
    rows = permuted_tokens[sorted_indices.long()].view(*probs.shape, -1)
    out = torch.zeros_like(rows[:, 0])
    for slot in range(probs.shape[1]):
        out = out + rows[:, slot] * probs[:, slot : slot + 1]
    return out


@dataclasses.dataclass
class Layer:
    """A layer of routed experts of vLLM-Ascend's, the weights that were loaded into it, and how to call it."""

    model: Any
    routed: Any
    problem: ExpertsProblem
    activation: Activation
    context: SimpleNamespace

    def __call__(self, problem: ExpertsProblem) -> torch.Tensor:
        result = self.routed.quant_method.apply(
            self.routed, problem.x, problem.topk_weights, problem.topk_ids, None, None
        )
        out: torch.Tensor = result.routed_out
        return out

    def expected(self, problem: ExpertsProblem) -> torch.Tensor:
        operands = self.routed.packed_w13_weight, self.routed.packed_w2_weight
        return ops.block_experts(problem.x, *operands, problem.topk_weights, problem.topk_ids, self.activation)


def tensors_of(problem: ExpertsProblem) -> Iterator[tuple[str, torch.Tensor]]:
    """A checkpoint's tensors."""
    for expert in range(EXPERTS):
        gate, up = problem.w13[expert].view(torch.uint8).split(INTERMEDIATE)
        rows = problem.w13_scale[expert].split(1)
        parts = {"gate_proj": (gate, rows[0]), "up_proj": (up, rows[1])}
        parts["down_proj"] = problem.w2[expert].view(torch.uint8), problem.w2_scale[expert]
        for name, (codes, scale) in parts.items():
            prefix = f"model.layers.0.mlp.experts.{expert}.{name}"
            yield f"{prefix}.weight", codes.view(torch.float8_e4m3fn)
            yield f"{prefix}.weight_scale_inv", scale


@pytest.fixture(params=["W8A8", "W8A16"])
def layer(
    request: pytest.FixtureRequest, tmp_path: Path, rank: None, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Layer]:
    """Built, loaded and packed as a worker does it, by the reference's arithmetic."""
    activation = Activation[request.param]
    folder = write_config(tmp_path / "moe", **SMALL, quantization_config=BLOCK_FP8)
    settings = {"qwen3_fp8_ascend": {"backend": "reference", "activation": activation}}
    config = engine_config(folder, hf_overrides=settings, load_format="safetensors")
    model = initialize(config, torch.device("cpu"))
    problem = random_experts(9, EXPERTS, TOP_K, HIDDEN, INTERMEDIATE)
    loaded = model.load_weights(tensors_of(problem))
    assert {name.rpartition(".")[2] for name in loaded} >= {"w13_weight", "w2_weight"}
    [routed] = [m for m in model.modules() if isinstance(getattr(m, "quant_method", None), NpuExpertsMethod)]
    with set_current_vllm_config(config):
        routed.quant_method.process_weights_after_loading(routed)
    monkeypatch.setattr(torch_npu, "npu_moe_init_routing_v2", init_routing)
    monkeypatch.setattr(torch_npu, "npu_moe_token_unpermute", unpermute)
    monkeypatch.setattr(torch.npu, "current_stream", lambda: SimpleNamespace(record_event=lambda: None))
    context = SimpleNamespace(
        moe_comm_type=MoECommType.ALLGATHER, moe_comm_method=AllGatherCommImpl(routed.moe_config), additional_kwargs={}
    )
    context.additional_kwargs = vars(context)  # where the second model runner looks
    with override_forward_context(context), torch.no_grad():
        yield Layer(model, routed, problem, activation, context)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_their_dispatch_and_combine_around_our_scheme(layer: Layer, dtype: torch.dtype) -> None:
    """Bit for bit `ops.block_experts`, and so the specification."""
    problem = dataclasses.replace(layer.problem, x=layer.problem.x.to(dtype))
    got = layer(problem)
    assert got.dtype == dtype and torch.equal(got, layer.expected(problem))
    assert_layer_exact(got, problem, layer.activation)


def of_rank(layer: Layer, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the layer that of a rank of two, with half of the experts."""
    half = EXPERTS // 2
    mine = slice(rank * half, (rank + 1) * half)
    expert_map = torch.full((EXPERTS,), -1, dtype=torch.int32)
    expert_map[mine] = torch.arange(half, dtype=torch.int32)
    for name in ("packed_w13_weight", "packed_w2_weight"):
        whole = getattr(layer.routed, name)
        part = dataclasses.replace(whole, tensors=tuple(t[mine] for t in whole.tensors), groups=half)
        monkeypatch.setattr(layer.routed, name, part)
    monkeypatch.setattr(type(layer.routed), "ascend_expert_map", expert_map)
    moe_config = copy.copy(layer.routed.moe_config)
    moe_config.num_local_experts = half
    monkeypatch.setattr(token_dispatcher, "get_ep_group", lambda: SimpleNamespace(rank_in_group=rank))
    layer.context.moe_comm_method = AllGatherCommImpl(moe_config)


@pytest.mark.parametrize("rank_", [0, 1])
def test_expert_parallelism(layer: Layer, rank_: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank's part of the sum; rows that nobody owns are NaN when they come, and leave no trace."""
    of_rank(layer, rank_, monkeypatch)
    problem = layer.problem
    problem.topk_ids[0] = torch.tensor([0, 1, 2])  # on the first rank alone
    local = layer.routed.ascend_expert_map[problem.topk_ids]
    got = layer(problem)
    assert torch.equal(got, layer.expected(dataclasses.replace(problem, topk_ids=local)))
    assert bool(got[0].any()) == (rank_ == 0)


def test_a_rank_to_which_no_token_comes(layer: Layer, monkeypatch: pytest.MonkeyPatch) -> None:
    of_rank(layer, 1, monkeypatch)
    layer.problem.topk_ids[:] %= EXPERTS // 2
    assert not layer(layer.problem).any()


def count_as_ends(given: Any) -> torch.Tensor:
    return torch.as_tensor(given.group_list)


def one_row_late(given: Any) -> torch.Tensor:
    return (given.group_list.cumsum(0) + 1).clamp(max=given.hidden_states.shape[0])


@pytest.mark.parametrize("defect", [None, count_as_ends, one_row_late])
def test_a_list_that_is_misread_is_found(layer: Layer, monkeypatch: pytest.MonkeyPatch, defect: Any) -> None:
    expected = layer.expected(layer.problem)
    if defect is not None:
        monkeypatch.setattr(ascend_schemes, "cumulative", defect)
    if defect is count_as_ends:
        with pytest.raises(BlockFp8Error, match="ends of the experts' rows"):  # the CPU looks
            layer(layer.problem)
        return
    assert torch.equal(layer(layer.problem), expected) == (defect is None)


def test_a_row_of_nobody_s_would_be_found(layer: Layer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the zeros the NaN of a row that nobody owns reaches every token of another rank's expert."""
    of_rank(layer, 1, monkeypatch)
    layer.problem.topk_ids[:] %= EXPERTS // 2
    monkeypatch.setattr(torch.Tensor, "masked_fill_", lambda tensor, mask, value: tensor)
    monkeypatch.setattr(
        ascend_schemes.ops, "grouped_linear", lambda x, w, *_, **__: x.new_full((len(x), w.n), torch.nan)
    )
    assert layer(layer.problem).isnan().any()


@pytest.mark.parametrize("comm", [MoECommType.MC2, MoECommType.ALLTOALL])
def test_rows_that_go_back_to_other_ranks_are_rounded(layer: Layer, comm: MoECommType) -> None:
    """Their operators take the activations' dtype; the list is cumulative there, or counts."""
    problem = random_experts(7, EXPERTS, 1, HIDDEN, INTERMEDIATE)
    counts = torch.tensor([3, 0, 2, 0, 1, 1])
    for kind, groups in ((0, counts.cumsum(0)), (1, counts)):
        given = SimpleNamespace(
            hidden_states=problem.x, layer=layer.routed, group_list=groups, group_list_type=kind, activation="silu"
        )
        scheme = layer.routed.quant_method.quant_method
        assert scheme.supports_fused_activation("silu") and not scheme.supports_fused_activation("gelu")
        a, scale = scheme.apply_gmm1_act_quant(given)
        assert scale is None and a.dtype == problem.x.dtype
        outs = {}
        for layer.context.moe_comm_type in (comm, MoECommType.ALLGATHER):
            outs[layer.context.moe_comm_type] = scheme.apply_gmm2(given, a, None)
        assert outs[MoECommType.ALLGATHER].dtype == torch.float32
        assert torch.equal(outs[comm], outs[MoECommType.ALLGATHER].to(problem.x.dtype))


def test_weights_pushed_into_experts_that_serve(layer: Layer) -> None:
    """In place, by `load_weights` alone, and never a mixture of old and new ones."""
    before = [t.data_ptr() for t in (*layer.routed.packed_w13_weight.tensors, *layer.routed.packed_w2_weight.tensors)]
    other = random_experts(9, EXPERTS, TOP_K, HIDDEN, INTERMEDIATE, seed=1)
    *tensors, last = tensors_of(other)
    layer.model.load_weights(tensors)
    with pytest.raises(BlockFp8Error, match=r"only some[\s\S]*1 are missing"):
        layer(layer.problem)
    layer.model.load_weights([last])
    assert_layer_exact(layer(other), other, layer.activation)
    after = [t.data_ptr() for t in (*layer.routed.packed_w13_weight.tensors, *layer.routed.packed_w2_weight.tensors)]
    assert after == before


@pytest.mark.parametrize("quantization", [BLOCK_FP8, LLM_COMPRESSOR], ids=["weight_scale_inv", "weight_scale"])
def test_the_scheme_declares_what_is_registered(tmp_path: Path, rank: None, quantization: dict[str, Any]) -> None:
    """So that vLLM-Ascend's own methods could declare it: names, shapes, dtypes, and "not written yet"."""
    folder = write_config(tmp_path / "again", **SMALL, quantization_config=quantization)
    config = engine_config(folder)
    model = initialize(config, torch.device("cpu"))
    seen = set()
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if isinstance(method, NpuExpertsMethod):
            sizes = EXPERTS, INTERMEDIATE, HIDDEN, torch.bfloat16
            scheme = method.quant_method
            declared = scheme.get_weight(*sizes) | scheme.get_dynamic_quant_param(*sizes)
            assert scheme.quant_type == module.quant_type == QuantType.NONE and not method.supports_eplb
        elif isinstance(method, NpuLinearMethod):
            n, k = module.weight.shape
            declared = method.quant_method.get_weight(k, n, torch.bfloat16)
            declared |= method.quant_method.get_pergroup_param(k, n, torch.bfloat16)
            assert declared.pop("_block_quant_scale") == (128, 128)
        else:
            continue
        seen.add(type(method))
        registered = {name: parameter.data for name, parameter in module.named_parameters(recurse=False)}
        assert registered.keys() == declared.keys()
        for name, tensor in declared.items():
            assert (tensor.shape, tensor.dtype) == (registered[name].shape, registered[name].dtype), name
            assert torch.equal(tensor.nan_to_num(7), registered[name].nan_to_num(7)), name
    assert seen == {NpuExpertsMethod, NpuLinearMethod}


def test_linears_are_called_with_the_rank(layer: Layer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(
        ascend_schemes.BlockFp8LinearScheme,
        "apply",
        lambda self, layer, x, bias=None, tp_rank=-1: seen.append(tp_rank) or x.new_zeros(len(x), layer.output_size),
    )
    config = engine_config(write_config(tmp_path / "again", **SMALL, quantization_config=BLOCK_FP8))
    model = initialize(config, torch.device("cpu"))
    linears = [m for m in model.modules() if isinstance(getattr(m, "quant_method", None), NpuLinearMethod)]
    for linear in linears:
        linear.quant_method.apply(linear, torch.zeros(1, linear.input_size))
    assert len(linears) == 3 and seen == [0, 0, 0]


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"enable_fused_mc2": 1}, r"fused MC2[\s\S]*mlp\.experts[\s\S]*int8, int4, MXFP8"),
        ({"mix_placement": True}, r"shared experts cannot be placed"),
        ({"eplb_config": {"num_redundant_experts": 2}}, r"cannot move between ranks[\s\S]*num_redundant_experts=2"),
        ({"eplb_config": {"dynamic_eplb": True}}, r"cannot move between ranks[\s\S]*dynamic_eplb=True"),
    ],
)
def test_what_vllm_ascend_can_do_with_experts_and_these_cannot(
    setting: dict[str, Any], said: str, tmp_path: Path, rank: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused when the layer is made, before a weight is read."""
    monkeypatch.setenv("DYNAMIC_EPLB", "true")
    folder = write_config(tmp_path / "moe", **SMALL, quantization_config=BLOCK_FP8)
    config = engine_config(folder, additional_config=setting)
    try:
        with pytest.raises(BlockFp8Error, match=said):
            initialize(config, torch.device("cpu"))
    finally:
        engine_config(folder)  # vLLM-Ascend keeps the last one


@pytest.mark.usefixtures("any_backend")
def test_experts_that_the_checkpoint_leaves_alone_are_theirs(tmp_path: Path, build: Callable[[Any], Any]) -> None:
    from vllm_ascend.ops.fused_moe.routed_experts import AscendUnquantizedFusedMoEMethod

    ignored = [f"model.layers.0.mlp.experts.{e}.{p}_proj" for e in range(EXPERTS) for p in ("gate", "up", "down")]
    quantization = BLOCK_FP8 | {"modules_to_not_convert": ignored}
    model = build(engine_config(write_config(tmp_path / "moe", **SMALL, quantization_config=quantization)))
    assert type(model.model.layers[0].mlp.experts.routed_experts.quant_method) is AscendUnquantizedFusedMoEMethod


def methods_of(model: torch.nn.Module) -> Counter[tuple[str, str]]:
    """How many layers of vLLM-Ascend's have which method."""
    pairs = [(type(m).__name__, type(m.quant_method).__name__) for m in model.modules() if hasattr(m, "quant_method")]
    return Counter(pairs)


def qwen3_30b(folder: Path, **changes: Any) -> Any:
    gates = [f"model.layers.{i}.mlp.gate" for i in range(48)]
    quantization = BLOCK_FP8 | {"modules_to_not_convert": ["lm_head", *gates]}
    return engine_config(write_config(folder, **QWEN3_30B_A3B, quantization_config=quantization), **changes)


def report_methods(rank_: int, ranks: int, port: int, pickled: bytes, sender: Any) -> None:
    """What a worker's process builds of a pickled engine's config."""
    config = pickle.loads(pickled)
    torch.npu.current_device = lambda: 0  # a communicator between ranks asks the driver
    loading.select_backend = lambda *of: None  # the fixture `any_backend` is the other process's
    init_ascend_config(config)
    with prepare_rank(config, rank_, ranks, port):
        with FakeTensorMode(allow_non_fake_inputs=True):
            counts = methods_of(initialize(config, NPU))
        sender.send(counts)


def test_every_process_has_our_methods_on_every_layer_of_qwen3_30b_a3b(tmp_path: Path) -> None:
    """Two spawned ranks, tensor-parallel. Of 144 linears the checkpoint leaves 48, the routers, as they are."""
    config = qwen3_30b(tmp_path / "moe", tensor_parallel_size=2)
    context = multiprocessing.get_context("spawn")
    port, jobs = free_port(), []
    for rank_ in range(2):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=report_methods, args=(rank_, 2, port, pickle.dumps(config), sender))
        process.start()
        sender.close()
        jobs.append((process, receiver))
    for process, receiver in jobs:
        try:
            counts = receiver.recv()
        finally:
            process.join(300)
        assert process.exitcode == 0
        assert counts["AscendQKVParallelLinear", "NpuLinearMethod"] == 48
        assert counts["AscendRowParallelLinear", "NpuLinearMethod"] == 48
        assert counts["AscendReplicatedLinear", "AscendUnquantizedLinearMethod"] == 48
        assert counts["AscendRoutedExperts", "NpuExpertsMethod"] == 48
        assert {method for _, method in counts} == {
            "NpuLinearMethod",
            "NpuExpertsMethod",
            "AscendUnquantizedLinearMethod",
            "UnquantizedEmbeddingMethod",
        }


def test_a_split_through_blocks_is_refused_before_loading(tmp_path: Path, rank: None) -> None:
    """768 channels on 4 ranks are a block and a half each; whole experts on each rank are served."""
    from qwen3_fp8_ascend.vllm_plugin.experts import BlockFp8ExpertsMethod

    parallel = SimpleNamespace(tp_size=4, enable_eplb=False)
    moe = SimpleNamespace(intermediate_size=768, moe_parallel_config=parallel)
    method = SimpleNamespace(moe=moe, block=BlockSize(), prefix="model.layers.0.mlp.experts")
    with pytest.raises(BlockFp8Error, match="enable-expert-parallel"):
        BlockFp8ExpertsMethod._check_partition(method)  # type: ignore[arg-type]
