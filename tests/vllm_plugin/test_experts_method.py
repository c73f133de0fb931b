"""vLLM's own mixture-of-experts layer with our method: loading by name, results, ranks, memory, refusals."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.fused_moe import FusedMoEFactory
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
    record_metadata_for_reloading,
)

from qwen3_fp8_ascend import ops, reference
from qwen3_fp8_ascend.checkpoints.quantize import quantize_weight
from qwen3_fp8_ascend.containers import COMPRESSED_TENSORS, FP8, MODELOPT, SCALE_ENDINGS
from qwen3_fp8_ascend.errors import BlockFp8Error
from qwen3_fp8_ascend.format import Activation, BlockFp8Config, BlockSize
from qwen3_fp8_ascend.testing.models import qwen3_config
from qwen3_fp8_ascend.vllm_plugin.config import BlockFp8AscendConfig
from qwen3_fp8_ascend.vllm_plugin.experts import BlockFp8ExpertsMethod

EXPERTS, TOP_K, HIDDEN, INNER = 4, 2, 256, 192
PREFIX = "model.layers.0.mlp.experts"
W8A16 = {"qwen3_fp8_ascend": {"activation": Activation.W8A16.value}}

Tensors = dict[str, torch.Tensor]


def checkpoint(experts: int = EXPERTS, inner: int = INNER, seed: int = 0) -> Tensors:
    """One layer's experts as official releases have them, with the ragged blocks that 192 channels make."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"gate_proj": (inner, HIDDEN), "up_proj": (inner, HIDDEN), "down_proj": (HIDDEN, inner)}
    out = {}
    for expert in range(experts):
        for name, (n, k) in shapes.items():
            codes, scale = quantize_weight(torch.randn(n, k, generator=generator) / k**0.5)
            out[f"{expert}.{name}.weight"], out[f"{expert}.{name}.weight_scale_inv"] = codes, scale
    return out


def fused(tensors: Tensors) -> Tensors:
    """All experts in two tensors, each with its scales, as transformers 5 writes FP8 experts."""
    count = len({name.partition(".")[0] for name in tensors})

    def stack(*projections: str, ending: str) -> torch.Tensor:
        parts = [torch.stack([as_bytes(tensors[f"{e}.{p}.{ending}"]) for e in range(count)]) for p in projections]
        return torch.cat(parts, dim=1)

    out = {}
    for name, projections in {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}.items():
        out[name] = stack(*projections, ending="weight").view(torch.float8_e4m3fn)
        out[f"{name}_scale_inv"] = stack(*projections, ending="weight_scale_inv")
    return out


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor


def make_runner(
    config: VllmConfig | None = None,
    ignored: tuple[str, ...] = (),
    expert_parallel: bool = False,
    experts: int = EXPERTS,
    inner: int = INNER,
    scale_fmt: str = "fp32",
    container: str = FP8,
    **arguments: Any,
) -> Any:
    """vLLM's layer, made as its models make it."""
    config = config or VllmConfig(additional_config=W8A16)
    config.parallel_config.enable_expert_parallel = expert_parallel
    with set_current_vllm_config(config):
        return FusedMoEFactory(
            num_experts=experts,
            top_k=TOP_K,
            hidden_size=HIDDEN,
            intermediate_size=inner,
            params_dtype=torch.float32,
            renormalize=True,
            quant_config=BlockFp8AscendConfig(BlockFp8Config(BlockSize(), ignored, scale_fmt, container)),
            prefix=PREFIX,
            **arguments,
        )


def make_layer(**arguments: Any) -> Any:
    return make_runner(**arguments).routed_experts


def load(layer: Any, tensors: Tensors) -> list[str]:
    return list(layer.load_weights(tensors.items()))


def finish(layer: Any) -> Any:
    layer.quant_method.process_weights_after_loading(layer)
    return layer


