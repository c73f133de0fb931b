"""The backend's Python over the real torch operators' schemas, with the emulator in the NPU's place."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from qwen3_fp8_ascend import ops, reference
from qwen3_fp8_ascend.backends import ascendc, prefill, registry
from qwen3_fp8_ascend.errors import BlockFp8Error
from qwen3_fp8_ascend.format import Activation, BlockGrid, BlockSize
from qwen3_fp8_ascend.testing.judges import assert_prefill, random_problem
from tests.support.products import DTYPES

from .conftest import SOURCES, Emulator, build, random_activation, random_weight, relative_error

NAMESPACE = "qwen3_fp8_ascend"


def torch_flags() -> tuple[str, ...]:
    include = Path(torch.__file__).parent / "include"
    return ("-std=c++20", "-isystem", str(include), "-isystem", str(include / "torch" / "csrc" / "api" / "include"))


def link_flags() -> tuple[str, ...]:
    library = Path(torch.__file__).parent / "lib"
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    return (abi, f"-L{library}", "-Wl,--no-as-needed", "-lc10", "-ltorch_cpu")


def build_schemas() -> Path:
    """csrc/ascend/host/torch_schema.cpp, compiled against this torch."""
    flags = (*torch_flags(), "-O0", "-fPIC", "-shared", *link_flags())
    return build("schemas.so", [SOURCES / "host" / "torch_schema.cpp"], flags=flags, include=())


@pytest.fixture(scope="session")
def schemas() -> None:
    torch.ops.load_library(build_schemas())


def grouped_product(x: torch.Tensor, weights: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """npu_grouped_matmul of 16-bit operands as documented: fp32 sums, one rounding, nobody's rows not written."""
    out = torch.full((x.shape[0], weights.shape[1]), float("nan"), dtype=x.dtype)
    for weight, (start, end) in zip(weights, itertools.pairwise([0, *ends.tolist()]), strict=True):
        out[start:end] = (x[start:end].float() @ weight.float().T).to(x.dtype)
    return out


@pytest.fixture
def on_cpu(schemas: None, emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> Iterator[Emulator]:
    """Gives the operators a CPU implementation, the emulator, and lets the backend run on the CPU."""
    library = torch.library.Library(NAMESPACE, "IMPL")

    def group_quantize(x: torch.Tensor, activation: int) -> tuple[torch.Tensor, torch.Tensor]:
        return emulator.quantize(x, activation=activation)[:2]

    def block_dequantize(packed, scale, spans, n, k, dtype):
        return emulator.dequantize((packed, scale, spans), n, k, dtype)[0]

    def block_dequantize_out(packed, scale, spans, out):
        out.copy_(emulator.dequantize((packed, scale, spans), *out.shape, out.dtype)[0])

    def block_linear(x, packed, scale, spans, bias, n, activation):
        return emulator.linear("block_linear", x, (packed, scale, spans), n, bias=bias, activation=activation)[0]

    def block_gemv(x, packed, scale, spans, bias, n, activation):
        return emulator.linear("block_gemv", x, (packed, scale, spans), n, bias=bias, activation=activation)[0]

    def block_grouped_linear(x, packed, scale, spans, ends, n, activation):
        return emulator.grouped_linear(x, (packed, scale, spans), ends, n, activation=activation)[0]

    every = (group_quantize, block_dequantize, block_dequantize_out, block_linear, block_gemv, block_grouped_linear)
    for function in every:
        library.impl(f"ascendc_{function.__name__}", function, "CPU")
    backend = dataclasses.replace(ascendc.BACKEND, device_types=frozenset({"cpu"}), unusable=lambda: None)
    monkeypatch.setitem(registry.LOADED, "ascendc", backend)
    monkeypatch.setattr(prefill, "stock_product", lambda x, w: (x.float() @ w.float().T).to(x.dtype))
    monkeypatch.setattr(prefill, "stock_grouped_product", grouped_product)
    registry.select_backend.cache_clear()
    ascendc._single_row_kernel.cache_clear()
    yield emulator
    ascendc._single_row_kernel.cache_clear()
    registry.select_backend.cache_clear()
    library._destroy()


def test_public_operations_end_to_end(on_cpu: Emulator) -> None:
    weight = random_weight((130, 62), 300, spread=1.0)
    packed = ops.pack_weight(weight.codes, weight.scale, weight.grid, "ascendc")
    x = random_activation(6, 300, torch.bfloat16).view(2, 3, 300)
    bias = torch.randn(192)
    got = ops.block_linear(x, packed, bias)
    oracle = reference.block_linear(x, weight.codes, weight.scale, grid=weight.grid, compute_dtype=torch.float64)
    expected = (oracle + bias).to(x.dtype)  # the bias is not rounded on its way, and neither is the sum before it
    assert got.shape == (2, 3, 192)
    assert got.dtype == torch.bfloat16
    assert (got == expected).float().mean() >= 0.99
    codes, scale = ops.quantize_activation(x, backend="ascendc")
    expected_codes, expected_scale = reference.quantize_activation(x)
    assert torch.equal(codes.view(torch.uint8), expected_codes.view(torch.uint8))
    assert torch.equal(scale, expected_scale)
    dense = ops.dequantize_weight(weight.codes, weight.scale, weight.grid, torch.float16, backend="ascendc")
    assert torch.equal(dense, reference.dequantize_weight(weight.codes, weight.scale, weight.grid, torch.float16))


PREFILLS = ((65, (256,), 512), (65, (130, 62), 300), (512, (72, 40), 260))
"""(m, widths, k): whole blocks, ragged shards, many rows."""


@pytest.mark.parametrize("activation", Activation)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "widths", "k"), PREFILLS)
def test_more_rows_than_the_fused_kernel_takes_go_through_the_scratch(
    on_cpu: Emulator, m: int, widths: tuple[int, ...], k: int, dtype: torch.dtype, activation: Activation
) -> None:
    """By the bound that has a name: one power of two for the weight, one for each row, operands in fp16."""
    assert m > ascendc.HAND_OVER_ROWS
    problem = random_problem(m, widths, k, dtype=dtype, bias=True)
    packed = ops.pack_weight(problem.weight, problem.scale, problem.grid, "ascendc", activation=activation)
    for bias in (None, problem.bias):
        got = ops.block_linear(problem.x, packed, bias, activation)
        assert_prefill(got, dataclasses.replace(problem, bias=bias), activation)


