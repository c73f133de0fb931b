"""Run by test_upstream.py where both pull requests are applied: their schemes against this project's specification.

torch-npu is the real one here. Its shape functions see every call on FakeTensors (schemas); its arithmetic is what
CANN's documentation says, as the pull request's own unit tests have it (`BlockOperators`).
"""

import ctypes
import importlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from vllm_ascend.utils import adapt_patch

importlib.import_module("torch_npu")  # which makes `npu` a kind of device
ctypes.CDLL(os.environ["NPU_DEVICE_GUARD"])
adapt_patch(is_global_patch=True)

from vllm_ascend.quantization.methods.w8a8 import fp8_block_fused, fp8_block_native  # noqa: E402

from qwen3_fp8_ascend.backends import ascendc  # noqa: E402
from qwen3_fp8_ascend.format import BlockGrid  # noqa: E402
from qwen3_fp8_ascend.testing.judges import Problem, assert_exact, random_problem  # noqa: E402
from tests.ut.quantization.methods.w8a8.test_fp8_block_native import BlockOperators  # noqa: E402

PARENT = "vllm_ascend.quantization.methods.w8a8.fp8_block"
BLOCK = (128, 128)
OPERATORS = re.compile(r'm\.def\(\s*((?:"[^"]*"\s*)+)\)')


@pytest.fixture(autouse=True)
def settings() -> Iterator[None]:
    """What an engine would have configured."""
    model = SimpleNamespace(model_config=SimpleNamespace(dtype=torch.bfloat16))
    ascend = SimpleNamespace(enable_fused_mc2=0)
    with (
        patch(f"{PARENT}.get_current_vllm_config", return_value=model),
        patch(f"{PARENT}.is_950", return_value=False),
        patch.object(fp8_block_native, "get_ascend_config", return_value=ascend),
        torch.no_grad(),
    ):
        yield


@pytest.fixture(scope="module", autouse=True)
def operators() -> Iterator[None]:
    """The custom operators with the schemas of the C++ that the pull request brings, and shapes alone."""
    library = torch.library.Library("_C_ascend", "FRAGMENT")
    source = Path("csrc/block_fp8_meta.cpp").read_text()
    schemas = ["".join(re.findall('"([^"]*)"', definition)) for definition in OPERATORS.findall(source)]
    assert len(schemas) == 3
    shapes: dict[str, Callable[..., Any]] = {
        "block_fp8_dequantize_out": lambda packed, scale, spans, out: None,
        "block_fp8_linear": lambda x, packed, scale, spans, bias, n, activation: x.new_empty(x.shape[0], n),
        "block_fp8_grouped_linear": lambda x, packed, scale, spans, ends, n, activation: x.new_empty(x.shape[0], n),
    }
    for schema in schemas:
        library.define(schema)
        library.impl(schema.partition("(")[0], shapes[schema.partition("(")[0]], "Meta")
    yield
    library._destroy()


def a_linear(scheme: Any, weight: torch.Tensor, scale: torch.Tensor) -> torch.nn.Module:
    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    layer.weight_scale_inv = torch.nn.Parameter(scale, requires_grad=False)
    scheme.process_weights_after_loading(layer)
    return layer