def routed(m: int = 5, experts: int = EXPERTS) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, the weights of their experts, and the experts."""
    generator = torch.Generator().manual_seed(m)
    x = torch.randn(m, HIDDEN, generator=generator)
    ids = torch.stack([torch.randperm(experts, generator=generator)[:TOP_K] for _ in range(m)]).int()
    return x, torch.rand(m, TOP_K, generator=generator), ids


def apply(layer: Any, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return layer.quant_method.apply(layer, x, weights, ids, None, None)


def expected(tensors: Tensors, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """W8A16 by the specification's linears, token by token and expert by expert, in fp64."""
    w = {
        name: reference.dequantize_weight(codes, tensors[f"{name}_scale_inv"], dtype=torch.float32).double()
        for name, codes in tensors.items()
        if name.endswith(".weight")
    }
    out = torch.zeros(x.shape, dtype=torch.float64)
    for token, row in enumerate(x.double()):
        for weight, expert in zip(weights[token].double(), ids[token].tolist(), strict=True):
            gate, up = (w[f"{expert}.{name}.weight"] @ row for name in ("gate_proj", "up_proj"))
            inner = torch.nn.functional.silu(gate) * up
            out[token] += weight * (w[f"{expert}.down_proj.weight"] @ inner)
    return out


def assert_near(out: torch.Tensor, want: torch.Tensor) -> None:
    """fp32 sums of a few hundred products; a projection of another expert is off by all of it."""
    assert float((out.double() - want).norm() / want.norm()) < 1e-5


def test_one_by_one() -> None:
    tensors = checkpoint()
    layer = make_layer()
    assert isinstance(layer.quant_method, BlockFp8ExpertsMethod)
    names = load(layer, tensors)
    assert set(names) == {"w13_weight", "w2_weight", "w13_weight_scale_inv", "w2_weight_scale_inv"}
    assert len(names) == len(tensors)
    out = apply(finish(layer), *routed())
    assert_near(out, expected(tensors, *routed()))
    wrong = {
        name.replace("3.up", "x.up").replace("2.up", "3.up").replace("x.up", "2.up"): t for name, t in tensors.items()
    }
    with pytest.raises(AssertionError):
        assert_near(out, expected(wrong, *routed()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e8m0fnu])
def test_scales_of_fewer_bits(dtype: torch.dtype) -> None:
    tensors = {name: t.to(dtype) if name.endswith("_inv") else t for name, t in checkpoint().items()}
    layer = make_layer()
    load(layer, tensors)
    exact = {name: t.float() if name.endswith("_inv") else t for name, t in tensors.items()}
    assert_near(apply(finish(layer), *routed()), expected(exact, *routed()))


def test_scales_that_are_powers_of_two() -> None:
    """What the checkpoint says of its scales decides what w8a8 is, and reaches the experts."""
    for config, activation in ((VllmConfig(), Activation.W8A8_UE8M0), (None, Activation.W8A16)):
        layer = make_layer(config=config, scale_fmt="ue8m0")
        assert layer.quant_method.activation is activation
        load(layer, checkpoint())
        x, weights, ids = routed()
        packed = finish(layer).packed_w13_weight, layer.packed_w2_weight
        assert torch.equal(apply(layer, x, weights, ids), ops.block_experts(x, *packed, weights, ids, activation))


def test_all_in_one_tensor() -> None:
    tensors = checkpoint(inner=256)
    layer = make_layer(inner=256)
    load(layer, fused(tensors))
    assert_near(apply(finish(layer), *routed()), expected(tensors, *routed()))