def test_every_tile_carries_the_powers_of_two_of_its_weight(on_cpu: Emulator) -> None:
    weight = random_weight((200, 30), 300)
    spans = ops.pack_weight(weight.codes, weight.scale, weight.grid, "ascendc").tensors[2]
    powers = prefill.powers_of_weight(weight.scale)
    assert torch.equal(spans[:, 2:4].view(torch.float32), powers.expand(3, 2)) and not spans[:, 4:].any()
    assert spans[:, :2].tolist() == [[0, 128], [128, 72], [200, 30]]


def test_a_weight_beyond_the_scratch_keeps_to_the_fused_kernel(
    on_cpu: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefill, "MAX_WEIGHTS", 1000)

    def taken(*_: object) -> None:
        raise AssertionError("a scratch was taken")

    monkeypatch.setattr(prefill, "scratch", taken)
    weight = random_weight((200,), 300)
    packed = ops.pack_weight(weight.codes, weight.scale, backend="ascendc")
    x = random_activation(2 * ascendc.HAND_OVER_ROWS + 1, 300, torch.float32)
    oracle = reference.block_linear(x, weight.codes, weight.scale, compute_dtype=torch.float64)
    assert relative_error(ops.block_linear(x, packed), oracle) <= 1e-6


@pytest.mark.parametrize("kernel", ascendc.SINGLE_ROW_KERNELS)
def test_one_row_goes_to_the_kernel_that_is_asked_for(
    on_cpu: Emulator, monkeypatch: pytest.MonkeyPatch, kernel: str
) -> None:
    monkeypatch.setenv(ascendc.SINGLE_ROW_VARIABLE, kernel)
    weight = random_weight((200,), 300)
    packed = ops.pack_weight(weight.codes, weight.scale, backend="ascendc")
    x = random_activation(1, 300, torch.float32)
    got = ops.block_linear(x, packed)
    assert torch.equal(got, on_cpu.linear(f"block_{kernel}", x, packed.tensors, 200)[0])
    oracle = reference.block_linear(x, weight.codes, weight.scale, compute_dtype=torch.float64)
    assert relative_error(got, oracle) <= 1e-6


