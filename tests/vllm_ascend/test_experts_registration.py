"""Layers of a mixture of experts beside vLLM-Ascend 0.30.0rc2: which are ours, how declared, what is refused."""

import multiprocessing
import pickle
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from .conftest import BEFORE_SCHEMES

if BEFORE_SCHEMES:
    pytest.skip("vLLM-Ascend 0.23.0 has no such schemes: experts are refused there", allow_module_level=True)

from torch._subclasses.fake_tensor import FakeTensorMode
from vllm_ascend.ascend_config import init_ascend_config
from vllm_ascend.quantization.quant_type import QuantType

from qwen3_fp8_ascend.errors import BlockFp8Error
from qwen3_fp8_ascend.format import Activation, BlockSize
from qwen3_fp8_ascend.serving import free_port
from qwen3_fp8_ascend.testing.models import QWEN3_30B_A3B
from qwen3_fp8_ascend.vllm_plugin import ascend_schemes, loading
from qwen3_fp8_ascend.vllm_plugin.ascend_schemes import NpuExpertsMethod, NpuLinearMethod
from tests.test_containers import LLM_COMPRESSOR

from .conftest import BLOCK_FP8, NPU, engine_config, initialize, prepare_rank, write_config
from .expert_layer import EXPERTS, HIDDEN, INTERMEDIATE, SMALL, Layer, loaded_layer  # noqa: F401


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


def test_router_weights_on_the_input_are_refused(tmp_path: Path, rank: None) -> None:
    """Llama 4's: only one of vLLM-Ascend's dispatches multiplies by them."""
    engine_config(write_config(tmp_path / "moe", **SMALL, quantization_config=BLOCK_FP8))
    with pytest.raises(BlockFp8Error, match=r"weights on their input[\s\S]*mlp\.experts"):
        NpuExpertsMethod(SimpleNamespace(apply_router_weight_on_input=True), BlockSize(), prefix="mlp.experts")


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


def report_ranks(port: int, pickled: bytes, senders: list[Any]) -> None:
    """A fork of this process, which has imported vLLM and registered nothing, is a rank."""
    fork = multiprocessing.get_context("fork")
    ranks = [
        fork.Process(target=report_methods, args=(rank_, len(senders), port, pickled, sender))
        for rank_, sender in enumerate(senders)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    sys.exit(any(process.exitcode for process in ranks))


def test_every_process_has_our_methods_on_every_layer_of_qwen3_30b_a3b(tmp_path: Path) -> None:
    """Two ranks, tensor-parallel. Of 144 linears the checkpoint leaves 48, the routers, as they are."""
    config = qwen3_30b(tmp_path / "moe", tensor_parallel_size=2)
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe(duplex=False) for _ in range(2)]
    senders = [sender for _, sender in pipes]
    process = context.Process(target=report_ranks, args=(free_port(), pickle.dumps(config), senders))
    process.start()
    process.join(300)
    assert process.exitcode == 0
    for receiver, _ in pipes:
        counts = receiver.recv()
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


def test_a_split_through_blocks_needs_ranks_that_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    """768 channels on 4 ranks are a block and a half each: refused where those are not vLLM's tensor-parallel ranks."""
    from qwen3_fp8_ascend.vllm_plugin import linear
    from qwen3_fp8_ascend.vllm_plugin.experts import BlockFp8ExpertsMethod

    parallel = SimpleNamespace(tp_size=4, tp_rank=1, enable_eplb=False)
    method: Any = SimpleNamespace(
        moe=SimpleNamespace(intermediate_size=768, moe_parallel_config=parallel),
        block=BlockSize(),
        prefix="model.layers.0.mlp.experts",
        activation=Activation.W8A8,
    )
    group = SimpleNamespace(rank_in_group=1, world_size=4)
    monkeypatch.setattr(linear, "get_tp_group", lambda: group)
    partitions = BlockFp8ExpertsMethod._partitions(method, 2048, 192)
    assert (partitions["w13"].grid.widths, partitions["w2"].grid.k) == ((64, 128, 64, 128), 256)
    group.world_size = 2
    with pytest.raises(BlockFp8Error, match="enable-expert-parallel"):
        BlockFp8ExpertsMethod._partitions(method, 2048, 192)