def test_positional_calls_of_models_that_load_by_hand() -> None:
    """DeepSeek and a dozen other models call the parameter's loader themselves and use what it returns."""
    tensors, layer = checkpoint(), make_layer()
    parameters = {"gate_proj": ("w13", "w1"), "up_proj": ("w13", "w3"), "down_proj": ("w2", "w2")}
    for name, tensor in tensors.items():
        expert, projection, kind = name.split(".")
        parameter, shard = parameters[projection]
        param = getattr(layer, f"{parameter}_{kind}")
        assert param.weight_loader.supports_moe_loading
        full = f"{PREFIX}.{parameter}_{kind}"
        assert param.weight_loader(param, tensor, full, shard_id=shard, expert_id=int(expert), return_success=True)
    assert param.weight_loader(param, tensor, full, shard, int(expert)) is None
    assert_near(apply(finish(layer), *routed()), expected(tensors, *routed()))


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Pretend to be a rank, for layers made afterwards with `tp_size`."""

    def pretend(rank: int) -> None:
        path = "vllm.model_executor.layers.fused_moe.config.get_tensor_model_parallel_rank"
        monkeypatch.setattr(path, lambda: rank)

    return pretend


def test_expert_parallel_ranks_add_up(ranks: Callable[[int], None]) -> None:
    """Whole experts on each rank, in another number on the last; what is on another rank counts nothing here."""
    tensors = checkpoint(experts=5)
    total = torch.zeros(7, HIDDEN)
    for rank in range(2):
        ranks(rank)
        layer = make_layer(experts=5, tp_size=2, expert_parallel=True)
        assert layer.local_num_experts == (3, 2)[rank]
        load(layer, tensors)
        total += apply(finish(layer), *routed(7, experts=5))
    assert_near(total, expected(tensors, *routed(7, experts=5)))


def test_tensor_parallel_shards_of_whole_blocks_add_up(ranks: Callable[[int], None]) -> None:
    tensors = checkpoint(inner=384)
    total = torch.zeros(5, HIDDEN)
    for rank in range(3):
        ranks(rank)
        layer = make_layer(inner=384, tp_size=3)
        assert tuple(layer.w13_weight.shape) == (EXPERTS, 256, HIDDEN)
        load(layer, tensors)
        total += apply(finish(layer), *routed())
    assert_near(total, expected(tensors, *routed()))


@pytest.mark.parametrize("container", SCALE_ENDINGS)
@pytest.mark.parametrize(
    ("inner", "size", "working"), [(768, 4, "1 or 2 or 3 or 6"), (192, 2, "1"), (512, 8, "1 or 2 or 4")]
)
def test_a_cut_through_a_block_is_refused(
    ranks: Callable[[int], None], inner: int, size: int, working: str, container: str
) -> None:
    ranks(0)
    with pytest.raises(BlockFp8Error, match="cut through a block of 128x128 of the experts") as refused:
        make_layer(inner=inner, tp_size=size, container=container)
    said = str(refused.value)
    assert f"--tensor-parallel-size {working} (" in said and "--enable-expert-parallel" in said and PREFIX in said
    whole = make_layer(inner=inner, tp_size=size, expert_parallel=True, experts=8, container=container)
    assert whole.local_num_experts == 8 // size


def test_compiled_with_a_dynamic_batch() -> None:
    tensors = checkpoint()
    runner = make_runner()
    load(runner.routed_experts, tensors)
    layer = finish(runner.routed_experts)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *given: apply(layer, *given) * 2, fullgraph=True, dynamic=True, backend="aot_eager")
    for m in (2, 5, 7):
        assert torch.equal(compiled(*routed(m)), apply(layer, *routed(m)) * 2)


def test_the_whole_layer_with_its_router() -> None:
    """vLLM's runner around it: softmax over all experts, the two largest, renormalised."""
    tensors = checkpoint()
    engine = VllmConfig(additional_config=W8A16)
    runner = make_runner(engine)
    load(runner.routed_experts, tensors)
    finish(runner.routed_experts)
    x, _, _ = routed(6)
    logits = torch.randn(6, EXPERTS, generator=torch.Generator().manual_seed(3))
    with set_forward_context(None, engine, num_tokens=6):
        out = runner(x, logits)
    weights, ids = logits.softmax(-1).topk(TOP_K)
    assert_near(out, expected(tensors, x, weights / weights.sum(-1, keepdim=True), ids))
    asked = runner.routed_experts.quant_method.moe_quant_config
    assert asked is not None  # else vLLM asks at each step, and compiled code is made anew


def test_one_resident_copy_at_one_byte_a_weight() -> None:
    layer = make_layer()
    load(layer, checkpoint())
    names = ("w13_weight", "w2_weight", "w13_weight_scale_inv", "w2_weight_scale_inv")
    originals = [weakref.ref(getattr(layer, name).data.untyped_storage()) for name in names]
    finish(layer)
    gc.collect()
    assert [ref() for ref in originals] == [None] * 4
    tensors = (*layer.packed_w13_weight.tensors, *layer.packed_w2_weight.tensors, *layer.parameters())
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    weights = 3 * EXPERTS * INNER * HIDDEN
    assert weights <= sum(storages.values()) <= 1.01 * weights + 64 * 4 * EXPERTS * 12


# What a checkpoint may get wrong.


def drop(name: str) -> Callable[[Tensors], Any]:
    return lambda t: t.pop(name)


def put(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], Any]:
    def damage(t: Tensors) -> None:
        t[name] = change(t[name].clone())

    return damage


