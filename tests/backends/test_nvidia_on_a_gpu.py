"""What only an NVIDIA GPU can show of the backend `nvidia`: streams, graphs, several devices, races, memory.

The properties of all backends run on it by `pytest --device cuda tests/test_ops.py`, steps of `validate` judge values.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qwen3_fp8_ascend import ops
from qwen3_fp8_ascend.backends import load_backend
from qwen3_fp8_ascend.errors import BlockFp8Error
from qwen3_fp8_ascend.format import Activation
from qwen3_fp8_ascend.testing.devices import open_device
from qwen3_fp8_ascend.testing.judges import Problem, assert_exact, random_problem

REASON = None if torch.cuda.is_available() else f"torch {torch.__version__} sees no NVIDIA GPU"
REASON = REASON or load_backend("nvidia").unusable()
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"not run: {REASON}")
ROOT = Path(__file__).parents[2]
SPLIT = 4096
"""k, so large that few rows of a weight are cut along it."""


def split_problem(m: int, seed: int = 0) -> tuple[Problem, ops.PackedWeight]:
    problem = random_problem(m, (512,), SPLIT, seed=seed).to("cuda")
    return problem, ops.pack_weight(problem.weight, problem.scale, backend="nvidia")


def test_one_weight_on_two_streams_at_once() -> None:
    """Both launches count their stretches of K; with shared counters a sum would be made too early."""
    problem, packed = split_problem(16)
    want = ops.block_linear(problem.x, packed, None, Activation.W8A16)
    streams, outs = [torch.cuda.Stream() for _ in range(2)], []
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    for number in range(400):
        with torch.cuda.stream(streams[number % 2]):
            outs.append(ops.block_linear(problem.x, packed, None, Activation.W8A16))
    torch.cuda.synchronize()
    assert all(torch.equal(out, want) for out in outs)


def test_two_graphs_of_one_weight_replayed_at_once() -> None:
    problem, packed = split_problem(16)
    want, device = ops.block_linear(problem.x, packed), open_device("cuda")
    graphs = [device.capture(lambda: [ops.block_linear(problem.x, packed) for _ in range(20)]) for _ in range(2)]
    streams = [torch.cuda.Stream() for _ in graphs]
    for _ in range(20):
        for stream, (replay, _) in zip(streams, graphs, strict=True):
            with device.on_stream(stream):
                replay()
        torch.cuda.synchronize()
        assert all(torch.equal(out, want) for _, outs in graphs for out in outs)


def test_a_graph_and_other_launches_at_once() -> None:
    problem, packed = split_problem(16)
    want, device = ops.block_linear(problem.x, packed), open_device("cuda")
    replay, outs = device.capture(lambda: [ops.block_linear(problem.x, packed) for _ in range(20)])
    with device.on_stream(torch.cuda.Stream()):
        replay()
    beside = [ops.block_linear(problem.x, packed) for _ in range(40)]
    torch.cuda.synchronize()
    assert all(torch.equal(out, want) for out in (*outs, *beside))


@pytest.mark.parametrize("activation", list(Activation))
def test_a_launch_reads_what_the_one_before_has_written(activation: Activation) -> None:
    """Dependent launches begin early; here each one's operand is written late, by a kernel of torch's or of ours."""
    problem, packed = split_problem(16)
    back = random_problem(16, (SPLIT,), 512, seed=1).to("cuda")
    packed_back = ops.pack_weight(back.weight, back.scale, backend="nvidia")
    want, x = [problem.x], torch.zeros_like(problem.x)
    for _ in range(10):
        inner = ops.block_linear(want[-1], packed, None, activation)
        torch.cuda.synchronize()
        outer = ops.block_linear(inner, packed_back, None, activation)
        torch.cuda.synchronize()
        want.append(outer / outer.float().abs().max())
    torch.cuda.synchronize()
    for _ in range(20):
        x.zero_()
        torch.cuda._sleep(200_000)
        x.copy_(problem.x)
        got = x
        for _ in range(10):
            got = ops.block_linear(ops.block_linear(got, packed, None, activation), packed_back, None, activation)
            got = got / got.float().abs().max()
        assert torch.equal(got, want[-1])


def test_launches_behind_other_nodes_of_a_graph() -> None:
    """Behind a node that sets memory, one that copies, and two branches that come together."""
    problem, packed = split_problem(16)
    want, device = ops.block_linear(problem.x, packed), open_device("cuda")
    beside, x, y = torch.cuda.Stream(), torch.empty_like(problem.x), torch.empty_like(problem.x)

    def branches() -> list[torch.Tensor]:
        x.zero_()
        outs = [ops.block_linear(x, packed)]
        x.copy_(problem.x)
        outs.append(ops.block_linear(x, packed))
        with device.on_stream(beside):
            torch.cuda._sleep(100_000)
            y.copy_(problem.x)
        x.mul_(1)
        torch.cuda.current_stream().wait_stream(beside)
        return [*outs, ops.block_linear(y, packed), ops.block_linear(x, packed)]

    replay, outs = device.capture(branches)
    for _ in range(20):
        x.fill_(3)
        y.fill_(5)
        replay()
        torch.cuda.synchronize()
        assert not outs[0].any() and all(torch.equal(out, want) for out in outs[1:])


def test_the_launch_goes_to_the_current_device() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip(f"not run: it takes two GPUs, and there are {torch.cuda.device_count()}")
    problem = random_problem(3, (512,), SPLIT)
    there = problem.to("cuda:1")
    with pytest.raises(BlockFp8Error, match=r"within torch\.cuda\.device\(1\)"):
        ops.pack_weight(there.weight, there.scale, backend="nvidia")
    with torch.cuda.device(1):
        packed = ops.pack_weight(there.weight, there.scale, backend="nvidia")
        for activation in Activation:
            assert_exact(ops.block_linear(there.x, packed, None, activation), problem, activation)
    with pytest.raises(BlockFp8Error, match=r"within torch\.cuda\.device\(1\)"):
        ops.block_linear(there.x, packed)


SHORT_FORM = """
import torch
from qwen3_fp8_ascend import ops
from qwen3_fp8_ascend.format import Activation
from qwen3_fp8_ascend.testing.experts import random_experts
from qwen3_fp8_ascend.testing.judges import assert_exact, random_problem
for m, widths, k in ((1, (512,), 4096), (17, (130, 70), 300), (64, (256,), 1024), (130, (200,), 640)):
    for dtype in ops.ACTIVATION_DTYPES:
        for activation in Activation:
            problem = random_problem(m, widths, k, dtype=dtype, bias=True)
            there = problem.to("cuda")
            packed = ops.pack_weight(there.weight, there.scale, there.grid, "nvidia")
            assert_exact(ops.block_linear(there.x, packed, there.bias, activation), problem, activation)
there = random_experts(9, 5, 3, 300, 200).to("cuda")
for activation in Activation:
    assert there.layer("nvidia", activation).isfinite().all()
x = torch.randn(33, 300, device="cuda")
ops.quantize_activation(x, backend="nvidia")
torch.cuda.synchronize()
print("the short form has run")
"""


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer_finds_nothing(tool: str) -> None:
    found = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if found is None:
        pytest.skip("not run: compute-sanitizer is not installed (it comes with the CUDA toolkit)")
    command = [found, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", SHORT_FORM]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "the short form has run" in done.stdout, done.stdout[-4000:] + done.stderr[-2000:]
    assert "ERROR SUMMARY: 0 errors" in done.stdout or "0 hazards" in done.stdout, done.stdout[-2000:]
