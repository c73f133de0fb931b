"""What Qwen's mixtures of experts keep resident on an NPU, counted on FakeTensors: ours, and vLLM-Ascend alone."""

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from .conftest import BEFORE_SCHEMES

if BEFORE_SCHEMES:
    pytest.skip("experts are refused beside vLLM-Ascend 0.23.0", allow_module_level=True)

import torch_npu
from vllm.config import set_current_vllm_config
from vllm_ascend.quantization.methods.w8a8 import fp8_block

from qwen3_fp8_ascend import ops
from qwen3_fp8_ascend.backends import prefill
from qwen3_fp8_ascend.backends.registry import PackedWeight
from qwen3_fp8_ascend.testing.models import QWEN3_30B_A3B, QWEN3_235B_A22B
from qwen3_fp8_ascend.vllm_plugin import experts, linear
from qwen3_fp8_ascend.vllm_plugin.ascend_schemes import NpuExpertsMethod, NpuLinearMethod

from .conftest import BLOCK_FP8, FIGURES, NPU, PAIRS, Chip, engine_config, write_config
from .test_npu_model import of_all_layers, resident_bytes

MODELS = {"Qwen3-30B-A3B-FP8": QWEN3_30B_A3B, "Qwen3-235B-A22B-FP8": QWEN3_235B_A22B}
SERVED = [pair for pair in PAIRS if pair not in (("A2", "torch_npu"), ("A3", "torch_npu"))]
"""`torch_npu` refuses experts there: those chips multiply no FP8."""


def quantization(shape: dict[str, Any]) -> dict[str, Any]:
    gates = [f"model.layers.{i}.mlp.gate" for i in range(shape["num_hidden_layers"])]
    return BLOCK_FP8 | {"modules_to_not_convert": ["lm_head", *gates]}


def weights_of(shape: dict[str, Any]) -> tuple[int, int]:
    """Weights of all experts, and of the attention's projections."""
    hidden, heads = shape["hidden_size"], shape["num_attention_heads"] * shape["head_dim"]
    one_expert = 3 * hidden * shape["moe_intermediate_size"]
    attention = 2 * hidden * (heads + shape["num_key_value_heads"] * shape["head_dim"])
    layers: int = shape["num_hidden_layers"]
    return layers * shape["num_experts"] * one_expert, layers * attention


def process(model: Any, config: Any) -> list[Any]:
    """What vLLM does after loading; returns the layers that have a method."""
    layers = [module for module in model.modules() if hasattr(module, "quant_method")]
    with set_current_vllm_config(config), model.fake_mode, NPU, torch.no_grad():
        for layer in layers:
            layer.quant_method.process_weights_after_loading(layer)
    return layers


