"""Qwen3-8B as vLLM and vLLM-Ascend build it, on `npu:0` with FakeTensors: loading, layers, shapes, dtypes, memory."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from vllm.config import set_current_vllm_config

from qwen3_fp8_ascend import ops
from qwen3_fp8_ascend.backends import prefill
from qwen3_fp8_ascend.backends.registry import PackedWeight
from qwen3_fp8_ascend.errors import BlockFp8Error
from qwen3_fp8_ascend.format import BlockGrid, BlockSize, scale_shape
from qwen3_fp8_ascend.ops import values
from qwen3_fp8_ascend.testing.models import QWEN3_8B
from qwen3_fp8_ascend.vllm_plugin import linear
from qwen3_fp8_ascend.vllm_plugin.linear import BlockFp8LinearMethod
from qwen3_fp8_ascend.vllm_plugin.lm_head import BlockFp8LmHeadMethod
from tests.support.npu_graph import FP8_VIEWS, Capture, Watch, falls_back_to_the_host

from .conftest import BEFORE_SCHEMES, BLOCK_FP8, FIGURES, NPU, RELEASE, Chip, engine_config, write_config

ONE_LAYER = QWEN3_8B | {"num_hidden_layers": 1, "vocab_size": 264}


@pytest.fixture(autouse=True)
def any_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dummy weights are filled with numbers; FakeTensors have none."""
    monkeypatch.setattr(linear, "fill_with_small_values", lambda codes, scale: None)


def load(model: torch.nn.Module, config: Any) -> dict[str, torch.nn.Module]:
    """What vLLM does after loading, for our layers; returns them."""
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(getattr(module, "quant_method", None), BlockFp8LinearMethod)
    }
    with set_current_vllm_config(config), model.fake_mode, NPU, torch.no_grad():
        for layer in layers.values():
            layer.quant_method.process_weights_after_loading(layer)
    return layers


def resident_bytes(model: torch.nn.Module) -> int:
    """Bytes of all storages that a model keeps alive, each once."""
    tensors = list(model.parameters()) + list(model.buffers())
    for module in model.modules():
        tensors += [t for value in vars(module).values() if isinstance(value, PackedWeight) for t in value.tensors]
    return sum({id(t.untyped_storage()): t.untyped_storage().nbytes() for t in tensors}.values())


def of_all_layers(bytes_of: Callable[[dict[str, Any]], tuple[int, ...]], shape: dict[str, Any]) -> list[int]:
    """Layers are alike, so what all take follows from a few: each further one takes the same."""
    few = (bytes_of(shape | {"num_hidden_layers": layers}) for layers in (1, 2, 3))
    found = []
    for one, two, three in zip(*few, strict=True):
        assert three - two == two - one > 0
        found.append(one + (shape["num_hidden_layers"] - 1) * (two - one))
    return found


@pytest.fixture(scope="module")
def bf16_bytes(tmp_path_factory: pytest.TempPathFactory, build: Callable[[Any], torch.nn.Module]) -> int:
    """What Qwen3-8B takes in BF16."""

    def bytes_of(shape: dict[str, Any]) -> tuple[int]:
        folder = write_config(tmp_path_factory.mktemp("bf16"), **shape)
        return (resident_bytes(build(engine_config(folder, quantization=None))),)

    (everything,) = of_all_layers(bytes_of, QWEN3_8B)
    return everything


