"""The grouped kernel and layers of experts in upstream Triton's interpreter, against the fp64 oracles."""

import itertools
import os

import pytest

pytest.importorskip("triton", reason="upstream Triton lives in .venv-triton: `make test-triton`")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("the interpreter is chosen by TRITON_INTERPRET=1: `make test-triton`", allow_module_level=True)

import torch
import triton.language as tl

from qwen3_fp8_ascend import ops
from qwen3_fp8_ascend.backends import prefill
from qwen3_fp8_ascend.backends.triton import backend, launch
from qwen3_fp8_ascend.errors import BlockFp8Error
from qwen3_fp8_ascend.format import Activation
from qwen3_fp8_ascend.testing.experts import assert_layer_exact, judge_layer, random_experts
from qwen3_fp8_ascend.testing.judges import Problem, assert_exact, assert_prefill
from qwen3_fp8_ascend.triton_kernels import block_grouped_linear
from qwen3_fp8_ascend.triton_kernels.configuration import INTERPRETER, grouped_shape
from tests.support.groups import PATTERNS, ends_of, random_groups
from tests.support.products import with_dtypes_and_activations


def grouped(x, weights, scales, grid, ends, activation=Activation.W8A8, unrounded=False):
    packed = ops.pack_experts(weights, scales, grid, "triton")
    return ops.grouped_linear(x, packed, ends, activation, unrounded=unrounded)


SHORT = {
    (16, 7): tuple(PATTERNS),
    (16, 1): ("uneven and empty",),
    (64, 3): ("all on one", "a tile and one row"),
}
"""(BLOCK_M, programs): every pattern in the smaller tile, and those that another tile or a single program changes."""
TILES_AND_PATTERNS = [
    pytest.param(
        *tile, PATTERNS[name], id=f"m{tile[0]}-{tile[1]}-{name}", marks=[] if name in short else pytest.mark.long
    )
    for tile, short in SHORT.items()
    for name in PATTERNS
]