@pytest.fixture
def remembered(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers are alike, and so are experts: of the first layer two are packed and three, in the long form all.

    What else there is gets tensors of the same shapes.
    """
    first: dict[Any, PackedWeight] = {}
    honest = ops.pack_experts

    def pack(weights: Any, scales: torch.Tensor, grid: Any, *backend: Any, **options: Any) -> PackedWeight:
        experts = scales.shape[0]
        if grid not in first and request.config.getoption("--long"):
            first[grid] = honest(weights, scales, grid, *backend, **options)
            return first[grid]
        if grid not in first:
            given = list(itertools.islice(weights, 3))
            two, three = (honest(given[:few], scales[:few].clone(), grid, *backend, **options) for few in (2, 3))
            for packed in (two, three):
                assert all(t.shape[0] == packed.groups for t in packed.tensors)
                assert all(t.untyped_storage().nbytes() == t.nbytes for t in packed.tensors)
            assert [t.shape[1:] for t in two.tensors] == [t.shape[1:] for t in three.tensors]
            first[grid] = dataclasses.replace(
                two, tensors=tuple(t.new_empty((experts, *t.shape[1:])) for t in two.tensors), groups=experts
            )
        like = first[grid]
        return dataclasses.replace(like, tensors=tuple(torch.empty_like(t) for t in like.tensors))

    monkeypatch.setattr(ops, "pack_experts", pack)
    for module in (linear, experts):  # FakeTensors have no values to fill in
        monkeypatch.setattr(module, "fill_with_small_values", lambda codes, scale: None)


@pytest.fixture(
    scope="module", params=["Qwen3-30B-A3B-FP8", pytest.param("Qwen3-235B-A22B-FP8", marks=pytest.mark.long)]
)
def name(request: pytest.FixtureRequest) -> str:
    chosen: str = request.param
    return chosen


@pytest.fixture(scope="module")
def bf16(name: str, tmp_path_factory: pytest.TempPathFactory, build: Callable[[Any], Any]) -> int:
    """What the model takes in BF16, with the copies of the routers' weights in fp32 that vLLM-Ascend makes."""

    def bytes_of(shape: dict[str, Any]) -> tuple[int]:
        config = engine_config(write_config(tmp_path_factory.mktemp("bf16"), **shape), quantization=None)
        model = build(config)
        process(model, config)
        return (resident_bytes(model),)

    (everything,) = of_all_layers(bytes_of, MODELS[name])
    return everything


@pytest.mark.parametrize("chip", SERVED, ids="-".join, indirect=True)
@pytest.mark.usefixtures("remembered")
def test_one_byte_a_weight(name: str, chip: Chip, tmp_path: Path, build: Callable[[Any], Any], bf16: int) -> None:
    """Everything else keeps its size; the scratch of many tokens is one layer's projection, where it fits at all."""
    shape, scratches = MODELS[name], set()

    def bytes_of(shape: dict[str, Any]) -> tuple[int, int, int]:
        config = engine_config(write_config(tmp_path / "fp8", **shape, quantization_config=quantization(shape)))
        model = build(config)
        layers = process(model, config)
        routed = [layer for layer in layers if isinstance(layer.quant_method, NpuExpertsMethod)]
        linears = [layer for layer in layers if isinstance(layer.quant_method, NpuLinearMethod)]
        assert len(routed) == shape["num_hidden_layers"] and len(linears) == 2 * shape["num_hidden_layers"]
        packed = [p for layer in routed for p in (layer.packed_w13_weight, layer.packed_w2_weight)]
        assert {t.device.type for p in packed for t in p.tensors} == {"npu"}
        sizes = {(p.groups * p.n, p.k) for p in packed}
        scratches.add(max((prefill.scratch_bytes(*s) for s in sizes if prefill.fits(*s)), default=0))
        return (
            sum(p.nbytes for p in packed),
            sum(layer.packed_weight.nbytes for layer in linears),
            resident_bytes(model),
        )

    of_experts, of_linears, total = of_all_layers(bytes_of, shape)
    weights, attention = weights_of(shape)
    (decoded,) = {0} if chip.native else scratches
    FIGURES.append(
        f"{name} on {chip.generation} with {chip.backend}: experts {of_experts / 1e9:.2f} GB "
        f"({of_experts / weights:.4f} bytes a weight), linears {of_linears / 1e9:.2f} GB, all {total / 1e9:.2f} GB, "
        f"scratch in use {decoded / 1e9:.2f} GB; in BF16 {bf16 / 1e9:.2f} GB"
    )
    assert weights <= of_experts <= 1.04 * weights and attention <= of_linears <= 1.04 * attention
    assert total - of_experts - of_linears == bf16 - 2 * (weights + attention), "something else changed its size"


@pytest.mark.parametrize("generation", ["A2 and A3", "A5"])
def test_vllm_ascend_alone(
    name: str,
    generation: str,
    tmp_path: Path,
    build: Callable[[Any], Any],
    bf16: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same checkpoint without the flag: BF16 on A2 and A3, MXFP8 on A5."""
    monkeypatch.setattr(fp8_block, "is_950", lambda: generation == "A5")
    # It has no shape function; NZ is another order of the same bytes, but for padding that these shapes do not need.
    monkeypatch.setattr(torch_npu, "npu_format_cast", lambda tensor, *_, **__: tensor)

    def resolved(weight: Any, scale: Any, block_n: int, block_k: int, dtype: Any) -> torch.Tensor:
        return torch.empty(weight.shape, dtype=dtype, device=weight.device)  # FakeTensors have no values

    monkeypatch.setattr(fp8_block, "resolve_block_scales", resolved)
    shape = MODELS[name]

    def bytes_of(shape: dict[str, Any]) -> tuple[int]:
        folder = write_config(tmp_path / "fp8", **shape, quantization_config=quantization(shape))
        config = engine_config(folder, quantization=None)
        model = build(config)
        layers = process(model, config)
        assert {type(layer.quant_method).__module__.partition(".")[0] for layer in layers} <= {"vllm", "vllm_ascend"}
        return (resident_bytes(model),)

    (upstream,) = of_all_layers(bytes_of, shape)
    FIGURES.append(f"{name}, vLLM-Ascend alone on {generation}, after loading: all {upstream / 1e9:.2f} GB")
    if generation != "A5":
        assert upstream == bf16
        return
    weights, attention = weights_of(shape)
    assert upstream == bf16 - 2 * (weights + attention) + (weights + attention) * 33 // 32  # a byte of scale for 32
