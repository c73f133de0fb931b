"""What a linear does on an NPU can be captured in a graph, touches FP8 only where the chip knows it, and runs there.

Each generation and backend, on FakeTensors on `npu:0`, which no operation can ask for a value. Inside this package's
operators the real Python runs; kernels of Ascend C and Triton are shapes here (tests/ascendc and tests/triton_ascend
execute them). torch_npu's are its real schemas and shape functions.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from qwen3_fp8_ascend import ops
from qwen3_fp8_ascend.backends import operators, prefill
from qwen3_fp8_ascend.backends.registry import PackedWeight
from qwen3_fp8_ascend.errors import BlockFp8Error
from tests.ascendc.test_backend import schemas  # noqa: F401
from tests.support.npu_graph import FP8_VIEWS, Capture, GraphFault, falls_back_to_the_host

from .conftest import NPU, Chip

ROWS = (1, 16, 64, 65, 512)
"""On both sides of the hand-over from the fused kernels to the scratch."""

NATIVE = {"npu::npu_dynamic_block_quant", "npu::npu_quant_matmul", "aten::t", "aten::transpose.int"}


@pytest.fixture
def fake() -> Iterator[FakeTensorMode]:
    with FakeTensorMode(allow_non_fake_inputs=False) as mode, NPU, torch.no_grad():
        yield mode


def pack(chip: Chip, widths: tuple[int, ...], k: int, activation: str = "dynamic") -> PackedWeight:
    weight = torch.empty(sum(widths), k, dtype=torch.uint8).view(torch.float8_e4m3fn)
    scale = torch.empty(sum(-(-width // 128) for width in widths), -(-k // 128))
    return ops.pack_weight(weight, scale, chip.backend, widths, activation=activation, check_values=False)


def capture(packed: PackedWeight, m: int, dtype: torch.dtype, activation: str = "dynamic") -> Capture:
    """Capture a linear, then look at what it left behind."""
    x, bias = torch.empty(m, packed.k, dtype=dtype), torch.empty(packed.n, dtype=dtype)
    before = {device: id(tensor) for device, tensor in prefill._scratch.items()}
    with Capture() as graph:
        out = ops.block_linear(x, packed, bias, activation)
    assert (out.shape, out.dtype, out.device) == ((m, packed.n), dtype, NPU)
    assert {device: id(tensor) for device, tensor in prefill._scratch.items()} == before, "the scratch moved"
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
        with pytest.raises(BlockFp8Error, match="computes w8a8, not w8a16"):
            pack(chip, (256,), 512, "none")
        return
    graph = capture(pack(chip, (256,), 512, "none"), m, torch.bfloat16, "none")
    assert graph.touched_fp8 == set()


@pytest.mark.usefixtures("schemas")
def test_layers_of_a_device_share_one_scratch_as_large_as_the_largest(chip: Chip, fake: FakeTensorMode) -> None:
    packed = [pack(chip, widths, k) for widths, k in [((512,), 256), ((4096, 4096), 512), ((256,), 1024)]]
    assert prefill.reserved_bytes(NPU) == (0 if chip.native else 2 * 8192 * 512)
    for weight in packed:
        capture(weight, 2048, torch.bfloat16)


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
    names = {"ascendc_linear", "torch_npu_native_linear", "torch_npu_scratch_linear", "triton_block_linear"}
    assert set(operators.IMPLEMENTATIONS) == names


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