def a_layer(scheme: Any, tensors: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> torch.nn.Module:
    layer = torch.nn.Module()
    for name, (weight, scale) in tensors.items():
        setattr(layer, f"{name}_weight", torch.nn.Parameter(weight, requires_grad=False))
        setattr(layer, f"{name}_weight_scale_inv", torch.nn.Parameter(scale, requires_grad=False))
    scheme.process_weights_after_loading(layer)
    return layer


def experts_scheme(kind: Any, experts: int) -> Any:
    moe = SimpleNamespace(is_lora_enabled=False, has_bias=False, num_local_experts=experts)
    return kind(BLOCK, moe)


@pytest.mark.parametrize(("n", "k"), [(384, 256), (200, 576), (128, 100)])
def test_a_native_linear_is_exact(n: int, k: int) -> None:
    problem = random_problem(65, (n,), k)
    scheme = fp8_block_native.AscendFp8BlockNativeLinearMethod(BLOCK)
    layer = a_linear(scheme, problem.weight, problem.scale)
    with patch.object(fp8_block_native, "torch_npu", BlockOperators):
        assert_exact(scheme.apply(layer, problem.x), problem)


@pytest.mark.parametrize("group_list_type", [0, 1])
def test_native_experts_are_exact(group_list_type: int) -> None:
    """Both grouped products, each expert's rows by the judge of a linear."""
    counts = torch.tensor([40, 0, 1, 25])
    up = [random_problem(int(m) or 1, (256,), 384, seed=i) for i, m in enumerate(counts)]
    down = [random_problem(int(m) or 1, (384,), 128, seed=9 + i) for i, m in enumerate(counts)]

    def stacked(problems: list[Problem]) -> tuple[torch.Tensor, torch.Tensor]:
        codes = torch.stack([p.weight.view(torch.uint8) for p in problems]).view(torch.float8_e4m3fn)
        return codes, torch.stack([p.scale for p in problems])

    scheme = experts_scheme(fp8_block_native.AscendFp8BlockNativeFusedMoEMethod, len(counts))
    layer = a_layer(scheme, {"w13": stacked(up), "w2": stacked(down)})
    groups = counts if group_list_type == 1 else counts.cumsum(0)

    def given(problems: list[Problem]) -> tuple[SimpleNamespace, torch.Tensor]:
        x = torch.cat([p.x[:m] for p, m in zip(problems, counts.tolist(), strict=True)])
        out = SimpleNamespace(
            layer=layer, hidden_states=x, group_list=groups, group_list_type=group_list_type, topk_scales=None
        )
        return out, x

    with patch.object(fp8_block_native, "torch_npu", BlockOperators):
        first, _ = given(up)
        outs = {id(up): scheme.apply_gmm1(first)}
        second, x = given(down)
        outs[id(down)] = scheme.apply_gmm2(second, *scheme.apply_act_quant(second, x))
    for problems in (up, down):
        rows = outs[id(problems)].split(counts.tolist())
        for problem, got in zip(problems, rows, strict=True):
            if len(got):
                assert_exact(got, problem)


@pytest.mark.parametrize(("n", "k"), [(384, 256), (200, 576), (128, 100)])
def test_weights_are_packed_as_this_project_s_kernels_take_them(n: int, k: int) -> None:
    """Which tests/ascendc runs in the emulator; powers for a prefill of its own are the one thing that is not there."""
    problem = random_problem(1, (n,), k)
    scheme = fp8_block_fused.AscendFp8BlockFusedLinearMethod(BLOCK)
    layer = a_linear(scheme, problem.weight, problem.scale)
    codes, scales, spans = ascendc.pack(problem.weight, problem.scale, BlockGrid((n,), k))
    assert torch.equal(layer.weight, codes) and torch.equal(layer.weight_scale, scales)
    assert torch.equal(layer.weight_spans[:, :2], spans[:, :2]) and not layer.weight_spans[:, 2:].any()


def test_experts_are_packed_as_this_project_s_kernels_take_them() -> None:
    problems = [random_problem(1, (256,), 384, seed=i) for i in range(3)]
    codes = torch.stack([p.weight.view(torch.uint8) for p in problems]).view(torch.float8_e4m3fn)
    scale = torch.stack([p.scale for p in problems])
    scheme = experts_scheme(fp8_block_fused.AscendFp8BlockFusedKernelMoEMethod, 3)
    layer = a_layer(scheme, {"w13": (codes.clone(), scale), "w2": (codes.clone(), scale)})
    packed = ascendc.pack_experts(iter(codes), scale, BlockGrid((256,), 384))
    for name in ("w13", "w2"):
        ours = [getattr(layer, f"{name}_weight{part}") for part in ("", "_scale", "_spans")]
        assert torch.equal(ours[0], packed[0]) and torch.equal(ours[1], packed[1])
        assert torch.equal(ours[2][..., :2], packed[2][..., :2])


LINEARS = (fp8_block_native.AscendFp8BlockNativeLinearMethod, fp8_block_fused.AscendFp8BlockFusedLinearMethod)
EXPERTS = (
    fp8_block_native.AscendFp8BlockNativeFusedMoEMethod,
    fp8_block_fused.AscendFp8BlockFusedKernelMoEMethod,
)


@pytest.mark.parametrize("kind", LINEARS)
@pytest.mark.parametrize("rows", [1, 65])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_schemas_of_a_linear(kind: Any, rows: int, dtype: torch.dtype) -> None:
    with FakeTensorMode(), torch.device("npu:0"):
        scheme = kind(BLOCK)
        layer = a_linear(scheme, torch.empty(200, 300, dtype=torch.float8_e4m3fn), torch.empty(2, 3))
        for bias in (None, torch.empty(200, dtype=dtype)):
            out = scheme.apply(layer, torch.empty(2, rows, 300, dtype=dtype), bias)
            assert (out.shape, out.dtype, out.device.type) == ((2, rows, 200), dtype, "npu")


@pytest.mark.parametrize("kind", EXPERTS)
@pytest.mark.parametrize("rows", [1, 257, 4097])
@pytest.mark.parametrize("group_list_type", [0, 1])
def test_schemas_of_experts(kind: Any, rows: int, group_list_type: int) -> None:
    with FakeTensorMode(), torch.device("npu:0"):
        scheme = experts_scheme(kind, 4)
        declared = scheme.get_weight(4, 128, 256, torch.bfloat16)
        declared |= scheme.get_dynamic_quant_param(4, 128, 256, torch.bfloat16)
        tensors = {name: (declared[f"{name}_weight"], declared[f"{name}_weight_scale_inv"]) for name in ("w13", "w2")}
        layer = a_layer(scheme, tensors)
        given = SimpleNamespace(
            layer=layer,
            hidden_states=torch.empty(rows, 256, dtype=torch.bfloat16),
            group_list=torch.empty(4, dtype=torch.int64),
            group_list_type=group_list_type,
            topk_scales=None,
        )
        gate_up = scheme.apply_gmm1(given)
        assert (gate_up.shape, gate_up.dtype) == ((rows, 256), torch.bfloat16)
        out = scheme.apply_gmm2(given, *scheme.apply_act_quant(given, gate_up[:, :128]))
        assert (out.shape, out.dtype, out.device.type) == ((rows, 256), torch.bfloat16, "npu")