def test_a_misspelt_kernel_is_refused(on_cpu: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ascendc.SINGLE_ROW_VARIABLE, "gmev")
    weight = random_weight((128,), 128)
    packed = ops.pack_weight(weight.codes, weight.scale, backend="ascendc")
    with pytest.raises(BlockFp8Error, match="linear or gemv"):
        ops.block_linear(torch.ones(1, 128), packed)


def test_no_rows_and_no_columns(on_cpu: Emulator) -> None:
    weight = random_weight((128,), 128)
    packed = ops.pack_weight(weight.codes, weight.scale, backend="ascendc")
    assert ops.block_linear(torch.zeros(0, 128), packed).shape == (0, 128)
    assert ops.quantize_activation(torch.zeros(0, 128), backend="ascendc")[1].shape == (0, 1)


def test_the_start_up_check_passes_and_notices_a_device_that_flushes_subnormals(
    on_cpu: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ascendc._decode_fault(torch.device("cpu")) is None
    kept = ascendc.dequantize_weight
    monkeypatch.setattr(
        ascendc, "dequantize_weight", lambda *args: torch.where(kept(*args).abs() < 2**-6, 0.0, kept(*args))
    )
    assert "wrong values" in str(ascendc._decode_fault(torch.device("cpu")))


def test_meta_shapes_and_symbolic_sizes(schemas: None) -> None:
    operators = torch.ops.qwen3_fp8_ascend
    x = torch.empty(5, 300, device="meta", dtype=torch.bfloat16)
    codes, scale = operators.ascendc_group_quantize(x, 0)
    assert (codes.shape, codes.dtype) == ((5, 300), torch.uint8)
    assert (scale.shape, scale.dtype) == ((5, 3), torch.float32)
    packed, w_scale, spans = (
        torch.empty(shape, device="meta", dtype=dtype)
        for shape, dtype in (((2, 3, 16384), torch.uint8), ((2, 3, 8), torch.float32), ((2, 8), torch.int32))
    )
    out = operators.ascendc_block_linear(x, packed, w_scale, spans, None, 200, 0)
    assert (out.shape, out.dtype) == ((5, 200), torch.bfloat16)
    experts, ends = (tensor[None].expand(4, *tensor.shape) for tensor in (packed, w_scale, spans)), x.new_empty(4)
    out = operators.ascendc_block_grouped_linear(x, *experts, ends.long(), 200, 0)
    assert (out.shape, out.dtype) == ((5, 200), torch.bfloat16)
    dense = operators.ascendc_block_dequantize(packed, w_scale, spans, 200, 300, torch.float16)
    assert (dense.shape, dense.dtype) == ((200, 300), torch.float16)

    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        rows = mode.from_tensor(torch.empty(7, 300), symbolic_context=None, static_shapes=False)
        codes, scale = operators.ascendc_group_quantize(rows, 0)
        assert codes.shape[0] == rows.shape[0]
        assert scale.shape[1] == (rows.shape[1] + 127) // 128


def test_bad_input_is_refused_with_reasons(on_cpu: Emulator) -> None:
    weight = random_weight((128,), 128)
    with pytest.raises(BlockFp8Error, match="groups of 128"):
        ops.quantize_activation(torch.zeros(1, 128), block_k=64, backend="ascendc")
    with pytest.raises(BlockFp8Error, match="blocks of 128x128, not 64x64"):
        ops.pack_weight(weight.codes, torch.ones(2, 2), BlockGrid((128,), 128, BlockSize(64, 64)), "ascendc")
    nan = weight.codes.view(torch.uint8).clone()
    nan[0, 0] = 0x7F
    with pytest.raises(BlockFp8Error, match="NaN codes"):
        ops.pack_weight(nan.view(torch.float8_e4m3fn), weight.scale, backend="ascendc")


def test_without_an_npu_the_backend_says_why() -> None:
    reason = ascendc.unusable()
    assert reason is not None
    assert any(word in reason for word in ("torch_npu", "CANN", "NPU"))
    with pytest.raises(BlockFp8Error, match="cannot be used here"):
        registry.select_backend("ascendc", "npu")
