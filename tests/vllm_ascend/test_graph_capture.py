"""What a linear does on an NPU can be captured in a graph, touches FP8 only where the chip knows it, and runs there.

Each generation and backend, on FakeTensors on `npu:0`, which no operation can ask for a value. Inside this package's
operators the real Python runs; kernels of Ascend C and Triton are shapes here (tests/ascendc and tests/triton_ascend
execute them). torch_npu's are its real schemas and shape functions.
"""

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from qwen3_fp8_ascend import ops
from qwen3_fp8_ascend.backends import operators, prefill
from qwen3_fp8_ascend.backends.registry import PackedWeight, available_backends
from qwen3_fp8_ascend.errors import BlockFp8Error
from qwen3_fp8_ascend.format import Activation, BlockGrid
from tests.support.npu_graph import FP8_VIEWS, Capture, GraphFault, falls_back_to_the_host

from .conftest import NPU, Chip, once

pytestmark = once

ROWS = (1, 16, 64, 65, 512)
"""On both sides of the hand-over from the fused kernels to the scratch."""

NATIVE = {
    "npu::npu_dynamic_block_quant",
    "npu::npu_quant_matmul",
    "npu::npu_grouped_matmul",
    "aten::t",
    "aten::transpose.int",
}


@pytest.fixture
def fake() -> Iterator[FakeTensorMode]:
    with FakeTensorMode(allow_non_fake_inputs=False) as mode, NPU, torch.no_grad():
        yield mode