def test_memory_of_vllm_ascend_alone(tmp_path: Path, build: Callable[[Any], torch.nn.Module], bf16_bytes: int) -> None:
    """Its own way with the same checkpoint on A2, without the flag: 0.30.0rc2 expands it, 0.23.0 cannot build it."""
    if BEFORE_SCHEMES:
        folder = write_config(tmp_path / "fp8", **QWEN3_8B, quantization_config=BLOCK_FP8)
        config = engine_config(folder, quantization=None)
        with pytest.raises(AttributeError, match="o_groups") as refused:
            build(config)
        FIGURES.append(f"Qwen3-8B-FP8, vLLM-Ascend {RELEASE} alone, without the flag: {refused.value}")
        return

    def bytes_of(shape: dict[str, Any]) -> tuple[int]:
        folder = write_config(tmp_path / "fp8", **shape, quantization_config=BLOCK_FP8)
        config = engine_config(folder, quantization=None)
        model = build(config)
        methods = [module for module in model.modules() if hasattr(module, "quant_method")]
        with set_current_vllm_config(config), model.fake_mode, NPU, torch.no_grad():
            for module in methods:
                module.quant_method.process_weights_after_loading(module)
        assert {type(module.quant_method).__module__.partition(".")[0] for module in methods} <= {"vllm", "vllm_ascend"}
        return (resident_bytes(model),)

    (upstream,) = of_all_layers(bytes_of, QWEN3_8B)
    FIGURES.append(f"Qwen3-8B-FP8, vLLM-Ascend alone on A2, after loading: all {upstream / 1e9:.2f} GB")
    assert upstream == bf16_bytes


def test_memory_of_qwen3_8b(
    tmp_path: Path, build: Callable[[Any], torch.nn.Module], chip: Chip, bf16_bytes: int
) -> None:
    """Full size: one byte a weight, beside the BF16 that vLLM-Ascend expands the checkpoint to.

    What a linear of many rows takes while it runs, the scratch, is the largest for gate and up together.
    """
    scratches = set()

    def bytes_of(shape: dict[str, Any]) -> tuple[int, int, int]:
        config = engine_config(write_config(tmp_path / "fp8", **shape, quantization_config=BLOCK_FP8))
        model = build(config)
        layers = load(model, config)
        assert len(layers) == 4 * shape["num_hidden_layers"]
        assert all(layer.packed_weight.device == NPU for layer in layers.values())
        for layer in layers.values():  # the parameter that others look for is the packed weight itself
            shared = layer.packed_weight.tensors[0].untyped_storage()
            assert id(layer.weight.untyped_storage()) == id(shared) or layer.weight.untyped_storage() == shared
        packed = [layer.packed_weight for layer in layers.values()]
        scratches.add(max(prefill.scratch_bytes(p.n, p.k) for p in packed))
        return sum(p.n * p.k for p in packed), sum(p.nbytes for p in packed), resident_bytes(model)

    linears, packed, total = of_all_layers(bytes_of, QWEN3_8B)
    (scratch,) = {0} if chip.native else scratches
    FIGURES.append(
        f"Qwen3-8B-FP8 on {chip.generation} with {chip.backend}: linears {packed / 1e9:.3f} GB "
        f"({packed / linears:.4f} bytes a weight), all {total / 1e9:.2f} GB, scratch in use {scratch / 1e9:.3f} GB; "
        f"in BF16 {bf16_bytes / 1e9:.2f} GB"
    )
    assert linears == 36 * 192_937_984
    assert packed <= 1.04 * linears
    assert scratch == (0 if chip.native else 2 * 24576 * 4096)
    assert total - packed == bf16_bytes - 2 * linears, "something else than the linears changed its size"


@pytest.mark.usefixtures("schemas")
def test_the_layers_of_vllm_ascend_run(tmp_path: Path, build: Callable[[Any], torch.nn.Module], chip: Chip) -> None:
    """As its model calls them, and so that a graph can capture it. FP8 is only ever viewed, but by A5's product.

    vLLM's loader does not know FakeTensors; what it does to FP8 is tested in tests/vllm_plugin/test_fp8_as_bytes.py.
    """
    config = engine_config(write_config(tmp_path / "fp8", **ONE_LAYER, quantization_config=BLOCK_FP8))
    with Watch() as building:
        model = build(config)
    with Watch() as loading:
        layers = load(model, config)
    assert loading.touched_fp8 and building.touched_fp8 | loading.touched_fp8 <= FP8_VIEWS
    assert {name for name in loading.seen if name.startswith("aten::") and falls_back_to_the_host(name)} == set()
    for m in (1, 65, 2048):
        for name, layer in layers.items():
            with model.fake_mode, torch.no_grad(), torch.device(NPU):
                x = torch.empty(m, layer.packed_weight.k, dtype=torch.bfloat16)
                with Capture() as graph:
                    out, bias = layer(x)
            assert (out.shape, out.dtype, out.device) == ((m, layer.packed_weight.n), torch.bfloat16, NPU), name
            assert bias is None and (chip.native or graph.touched_fp8 <= FP8_VIEWS), name