def at(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        as_bytes(tensor)[1, 1] = value  # type: ignore[assignment]
        return tensor

    return change


DAMAGES: dict[str, tuple[Callable[[Tensors], Any], str]] = {
    "missing": (drop("2.up_proj.weight"), r"missing from the checkpoint\n.*experts\.2\.up_proj\.weight\n"),
    "no scales": (drop("3.down_proj.weight_scale_inv"), r"missing.*\n.*experts\.3\.down_proj\.weight_scale_inv\n"),
    "NaN": (put("1.up_proj.weight", at(0x7F)), r"NaN codes.*\n.*experts\.1\.up_proj\.weight"),
    "NaN in down": (put("3.down_proj.weight", at(0xFF)), r"NaN codes.*\n.*experts\.3\.down_proj\.weight"),
    "infinite": (
        put("2.gate_proj.weight_scale_inv", at(torch.inf)),
        r"scales.*\n.*experts\.2\.gate_proj\.weight_scale_inv",
    ),
    "negative": (put("0.down_proj.weight_scale_inv", at(-1.0)), r"scales.*\n.*experts\.0\.down_proj\.weight_scale_inv"),
    "bf16": (put("1.gate_proj.weight", lambda t: t.bfloat16()), r"wrong dtype\n.*experts\.1\.gate_proj\.weight\n"),
    "fp16 scales": (
        put("1.up_proj.weight_scale_inv", lambda t: t.half()),
        r"wrong dtype\n.*1\.up_proj\.weight_scale_inv",
    ),
    "swapped": (
        put("2.gate_proj.weight", lambda t: as_bytes(t).t().contiguous().view(t.dtype)),
        r"does not fit the experts\n.*experts\.2\.gate_proj\.weight\n.*\(192, 256\)\n.*\(256, 192\)",
    ),
    "cut": (
        put("0.down_proj.weight", lambda t: t[:, :64]),
        r"does not fit the experts\n.*experts\.0\.down_proj\.weight\n",
    ),
    "too few scales": (
        put("0.up_proj.weight_scale_inv", lambda t: t[:1]),
        r"does not fit the experts\n.*0\.up_proj\.weight_scale_inv\n.*\(2, 2\)\n.*\(1, 2\)",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_tensors_are_named(name: str) -> None:
    damage, said = DAMAGES[name]
    tensors, layer = checkpoint(), make_layer()
    damage(tensors)
    with pytest.raises(BlockFp8Error, match=said):
        load(layer, tensors)
        finish(layer)


@pytest.mark.parametrize("inner", [96, 192])
def test_a_block_in_both_gate_and_up_is_refused(inner: int) -> None:
    """Made as transformers does: one grid over gate and up. For 96 channels the shapes are those of two grids."""
    tensors = fused(checkpoint(inner=inner))
    rows = -(-2 * inner // 128)
    tensors["gate_up_proj_scale_inv"] = torch.ones(EXPERTS, rows, 2)
    with pytest.raises(BlockFp8Error, match=r"(?s)(not whole blocks|does not fit the experts).*experts\.0\.gate_proj"):
        load(make_layer(inner=inner), tensors)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "biases": ({"has_bias": True}, "experts with biases are not served"),
    "gelu": ({"activation": "gelu"}, "with the activation gelu are not served"),
    "clamped": ({"swiglu_limit": 7.0}, r"swiglu_limit\) are not served"),
    "weights on the input": ({"apply_router_weight_on_input": True}, r"apply_router_weight_on_input\) are not served"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_experts_are_refused_by_name(name: str) -> None:
    arguments, said = REFUSED[name]
    with pytest.raises(BlockFp8Error, match=rf"{said}\n  where: {PREFIX}"):
        make_layer(**arguments)


@pytest.mark.parametrize(
    ("arguments", "got"),
    [
        ({"scoring_func": "sigmoid"}, "sigmoid scores, without groups"),
        ({"scoring_func": "sigmoid", "e_score_correction_bias": torch.zeros(EXPERTS)}, "sigmoid .* correction bias"),
        ({"e_score_correction_bias": torch.zeros(EXPERTS)}, "softmax scores with a correction bias, without groups"),
    ],
)
def test_experts_that_the_router_would_not_choose_are_refused(arguments: dict[str, Any], got: str) -> None:
    """MiniMax-M2 would end in an assertion, and ERNIE 4.5 be answered by other experts than its own."""
    with pytest.raises(BlockFp8Error, match=rf"(?s)does not choose this model's experts.*{PREFIX}.*{got}"):
        make_layer(**arguments)


@pytest.mark.parametrize("corrected", [False, True])
def test_a_router_that_chooses_right_is_not_refused(monkeypatch: pytest.MonkeyPatch, corrected: bool) -> None:
    """As a later vLLM may: sigmoid scores, and the bias in the choice."""
    from vllm.model_executor.layers.fused_moe.router import cpu_router

    def select(hidden_states: Any, router_logits: Any, *, top_k: int, **options: Any) -> Any:
        bias = options["e_score_correction_bias"]
        scores = router_logits.sigmoid() + (0 if bias is None else bias)
        return scores.topk(top_k)

    monkeypatch.setattr(cpu_router, "select_experts", select)
    bias = torch.zeros(EXPERTS) if corrected else None
    make_layer(scoring_func="sigmoid", e_score_correction_bias=bias)


def test_groups_with_a_correction_bias_are_served() -> None:
    """DeepSeek-V3, GLM-4.5."""
    grouped = {"use_grouped_topk": True, "num_expert_group": 2, "topk_group": 1}
    make_layer(scoring_func="sigmoid", e_score_correction_bias=torch.zeros(EXPERTS), **grouped)


def test_adapters_and_moving_experts_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from qwen3_fp8_ascend.vllm_plugin.experts import check_supported

    layer = make_layer()
    monkeypatch.setattr(layer.moe_config, "is_lora_enabled", True)
    with pytest.raises(BlockFp8Error, match=rf"(?s)LoRA adapters.*{PREFIX}.*--enable-lora"):
        check_supported(layer, PREFIX)
    monkeypatch.setattr(layer.moe_config, "is_lora_enabled", False)
    monkeypatch.setattr(layer.moe_config.moe_parallel_config, "enable_eplb", True)
    with pytest.raises(BlockFp8Error, match=rf"(?s)cannot move between ranks.*{PREFIX}.*--enable-eplb"):
        check_supported(layer, PREFIX)


@pytest.mark.parametrize(
    ("ignored", "quantized"),
    [
        ((), True),
        ((PREFIX,), False),
        (("model.layers.0.mlp",), False),
        (tuple(f"{PREFIX}.{e}.{p}_proj" for e in range(EXPERTS) for p in ("gate", "up", "down")), False),
        (("model.layers.0.mlp.gate", "lm_head"), True),
    ],
)
def test_ignored_experts(ignored: tuple[str, ...], quantized: bool) -> None:
    method = make_layer(ignored=ignored).quant_method
    assert isinstance(method, BlockFp8ExpertsMethod if quantized else UnquantizedFusedMoEMethod)


def test_experts_ignored_in_part_are_refused() -> None:
    with pytest.raises(BlockFp8Error, match=r"only some experts of a layer[^\n]*\n.*experts\n(?s:.*)3\.up_proj"):
        make_layer(ignored=(f"{PREFIX}.3.up_proj",))


# Loading again.


def serving_layer(tensors: Tensors, **arguments: Any) -> Any:
    layer = make_layer(**arguments)
    record_metadata_for_reloading(layer)
    load(layer, tensors)
    return finish(layer)


def reload(layer: Any, tensors: Tensors) -> None:
    initialize_layerwise_reload(layer)
    load(layer, tensors)
    finalize_layerwise_reload(layer, None)


def addresses(layer: Any) -> list[int]:
    return [t.data_ptr() for t in (*layer.packed_w13_weight.tensors, *layer.packed_w2_weight.tensors)]


def test_new_weights_take_the_place_of_the_old_ones() -> None:
    layer = serving_layer(checkpoint())
    before = addresses(layer)
    for seed in (1, 2):
        tensors = checkpoint(seed=seed)
        reload(layer, tensors)
        assert_near(apply(layer, *routed()), expected(tensors, *routed()))
        assert addresses(layer) == before
        assert layer.w13_weight_scale_inv.numel() == 0


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_is_renewed_though_other_ranks_experts_come_too(ranks: Callable[[int], None], rank: int) -> None:
    """The first rank has all its experts, and is packed, before those of the second have come."""
    ranks(rank)
    layer = serving_layer(checkpoint(), tp_size=2, expert_parallel=True)
    tensors = checkpoint(seed=1)
    reload(layer, tensors)
    x, weights, ids = routed()
    here = (ids // 2 == rank) * weights
    assert_near(apply(layer, x, weights, ids), expected(tensors, x, here, ids))
    tensors = checkpoint(seed=2)
    load(layer, tensors)  # and by a trainer
    assert_near(apply(layer, x, weights, ids), expected(tensors, x, here, ids))


def test_tensors_pushed_into_a_layer_that_serves_renew_it_in_place() -> None:
    """All of them together, in two parts, and as fused tensors; nothing is asked of vLLM but its loaders."""
    layer = serving_layer(checkpoint())
    before = addresses(layer)
    tensors = checkpoint(seed=1)
    parts = [dict(list(tensors.items())[i::2]) for i in range(2)]
    load(layer, parts[0])
    with pytest.raises(BlockFp8Error, match=r"only some(?s:.)*12 are missing, the first is .*experts\.0\."):
        apply(layer, *routed())
    load(layer, parts[1])
    layer.quant_method.process_weights_after_loading(layer)  # as trainers do when they have pushed everything
    assert_near(apply(layer, *routed()), expected(tensors, *routed()))
    assert addresses(layer) == before


def test_pushed_tensors_are_checked_like_loaded_ones() -> None:
    layer = serving_layer(checkpoint())
    bad = checkpoint(seed=1)
    with pytest.raises(BlockFp8Error, match=r"wrong dtype(?s:.)*experts\.0\.gate_proj\.weight\n"):
        load(layer, {name: tensor.float() for name, tensor in bad.items()})
    layer = serving_layer(checkpoint())
    DAMAGES["NaN in down"][0](bad)
    with pytest.raises(BlockFp8Error, match=r"experts\.3\.down_proj"):
        load(layer, bad)
    with pytest.raises(BlockFp8Error, match="restart the server"):
        apply(layer, *routed())


@pytest.mark.parametrize("container", [COMPRESSED_TENSORS, MODELOPT])
def test_errors_name_scales_as_the_file_does(container: str) -> None:
    tensors = {name.removesuffix("_inv"): tensor for name, tensor in checkpoint().items()}
    tensors["2.gate_proj.weight_scale"][0, 1] = torch.inf
    layer = make_layer(container=container)
    load(layer, tensors)
    with pytest.raises(BlockFp8Error, match=r"scales.*\n.*experts\.2\.gate_proj\.weight_scale\n"):
        finish(layer)


@pytest.mark.parametrize("missing", ["0.gate_proj.weight", "3.down_proj.weight_scale_inv"])
def test_a_tensor_that_is_missing_on_reload_is_named(missing: str) -> None:
    """vLLM gives unloaded parts arbitrary memory, here the very bytes of good weights."""
    tensors = checkpoint()
    layer = serving_layer(tensors)
    del tensors[missing]
    with pytest.raises(BlockFp8Error, match=rf"missing from the checkpoint\n.*{missing}\n"):
        reload(layer, tensors)
    with pytest.raises(BlockFp8Error, match="restart the server"):
        apply(layer, *routed())


def test_after_refused_weights_a_layer_serves_neither_old_nor_new_ones() -> None:
    layer = serving_layer(checkpoint())
    bad = checkpoint(seed=1)
    DAMAGES["NaN in down"][0](bad)
    with pytest.raises(BlockFp8Error, match=r"experts\.3\.down_proj"):
        reload(layer, bad)
    with pytest.raises(BlockFp8Error, match="restart the server"):
        apply(layer, *routed())


# Whole models, as vLLM builds and loads them.


@pytest.fixture
def built(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Build a model of a config.json with vLLM's own layers, without weights: `built(architectures=..., ...)`."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.utils import initialize_model

    def build(**changes: Any) -> Any:
        config = qwen3_config(quantization_config=BlockFp8Config().to_dict(), **changes)
        (tmp_path / "config.json").write_text(json.dumps(config))
        common = {"skip_tokenizer_init": True, "load_format": "dummy", "max_model_len": 128, "enforce_eager": True}
        engine = EngineArgs(model=str(tmp_path), quantization="ascend", **common).create_engine_config()
        with set_current_vllm_config(engine):
            return initialize_model(engine)

    yield build


def test_dummy_weights(built: Callable[..., Any]) -> None:
    """`--load-format dummy` fills floats only and does not know that the bytes are codes."""
    model = built(
        architectures=["Qwen3MoeForCausalLM"],
        model_type="qwen3_moe",
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=192,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
    )
    layer = model.model.layers[0].mlp.experts.routed_experts
    assert layer.quant_method.dummy
    for parameter in layer.parameters():
        if parameter.is_floating_point():
            parameter.data.uniform_(-1e-3, 1e-3)
    finish(layer)
    out = apply(layer, *(t.bfloat16() if t.is_floating_point() else t for t in routed()))
    assert out.isfinite().all() and out.abs().max() > 0