def pack(chip: Chip, widths: tuple[int, ...], k: int, activation: Activation = Activation.W8A8) -> PackedWeight:
    weight = torch.empty(sum(widths), k, dtype=torch.uint8).view(torch.float8_e4m3fn)
    scale = torch.empty(sum(-(-width // 128) for width in widths), -(-k // 128))
    return ops.pack_weight(weight, scale, BlockGrid(widths, k), chip.backend, activation=activation, check_values=False)


def capture(packed: PackedWeight, m: int, dtype: torch.dtype, activation: Activation = Activation.W8A8) -> Capture:
    """Capture a linear, then look at what it left behind: nothing, and so no scratch that another stream could get."""
    x, bias = torch.empty(m, packed.k, dtype=dtype), torch.empty(packed.n, dtype=dtype)
    with Capture() as graph:
        out = ops.block_linear(x, packed, bias, activation)
    assert (out.shape, out.dtype, out.device) == ((m, packed.n), dtype, NPU)
    del out
    assert graph.left_behind() == []
    return graph


@pytest.mark.usefixtures("schemas")
@pytest.mark.parametrize("m", ROWS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("widths", "k"), [((4096, 1024, 1024), 4096), ((576, 192, 192), 576)])
def test_a_linear_can_be_captured(
    chip: Chip, fake: FakeTensorMode, widths: tuple[int, ...], k: int, dtype: torch.dtype, m: int
) -> None:
    packed = pack(chip, widths, k)
    graph = capture(packed, m, dtype)
    assert graph.touched_fp8 <= (FP8_VIEWS | NATIVE if chip.native else FP8_VIEWS)
    assert chip.native == ("npu::npu_quant_matmul" in graph.touched_fp8)
    torch_s = {name for name in graph.seen if name.startswith(("aten::", "npu::"))}
    assert torch_s and {name for name in torch_s if falls_back_to_the_host(name)} == set()


@pytest.mark.usefixtures("schemas")
@pytest.mark.parametrize("m", ROWS)
def test_weights_only_can_be_captured(chip: Chip, fake: FakeTensorMode, m: int) -> None:
    if chip.backend == "torch_npu":
        with pytest.raises(BlockFp8Error, match="computes w8a8/w8a8-ue8m0, not w8a16"):
            pack(chip, (256,), 512, Activation.W8A16)
        return
    graph = capture(pack(chip, (256,), 512, Activation.W8A16), m, torch.bfloat16, Activation.W8A16)
    assert graph.touched_fp8 == set()


@pytest.mark.usefixtures("schemas")
@pytest.mark.parametrize("tokens", [1, 16, 1024])
@pytest.mark.parametrize("intermediate", [768, 192])  # Qwen3-30B-A3B's, and what a shard at TP 4 would have
def test_a_layer_of_experts_can_be_captured(chip: Chip, fake: FakeTensorMode, intermediate: int, tokens: int) -> None:
    """Routing, both grouped linears and the weighted sum: nothing asks the device which expert has how many rows."""
    experts, hidden, top_k = 3, 2048, 2

    def pack_layer(grid: BlockGrid) -> PackedWeight:
        weights = (torch.empty(grid.n, grid.k, dtype=torch.uint8).view(torch.float8_e4m3fn) for _ in range(experts))
        scales = torch.empty(experts, *grid.scale_shape)
        return ops.pack_experts(weights, scales, grid, chip.backend, check_values=False)

    w13, w2 = BlockGrid((intermediate, intermediate), hidden), BlockGrid((hidden,), intermediate)
    if chip.backend == "torch_npu" and not chip.native:
        with pytest.raises(BlockFp8Error, match="serves experts on Ascend 950 alone"):
            pack_layer(w13)
        return
    packed = pack_layer(w13), pack_layer(w2)
    x, weights = torch.empty(tokens, hidden, dtype=torch.bfloat16), torch.empty(tokens, top_k)
    ids = torch.empty(tokens, top_k, dtype=torch.int32)
    with Capture() as graph:
        out = ops.block_experts(x, *packed, weights, ids)
    assert (out.shape, out.dtype, out.device) == (x.shape, x.dtype, NPU)
    del out
    assert graph.left_behind() == []
    assert graph.touched_fp8 <= (FP8_VIEWS | NATIVE if chip.native else FP8_VIEWS)
    assert chip.native == ("npu::npu_grouped_matmul" in graph.touched_fp8)
    many = tokens * top_k > 64 * experts  # from there on A2 and A3 decode the layer and take the stock grouped product
    assert (chip.native or many) == ("npu::npu_grouped_matmul" in graph.seen)
    torch_s = {name for name in graph.seen if name.startswith(("aten::", "npu::"))}
    assert {name for name in torch_s if falls_back_to_the_host(name)} == set()


@pytest.mark.usefixtures("schemas")
def test_each_call_has_a_scratch_of_its_own(chip: Chip, fake: FakeTensorMode, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the allocator, of the stream or of the graph that is being captured, and as large as the weight in fp16."""
    taken: list[weakref.ref[torch.Tensor]] = []
    sizes: list[int] = []
    honest = prefill.scratch

    def watched(rows: int, columns: int, x: torch.Tensor) -> torch.Tensor:
        out = honest(rows, columns, x)
        assert (out.dtype, out.device) == (torch.float16, NPU)
        taken.append(weakref.ref(out))
        sizes.append(out.numel() * out.itemsize)
        return out

    monkeypatch.setattr(prefill, "scratch", watched)
    for widths, k in [((512,), 256), ((4096, 4096), 512), ((256,), 1024)]:
        packed = pack(chip, widths, k)
        for m in (64, 65, 2048):
            capture(packed, m, torch.bfloat16)
    assert all(scratch() is None for scratch in taken)
    calls = 0 if chip.native else 3 if chip.backend == "torch_npu" else 2
    assert sizes == [size for size in (2 * 512 * 256, 2 * 8192 * 512, 2 * 256 * 1024) for _ in range(calls)]


@pytest.mark.usefixtures("schemas")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_stock_product_takes_fp16(chip: Chip, fake: FakeTensorMode, dtype: torch.dtype) -> None:
    """Whatever the model's dtype is: what goes into it beyond the hand-over, and what comes out of torch_npu's."""
    if chip.native:
        pytest.skip("A5's own block product takes FP8")
    seen: list[tuple[torch.dtype, ...]] = []
    honest = prefill.stock_product

    def watched(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        out = honest(x, weight)
        seen.append((x.dtype, weight.dtype, out.dtype))
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefill, "stock_product", watched)
        capture(pack(chip, (256,), 512), 65, dtype)
    assert seen == [(torch.float16,) * 3]


def test_torch_compile_sees_one_graph(chip: Chip, fake: FakeTensorMode) -> None:
    """Nothing of a linear makes Dynamo leave the graph, and a graph serves any number of rows."""
    torch._dynamo.reset()
    packed = pack(chip, (384, 256), 512)
    graphs: list[torch.fx.GraphModule] = []

    def keep(module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        graphs.append(module)
        return torch._dynamo.disable(module.forward)  # running it on FakeTensors is no concern of Dynamo's

    compiled = torch.compile(ops.block_linear, backend=keep, fullgraph=True, dynamic=True)
    for m in (7, 300):
        out = compiled(torch.empty(m, 512, dtype=torch.bfloat16), packed)
        assert (out.shape, out.device) == ((m, 640), NPU)
    assert len(graphs) == 1
    called = {str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"}
    expected = {
        "ascendc": "qwen3_fp8_ascend.ascendc_linear",
        "triton": "qwen3_fp8_ascend.triton_block_linear",
        "torch_npu": f"qwen3_fp8_ascend.torch_npu_{'native' if chip.native else 'scratch'}_linear",
    }
    assert any(expected[chip.backend] in name for name in called), called


def test_every_operator_of_this_package_is_looked_into() -> None:
    available_backends()  # each registers its operators when it is loaded
    names = {
        "ascendc_linear",
        "ascendc_grouped_linear",
        "torch_npu_native_linear",
        "torch_npu_native_grouped_linear",
        "torch_npu_scratch_linear",
        "triton_block_linear",
        "triton_block_grouped_linear",
        # Alone, not within a linear: ops.quantize_activation and ops.dequantize_weight.
        "triton_quantize_activation",
        "triton_dequantize_weight",
    }
    of_gpus = {name for name in operators.IMPLEMENTATIONS if name.startswith("nvidia_")}
    assert set(operators.IMPLEMENTATIONS) - of_gpus == names


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (lambda x: x.sum().item(), "waits for the device"),
        (lambda x: x.nonzero(), "waits for the device"),
        (lambda x: x[x > 0], "waits for the device"),
        (lambda x: x.cpu(), "works on cpu and npu"),
        (lambda x: x + torch.ones(1, device="cpu"), "works on cpu"),
    ],
)
def test_what_cannot_be_captured_is_noticed(fake: FakeTensorMode, fault: object, said: str) -> None:
    x = torch.empty(4, 4)
    with pytest.raises(GraphFault, match=said), Capture():
        fault(x)  # type: ignore[operator]


def test_what_outlives_a_capture_is_noticed(fake: FakeTensorMode) -> None:
    kept = []
    with Capture() as graph:
        kept.append(torch.empty(4) + 1)
    assert len(graph.left_behind()) == 1


def test_a_missing_kernel_is_noticed() -> None:
    import torch_npu  # noqa: F401

    assert falls_back_to_the_host("aten::geometric_") and falls_back_to_the_host("aten::_linalg_eigh")
    assert not falls_back_to_the_host("aten::mm") and not falls_back_to_the_host("aten::view.dtype")