def test_weights_pushed_into_a_model_on_an_npu(
    tmp_path: Path, build: Callable[[Any], torch.nn.Module], chip: Chip, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the host, where no device is the default: packed there, into the memory of the old ones.

    vLLM's own loaders do not know FakeTensors, so a copy stands in for them.
    """
    monkeypatch.setattr(values, "count_nan_codes", lambda weight: 0)  # FakeTensors have no values to check
    monkeypatch.setattr(values, "check_scale_values", lambda *scale, **limit: None)
    config = engine_config(write_config(tmp_path / "fp8", **ONE_LAYER, quantization_config=BLOCK_FP8))
    model = build(config)
    layer = load(model, config)["model.layers.0.self_attn.o_proj"]
    method, packed = layer.quant_method, layer.packed_weight
    declare, devices = method.renewal.declare, []

    def declare_with_copies(staged: torch.nn.Module) -> None:
        declare(staged)
        for name, into in staged.named_parameters():
            devices.append(into.device)
            into.weight_loader = partial(copy, name)

    def copy(name: str, into: torch.nn.Parameter, tensor: torch.Tensor) -> None:
        into.data.copy_(tensor.view(into.dtype))
        method.loaded[name].add(None)

    monkeypatch.setattr(method.renewal, "declare", declare_with_copies)
    with model.fake_mode, torch.no_grad():
        layer.weight.weight_loader(layer.weight, torch.empty(packed.n, packed.k, dtype=torch.float8_e4m3fn))
        assert devices == [NPU, NPU] and method.renewal.staged is not None
        scale = torch.empty(scale_shape(packed.n, packed.k, BlockSize()), dtype=torch.float32)
        layer.weight_scale_inv.weight_loader(layer.weight_scale_inv, scale)
    assert method.renewal.staged is None and layer.packed_weight is packed
    assert {parameter.device for parameter in layer.parameters()} == {NPU}


def test_an_output_head_in_fp8(
    tmp_path: Path, build: Callable[[Any], torch.nn.Module], chip: Chip, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opt-in. Quantized on the host, in W8A16, which `torch_npu` does not compute: it says so at load."""
    monkeypatch.setattr(values, "count_nan_codes", lambda weight: 0)  # FakeTensors have no values to check
    monkeypatch.setattr(values, "check_scale_values", lambda *scale, **limit: None)
    settings = {"qwen3_fp8_ascend": {"lm_head": "fp8"}}
    folder = write_config(tmp_path / "fp8", **ONE_LAYER, quantization_config=BLOCK_FP8)
    config = engine_config(folder, hf_overrides=settings)
    model = build(config)
    assert isinstance(model.lm_head.quant_method, BlockFp8LmHeadMethod)
    with set_current_vllm_config(config), model.fake_mode, NPU, torch.no_grad():
        if chip.backend == "torch_npu":
            with pytest.raises(BlockFp8Error, match="computes w8a8/w8a8-ue8m0, not w8a16"):
                model.lm_head.quant_method.process_weights_after_loading(model.lm_head)
            return
        model.lm_head.quant_method.process_weights_after_loading(model.lm_head)
        out = model.lm_head.quant_method.apply(model.lm_head, torch.empty(3, 4096, dtype=torch.bfloat16))
    assert (out.shape, out.dtype, out.device) == ((3, 320), torch.bfloat16, NPU)  # vLLM pads it


def test_ragged_shards_and_columns(chip: Chip) -> None:
    """SmolLM2's: 576 = 4.5 blocks."""
    with FakeTensorMode(), NPU:
        weight = torch.empty(960, 576, dtype=torch.uint8).view(torch.float8_e4m3fn)
        scale = torch.empty(5 + 2 + 2, 5)
        packed = ops.pack_weight(
            weight, scale, BlockGrid((576, 192, 192), weight.shape[1]), chip.backend, check_values=False
        )
        out = ops.block_linear(torch.empty(7, 576, dtype=torch.bfloat16), packed)
        assert (out.shape, out.dtype) == ((7, 960), torch.bfloat16)