@pytest.mark.parametrize(("block_m", "cores", "counts"), TILES_AND_PATTERNS)
def test_the_kernel_is_its_specification(block_m, cores, counts):
    groups, k_blocks, n = len(counts), 4, 256
    weights, scales, grid = random_groups(groups, (n,), 128 * k_blocks)
    lanes, w_scale, _ = backend.pack_experts(iter(weights), scales, grid)
    owned = sum(counts)
    m = owned + 2  # two rows are nobody's
    m_padded = -(-(m + block_m - 1) // 16) * 16
    values, a_scale = launch.group_values(torch.randn(m, grid.k), launch.CODE_VALUES, k_blocks, m_padded)
    out = torch.full((m, n), 7.0)
    block_grouped_linear.block_grouped_linear_kernel[(cores,)](
        values,
        a_scale,
        lanes,
        w_scale,
        ends_of(counts),
        out,
        m,
        m_padded,
        n,
        k_blocks,
        groups,
        BLOCK_M=block_m,
        BLOCK_N=128,
        KEEPS_SUBNORMALS=True,
        DOT=tl.float32,
        CORES=cores,
    )
    expected = block_grouped_linear.block_grouped_linear_specification(values, a_scale, lanes, w_scale, ends_of(counts))
    assert (out[:owned] - expected[:owned]).norm() <= 1e-6 * expected[:owned].norm()
    assert (out[owned:] == 7.0).all(), "rows that are nobody's were written"


GROUPED = (((5, 0, 18), (130, 62), 300), ((2,), (1,), 1))
"""(counts, widths, k). Every dtype and activation meets the smaller one."""


@pytest.mark.parametrize(
    ("counts", "widths", "k", "dtype", "activation"), with_dtypes_and_activations(GROUPED, whole=GROUPED[1:])
)
def test_a_grouped_linear_passes_the_gates_of_the_dense_one(counts, widths, k, dtype, activation):
    weights, scales, grid = random_groups(len(counts), widths, k)
    x = torch.randn(sum(counts) + 1, k).to(dtype)
    got = grouped(x, weights, scales, grid, ends_of(counts), activation)
    unrounded = grouped(x, weights, scales, grid, ends_of(counts), activation, unrounded=True)
    assert got.shape == (len(x), grid.n) and got.dtype == dtype and unrounded.dtype == torch.float32
    for expert, (start, end) in enumerate(itertools.pairwise([0, *ends_of(counts).tolist()])):
        problem = Problem(x[start:end], weights[expert], scales[expert], grid=grid)
        assert_exact(got[start:end], problem, activation)
        assert torch.equal(unrounded[start:end].to(dtype), got[start:end])


@pytest.mark.parametrize(
    ("hidden", "intermediate", "dtype", "activation"), with_dtypes_and_activations([(256, 128), (300, 200)])
)
def test_a_layer_is_the_specification(hidden, intermediate, dtype, activation):
    """Ragged gate and up projections, an expert named twice, tokens that go nowhere."""
    problem = random_experts(9, 5, 3, hidden, intermediate, dtype=dtype)
    problem.topk_ids[0] = -1
    problem.topk_ids[1, 2] = -1
    assert_layer_exact(problem.layer("triton", activation), problem, activation)


def test_the_stages_of_a_layer_are_those_of_the_specification():
    """h bit for bit but for jumps, and the sum of what the down projection gives in the order of the slots."""
    problem = random_experts(6, 4, 2, 256, 128)
    w13, w2 = problem.pack("triton")
    order = problem.topk_ids.flatten().sort(stable=True)
    ends = torch.searchsorted(order.values, torch.arange(4), right=True)
    h = ops.grouped_linear(problem.x[order.indices // 2], w13, ends)
    gate, up = h.float().split(128, dim=1)
    a = (torch.nn.functional.silu(gate) * up).to(problem.x.dtype)
    y = torch.empty(12, 256)
    y[order.indices] = ops.grouped_linear(a, w2, ends, unrounded=True)
    out = torch.zeros(6, 256)
    for slot in range(2):
        out = out + y.view(6, 2, 256)[:, slot] * problem.topk_weights[:, slot : slot + 1]
    assert torch.equal(out.to(problem.x.dtype), problem.layer("triton"))


def test_a_row_depends_on_its_expert_s_weight_alone():
    weights, scales, grid = random_groups(3, (200,), 384)
    x = torch.randn(30, 384).bfloat16()
    together = grouped(x, weights, scales, grid, ends_of((0, 23, 7)))
    for row, expert in ((0, 1), (22, 1), (23, 2), (29, 2)):
        alone = grouped(x[row : row + 1], weights, scales, grid, ends_of([int(e == expert) for e in range(3)]))
        assert torch.equal(alone[0], together[row])


def wrong_scale(arguments):
    """Every expert has the scales of the one before."""
    arguments["w_scale"] = arguments["w_scale"].roll(1, 0)


def one_row_late(arguments):
    """Groups end one row later than they do."""
    arguments["ends"] = (arguments["ends"] + 1).clamp(max=arguments["m"])


def tail_lost(arguments):
    """A group's last pass, which does not fill a tile, is left out."""
    starts = torch.nn.functional.pad(arguments["ends"], (1, 0))[:-1]
    counts = arguments["ends"] - starts
    arguments["ends"] = starts + torch.where(counts > 16, counts // 16 * 16, counts)


@pytest.mark.parametrize("fault", [None, wrong_scale, one_row_late, tail_lost])
def test_planted_faults_are_found(fault, monkeypatch):
    problem = random_experts(40, 3, 2, 256, 128)
    problem.topk_ids[:20] = 1  # passes of more than one tile
    honest = launch.launch_grouped_linear
    names = ("values", "a_scale", "lanes", "w_scale", "ends", "m", "cut", "dtype", "subnormals")

    def faulty(*given):
        arguments = dict(zip(names, given, strict=True))
        if fault is not None:
            fault(arguments)
        out = torch.zeros(0)
        with monkeypatch.context() as zeroed:  # what is not written is zero, not what was right a moment ago
            zeroed.setattr(torch, "empty", torch.zeros)
            out = honest(*arguments.values())
        return out

    monkeypatch.setattr(backend, "launch_grouped_linear", faulty)
    monkeypatch.setattr(backend, "grouped_shape", lambda *_: launch.LinearShape(16, 128, 1, 96))
    faults = judge_layer(problem.layer("triton"), problem).faults
    assert bool(faults) == (fault is not None), faults


def test_weights_beyond_32_bits_are_found(monkeypatch):
    """A layer of 4.3 GB of lanes: memory that nothing touches is never there, so only two experts are real.

    With offsets of 32 bits the last expert's would be negative. One program, since each walks over all experts.
    """
    monkeypatch.setattr(launch, "cores_of", lambda *_: (1, 1))
    n, k = 2048, 2048
    lanes_of_one = n * k // 2
    experts = (1 << 31) // lanes_of_one + 2
    lanes = torch.empty(experts, k // 256, n, 128, dtype=torch.int16)
    w_scale = torch.empty(experts, k // 128, n)
    powers = torch.ones(experts, 2)
    weights, scales, grid = random_groups(2, (n,), k)
    for place, expert in ((0, 0), (experts - 1, 1)):
        lanes[place], w_scale[place], _ = backend.pack(weights[expert], scales[expert], grid)
    assert lanes[-1].storage_offset() > 2**31
    ends = torch.full((experts,), 3)
    ends[-1] = 7
    x = torch.randn(7, k)
    got = backend.triton_block_grouped_linear(x, lanes, w_scale, powers, ends, n, "w8a8", torch.float32)
    for expert, rows in ((0, slice(0, 3)), (1, slice(3, 7))):
        assert_exact(got[rows], Problem(x[rows], weights[expert], scales[expert], grid=grid))


@pytest.mark.parametrize("activation", list(Activation))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_prefill_through_one_scratch(dtype, activation, monkeypatch):
    """By the bound that has a name; on an NPU the operator itself takes this way beyond `HAND_OVER_ROWS` an expert."""
    counts, widths, k = (3, 0, 9), (60, 100), 260
    weights, scales, grid = random_groups(3, widths, k)
    scales[2] *= 1000.0  # experts are normalised each by its own power of two
    x = torch.randn(sum(counts), k).to(dtype)
    ends = ends_of(counts)

    def product(x, weights, ends):
        out = torch.zeros(x.shape[0], weights.shape[1], dtype=x.dtype)
        for expert, (start, end) in enumerate(itertools.pairwise([0, *ends.tolist()])):
            out[start:end] = (x[start:end].float() @ weights[expert].float().T).to(x.dtype)
        return out

    monkeypatch.setattr(prefill, "stock_grouped_product", product)
    tensors = ops.pack_experts(weights, scales, grid, "triton").grouped_tensors
    got = backend.grouped_through_scratch(x, *tensors, ends, grid.n, activation.value, dtype)
    for expert, (start, end) in enumerate(itertools.pairwise([0, *ends.tolist()])):
        assert_prefill(got[start:end], Problem(x[start:end], weights[expert], scales[expert], grid=grid), activation)


def test_the_operator_is_traceable():
    weights, scales, grid = random_groups(2, (128,), 256)
    tensors = ops.pack_experts(weights, scales, grid, "triton").grouped_tensors
    torch.library.opcheck(
        backend.triton_block_grouped_linear,
        (torch.randn(3, 256), *tensors, ends_of((1, 2)), 128, "w8a8", torch.float32),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_packed_experts_take_one_byte_a_weight_and_a_scale_per_row():
    weights, scales, grid = random_groups(3, (256, 256), 512)
    packed = ops.pack_experts(weights, scales, grid, "triton")
    assert packed.groups == 3 and packed.nbytes == 3 * (512 * 512 * (1 + 4 / 128) + 8)


def test_bad_operands_are_refused_before_any_launch(monkeypatch):
    weights, scales, grid = random_groups(2, (128,), 256)
    packed = ops.pack_experts(weights, scales, grid, "triton")
    lanes, w_scale, powers = packed.grouped_tensors

    def launched(*_, **__):
        raise AssertionError("a kernel was launched")

    monkeypatch.setattr(backend, "launch_grouped_linear", launched)
    x, ends = torch.randn(3, 256), ends_of((1, 2))
    for bad in ((x, lanes[:1], w_scale), (x, lanes, w_scale[0]), (x[:, :100].contiguous(), lanes[:, :0], w_scale)):
        with pytest.raises(BlockFp8Error, match="is not a packed weight's"):
            backend.triton_block_grouped_linear(*bad, powers, ends, 128, "w8a8", torch.float32)
    for list_ in ((2, 1), (1, 4), (-1, 3)):
        with pytest.raises(BlockFp8Error, match="ends of the experts' rows"):
            ops.grouped_linear(x, packed, torch.tensor(list_))
    with pytest.raises(BlockFp8Error, match="32-bit"):
        backend.pack(torch.empty(1 << 16, 1 << 16, device="meta").to(torch.float8_e4m3fn), torch.ones(1), grid)


def test_tiles_follow_the_average():
    assert grouped_shape(8, 128, INTERPRETER, True).block_m == 16
    assert grouped_shape(128 * 40, 128, INTERPRETER, True).block_m == 64
    for m, groups in ((1, 1), (7, 512), (4096, 3)):
        cut = grouped_shape(m, groups, INTERPRETER, True)
        assert cut.m_padded >= m + cut.block_m - 1 and cut.m_padded % INTERPRETER.value_rows == 0 and cut.split_k == 1
