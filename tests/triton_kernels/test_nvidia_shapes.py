"""The table of shapes for NVIDIA GPUs, and the counters of split K; needs neither Triton nor a GPU."""

import contextlib
import itertools
from types import SimpleNamespace

import pytest
import torch

from qwen3_fp8_ascend.backends.nvidia import counters
from qwen3_fp8_ascend.errors import BlockFp8Error
from qwen3_fp8_ascend.triton_kernels.nvidia.shapes import (
    CHIPS,
    MIN_BLOCKS_PER_SPLIT,
    blocks_ahead,
    chip,
    cut_for,
    stage_bytes,
)

QWEN3_8B = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (24576, 4096), "down": (4096, 12288)}


TOKENS = (1, 16, 17, 32, 33, 64, 65, 512, 1000)
WEIGHTS = ((1, 1), (9, 5), (32, 32), (48, 32), (192, 32), (32, 96))
"""(scale rows, blocks of K)."""


@pytest.mark.parametrize("here", CHIPS, ids=lambda line: line.name)
@pytest.mark.parametrize(("itemsize", "quantized"), [(2, False), (2, True), (4, False)])
def test_every_stretch_has_work_and_every_program_fits(here, itemsize, quantized):
    for m, (scale_rows, k_blocks) in itertools.product(TOKENS, WEIGHTS):
        linear = f"m={m}, {scale_rows} scale rows, {k_blocks} blocks of K"
        cut = cut_for(m, scale_rows, 128 * scale_rows, k_blocks, here, 132, itemsize, quantized)
        assert 128 % cut.tile.block_n == 0 and cut.tile.stages >= 1, linear
        assert cut.tile.stages * stage_bytes(cut.tile, itemsize) <= here.shared_kib << 10, linear
        per_split = -(-k_blocks // cut.split_k)
        assert (cut.split_k - 1) * per_split < k_blocks, linear
        assert cut.split_k == 1 or per_split >= MIN_BLOCKS_PER_SPLIT, linear


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize(("n", "k"), QWEN3_8B.values(), ids=QWEN3_8B)
def test_programs_are_as_many_as_find_room_at_once(n, k, quantized):
    def cut(m):
        return cut_for(m, n // 128, n, k // 128, chip(90), 132, 2, quantized)

    for m in (1, 32, 64, 128):
        here = cut(m)
        tiles = -(-m // here.tile.block_m) * n // here.tile.block_n
        assert here.split_k == 1 or tiles * here.split_k <= here.tile.programs * 132, f"{m} tokens"
        assert k // 128 % here.split_k == 0, f"{m} tokens: stretches of equal length are possible"
        assert tiles * here.split_k >= 96, f"{m} tokens"
    assert all(cut(m) == cut(1) for m in range(2, 17)), "a token alone and in a batch has the same bits"


def test_a_prime_number_of_blocks_is_split_unevenly():
    cut = cut_for(1, 32, 4096, 43, chip(90), 132, 2, False)
    assert cut.split_k == 8, "seven stretches of six blocks, and one"


@pytest.mark.parametrize(("stretch", "blocks"), [(1, 0), (2, 0), (3, 1), (5, 1), (6, 2), (12, 4), (32, 8), (96, 32)])
def test_a_third_of_a_stretch_is_fetched_ahead(stretch, blocks):
    assert blocks_ahead(stretch) == blocks


@pytest.mark.parametrize("capability", [70, 75, 81, 130])
def test_an_unknown_gpu_names_the_known_ones(capability):
    with pytest.raises(BlockFp8Error, match=r"8\.0, 8\.6, .*12\.1") as caught:
        chip(capability)
    assert f"{capability // 10}.{capability % 10}" in str(caught.value)


@pytest.fixture
def gpu(monkeypatch):
    """torch.cuda as counters use it, over the CPU's memory; `stream` and `capturing` may be set."""
    state = SimpleNamespace(stream=1, capturing=False, zeroed=[], waits=0, place=torch.device("cuda", 0))
    honest = torch.zeros

    def zeros(count, **named):
        state.zeroed.append(honest(count, dtype=named["dtype"]))
        return state.zeroed[-1]

    def wait():
        state.waits += 1

    stream = SimpleNamespace(synchronize=wait)
    monkeypatch.setattr(counters, "_pools", {})
    monkeypatch.setattr(torch, "zeros", zeros)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=state.stream, **vars(stream))
    )
    return state


def overlap(a, b):
    ends = [(t.data_ptr(), t.data_ptr() + 4 * t.numel()) for t in (a, b)]
    return ends[0][0] < ends[1][1] and ends[1][0] < ends[0][1]


def test_a_stream_keeps_its_region_and_no_other_gets_it(gpu):
    first, again = counters.counters(100, gpu.place), counters.counters(64, gpu.place)
    gpu.stream = 2
    other = counters.counters(100, gpu.place)
    assert first.data_ptr() == again.data_ptr() and not overlap(first, other)
    larger = counters.counters(counters.EAGER + 1, gpu.place)
    assert larger.numel() == counters.EAGER + 1 and not overlap(larger, first)
    assert len(gpu.zeroed) == 1 and gpu.waits == 1


def test_every_launch_of_a_graph_has_a_region_of_its_own(gpu):
    eager = counters.counters(100, gpu.place)
    gpu.capturing = True
    taken = [counters.counters(100, gpu.place) for _ in range(50)]
    gpu.capturing = False
    taken += [eager, counters.counters(100, gpu.place)]
    assert taken[-1].data_ptr() == eager.data_ptr()
    assert not any(overlap(a, b) for i, a in enumerate(taken[:-1]) for b in taken[i + 1 : -1])
    assert gpu.waits == 1, "a capture must not wait for the device"


def test_a_capture_that_finds_no_zeros_makes_its_own_within_the_graph(gpu):
    counters.counters(1, gpu.place)
    gpu.capturing = True
    with contextlib.suppress(StopIteration):
        while len(gpu.zeroed) == 1:
            counters.counters(counters.CHUNK // 8, gpu.place)
    assert len(gpu.zeroed) == 2 and gpu.zeroed[1].numel() == counters.CHUNK // 8 and gpu.waits == 1
    gpu.capturing = False
    held = counters._pools[gpu.place].chunks
    counters.counters(1, gpu.place)
    assert len(held) == 2, "the next capture finds zeros again, and graphs keep the chunk that they count in"
