"""Loading and running Qwen3-8B's layers on `npu:0` with FakeTensors: shapes, dtypes, memory, and what a graph sees.

FakeTensors have no values. An operation that needs one on the host (`.item()`, a branch on data, a shape that depends
on data) raises under them, and so would be found here; those are what a graph on an NPU cannot capture either.
"""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from vllm.config import set_current_vllm_config

from qwen3_fp8_ascend import ops
from qwen3_fp8_ascend.backends import operators, prefill, registry, soc
from qwen3_fp8_ascend.vllm_plugin import linear
from qwen3_fp8_ascend.vllm_plugin.linear import BlockFp8LinearMethod

from .conftest import BLOCK_FP8, QWEN3_8B, engine_config, write_config

NPU = torch.device("npu:0")
CHIPS = [("A2", "ascendc"), ("A2", "torch_npu"), ("A5", "torch_npu")]
"""A generation and a backend that serves it. Triton's needs its compiler at load: tests/triton_ascend."""


@pytest.fixture(params=CHIPS, ids=["A2-ascendc", "A2-torch_npu", "A5-torch_npu"])
def chip(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, str]]:
    """As if an NPU of that generation were here and the backend were built."""
    name, chosen = request.param
    generation = next(g for g in soc.GENERATIONS if g.name == name)
    monkeypatch.setattr(soc, "current_generation", lambda: generation)
    monkeypatch.setattr(prefill, "_scratch", {})
    monkeypatch.setattr(prefill, "_capturing", lambda device: False)  # the real question goes to the driver
    monkeypatch.setattr(linear, "_fill_with_small_values", lambda codes, scale: None)
    backend = dataclasses.replace(registry.load_backend(chosen), unusable=lambda: None)
    monkeypatch.setitem(registry.LOADED, chosen, backend)
    monkeypatch.setenv(registry.ENVIRONMENT_VARIABLE, chosen)
    registry.select_backend.cache_clear()
    yield request.param
    registry.select_backend.cache_clear()


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
        tensors += (getattr(module, "packed_weight", None) and list(module.packed_weight.tensors)) or []
    return sum({id(t.untyped_storage()): t.untyped_storage().nbytes() for t in tensors}.values())


def test_memory_of_qwen3_8b(tmp_path: Path, build: Callable[[Any], torch.nn.Module], chip: tuple[str, str]) -> None:
    """Full size: one byte a weight plus one scratch, beside the BF16 that vLLM-Ascend expands the checkpoint to."""
    generation, backend = chip
    folder = write_config(tmp_path / "fp8", **QWEN3_8B, quantization_config=BLOCK_FP8)
    config = engine_config(folder)
    model = build(config)
    layers = load(model, config)
    bf16 = resident_bytes(build(engine_config(write_config(tmp_path / "bf16", **QWEN3_8B), quantization=None)))
    linears = sum(layer.packed_weight.n * layer.packed_weight.k for layer in layers.values())
    packed = sum(layer.packed_weight.nbytes for layer in layers.values())
    scratch = prefill.reserved_bytes(NPU)
    total = resident_bytes(model) + scratch
    print(
        f"\nQwen3-8B on {generation} with {backend}: linears {packed / 1e9:.3f} GB ({packed / linears:.4f} bytes a "
        f"weight), scratch {scratch / 1e9:.3f} GB, all {total / 1e9:.2f} GB; in BF16 {bf16 / 1e9:.2f} GB"
    )
    assert len(layers) == 4 * 36 and linears == 36 * 192_937_984
    assert packed <= 1.04 * linears
    assert scratch == (0 if generation == "A5" else 2 * 24576 * 4096)  # the largest linear, gate and up, in bf16
    assert total - scratch - packed == bf16 - 2 * linears, "something else than the linears changed its size"
    assert all(layer.packed_weight.device == NPU for layer in layers.values())
    for layer in layers.values():  # the parameter that others look for is the packed weight itself
        shared = layer.packed_weight.tensors[0].untyped_storage()
        assert id(layer.weight.untyped_storage()) == id(shared) or layer.weight.untyped_storage() == shared


@pytest.mark.parametrize("m", [1, 64, 65, 2048])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_shapes_dtypes_and_no_question_to_the_device(
    tmp_path: Path, build: Callable[[Any], torch.nn.Module], chip: tuple[str, str], m: int, dtype: torch.dtype
) -> None:
    narrow = QWEN3_8B | {"num_hidden_layers": 1, "vocab_size": 264}
    config = engine_config(write_config(tmp_path / "fp8", **narrow, quantization_config=BLOCK_FP8))
    model = build(config)
    for name, layer in load(model, config).items():
        packed = layer.packed_weight
        with model.fake_mode, torch.no_grad():
            x = torch.empty(m, packed.k, dtype=dtype, device=NPU)
            out = layer.quant_method.apply(layer, x, torch.empty(packed.n, dtype=dtype, device=NPU))
            assert (out.shape, out.dtype, out.device) == ((m, packed.n), dtype, NPU), name


def test_what_the_scratch_operator_does_inside(chip: tuple[str, str]) -> None:
    """The operator hides its body from tracers; here the body itself runs on fake tensors."""
    if chip != ("A2", "torch_npu"):
        pytest.skip("only this backend's operator is made of torch operations alone")
    body = operators.IMPLEMENTATIONS["torch_npu_scratch_linear"]
    with FakeTensorMode(), NPU:
        codes, scales = torch.empty(24576, 4096, dtype=torch.uint8), torch.empty(24576, 32)
        for m in (1, 100):
            out = body(torch.empty(m, 4096, dtype=torch.bfloat16), codes, scales, None)
            assert (out.shape, out.dtype, out.device) == ((m, 24576), torch.bfloat16, NPU)


def test_ragged_shards_and_columns(chip: tuple[str, str]) -> None:
    """SmolLM2's: 576 = 4.5 blocks."""
    with FakeTensorMode(), NPU:
        weight = torch.empty(960, 576, dtype=torch.uint8).view(torch.float8_e4m3fn)
        scale = torch.empty(5 + 2 + 2, 5)
        packed = ops.pack_weight(weight, scale, chip[1], (576, 192, 192), check_values=False)
        out = ops.block_linear(torch.empty(7, 576, dtype=torch.bfloat16), packed)
        assert (out.shape, out.dtype) == ((7, 960), torch.bfloat16)


def test_no_operation_touches_fp8_but_the_native_product(chip: tuple[str, str]) -> None:
    """On A2 and A3 casts, copies and transposes of FP8 fail; only views may see the dtype there."""
    from torch.utils._python_dispatch import TorchDispatchMode

    seen: set[str] = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            flat = torch.utils._pytree.tree_leaves((args, kwargs))
            if any(isinstance(t, torch.Tensor) and t.dtype == torch.float8_e4m3fn for t in flat):
                seen.add(function.name())
            return function(*args, **(kwargs or {}))

    with FakeTensorMode(), NPU, Watch():
        weight = torch.empty(256, 256, dtype=torch.uint8).view(torch.float8_e4m3fn)
        packed = ops.pack_weight(weight, torch.empty(2, 2), chip[1], check_values=False)
        ops.block_linear(torch.empty(3, 256, dtype=torch.bfloat16), packed)
    native = {"npu::npu_quant_matmul", "aten::t", "aten::transpose.int"} if chip[0] == "A5" else set()
    views = {"aten::view.dtype", "aten::detach", "aten::alias", "prim::device"}
    assert seen <= views | native, seen
    assert chip[0] != "A5" or "npu::npu_quant_matmul" in seen
