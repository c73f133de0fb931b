"""The NPU operators' host code, run on a CPU over stand-ins for acl and torch_npu: streams, limits, and errors.

Each test runs in a process of its own, with its own state of the host code, since the operators' CPU implementation
here is not the one of test_backend.py. They are forked from one that has loaded torch and the libraries.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from .conftest import ROOT, SOURCES, build
from .test_backend import build_schemas, link_flags, torch_flags

Host = Callable[[str], None]
"""Runs a script on the host code over the stand-ins; fails where it fails."""

HEADERS = ROOT / "tests" / "support" / "ascend_host"

# A script a line, in JSON, and for each an answer: how its process ended, and what it wrote to stderr.
SERVER = """
import json, os, sys, tempfile, traceback
import torch
for library in sys.argv[1:]:
    torch.ops.load_library(library)
for line in sys.stdin:
    with tempfile.TemporaryFile("w+") as errors:
        child = os.fork()
        if child == 0:
            os.dup2(errors.fileno(), 2)
            status = 1
            try:
                exec(json.loads(line), {})
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        _, status = os.waitpid(child, 0)
        errors.seek(0)
        print(json.dumps([status, errors.read()]), flush=True)
"""

PRELUDE = """
import torch
operators, host = torch.ops.qwen3_fp8_ascend, torch.ops.ascend_host_test
TILES, K = 64, 512
packed = torch.zeros(TILES, K // 128, 16384, dtype=torch.uint8)
scale, spans = torch.ones(TILES, K // 128, 8), torch.zeros(TILES, 8, dtype=torch.int32)
weight = (packed, scale, spans)
experts = tuple(tensor.unflatten(0, (4, -1)) for tensor in weight)
ends = torch.tensor([1, 1, 3, 5])

def calls():
    return [line for line in host.log() if "stream" not in line]

def every_operator():
    operators.ascendc_group_quantize(torch.ones(100, K), 0)
    operators.ascendc_block_dequantize(*weight, TILES * 128, K, torch.float16)
    operators.ascendc_block_linear(torch.ones(4, K), *weight, None, TILES * 128, 0)
    operators.ascendc_block_gemv(torch.ones(1, K), *weight, None, TILES * 128, 0)
    operators.ascendc_block_grouped_linear(torch.ones(5, K), *experts, ends, TILES // 4 * 128, 0)

def error_of(function, *arguments):
    try:
        function(*arguments)
    except (RuntimeError, ValueError) as error:  # the second are those of plan.h
        return str(error)
    raise AssertionError("no error")
"""


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    flags = (*torch_flags(), "-Wall", "-Wextra", "-Werror", "-O0", "-fPIC", "-shared", *link_flags())
    source = Path(__file__).parent / "host_on_cpu.cpp"
    depends = [SOURCES / "host" / "torch_ops.cpp", *sorted(HEADERS.rglob("*.h"))]
    libraries = build_schemas(), build("host.so", [source], flags=flags, include=(HEADERS, SOURCES), depends=depends)
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    command = [sys.executable, "-c", SERVER, *map(str, libraries)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as server:
        assert server.stdin and server.stdout
        requests, answers = server.stdin, server.stdout

        def run(script: str) -> None:
            print(json.dumps(PRELUDE + script), file=requests, flush=True)
            status, errors = json.loads(answers.readline())
            assert status == 0, errors[-6000:]

        yield run


def test_blocks_stay_within_the_cores_that_a_stream_may_use(host: Host) -> None:
    host(
        """
every_operator()
full = calls()
assert full[:3] == ["group_quantize 40", "block_dequantize 40", "block_linear 20"]
assert full[3:] == ["block_gemv 40", "block_grouped_linear 20"]
host.set("stream_cube", 6)
host.set("stream_vector", 9)
every_operator()
assert calls() == ["group_quantize 9", "block_dequantize 9", "block_linear 4", "block_gemv 9", "block_grouped_linear 4"]
host.set("stream_cube", 3)
every_operator()
assert calls() == ["group_quantize 9", "block_dequantize 9", "block_linear 3", "block_gemv 9", "block_grouped_linear 3"]
host.set("stream_vector", 1)
linear = operators.ascendc_block_linear, torch.ones(4, K), *weight, None, TILES * 128, True
assert "1 cube core and 2 vector cores, the stream may use 3 and 1" in error_of(*linear)
host.set("stream_vector", 0)
assert "raise its limit (aclrtSetStreamResLimit)" in error_of(*linear)
host.set("limit_error", 507000)
assert "how many cores the stream may use (aclrtGetStreamResLimit): error 507000" in error_of(*linear)
assert calls() == []
""",
    )


def test_a_launch_that_fails_raises_and_one_that_does_not_is_not_blamed(host: Host) -> None:
    host(
        """
host.set("last_error", 107003)  # of an earlier call on this thread
every_operator()
assert len(calls()) == 5
host.set("launch_error", 507015)
for function, arguments in (
    (operators.ascendc_group_quantize, (torch.ones(1, K), 2)),
    (operators.ascendc_block_dequantize, (*weight, TILES * 128, K, torch.float16)),
    (operators.ascendc_block_linear, (torch.ones(4, K), *weight, None, TILES * 128, 0)),
    (operators.ascendc_block_gemv, (torch.ones(1, K), *weight, None, TILES * 128, 0)),
    (operators.ascendc_block_grouped_linear, (torch.ones(5, K), *experts, ends, TILES // 4 * 128, 0)),
):
    message = error_of(function, *arguments)
    assert "ret=507015" in message and "qwen3_fp8_" in message, message
host.set("launch_error", 0)
every_operator()
""",
    )


def test_the_stream_is_that_of_the_tensors_device(host: Host) -> None:
    host(
        """
host.log()
every_operator()
streams = [line for line in host.log() if "stream" in line]
assert streams == ["stream of the tensor's device"] * 5, streams
""",
    )


@pytest.mark.parametrize(
    ("chip", "complaint"),
    [("", "does not tell which chip this NPU is (aclrtGetSocName)"), ("Ascend310P3", "this NPU is Ascend310P3")],
    ids=["no name", "another chip"],
)
def test_a_chip_that_the_kernels_do_not_know_is_refused(host: Host, chip: str, complaint: str) -> None:
    host(
        f"host.set_chip({chip!r})\nassert {complaint!r} in error_of(every_operator)\nassert calls() == []\n",
    )


def test_a_bias_is_in_the_dtype_of_x_or_in_fp32(host: Host) -> None:
    host(
        """
x = torch.ones(2, K, dtype=torch.bfloat16)
for dtype in (torch.bfloat16, torch.float32):
    operators.ascendc_block_linear(x, *weight, torch.ones(TILES * 128, dtype=dtype), TILES * 128, 0)
assert len(calls()) == 2
half = torch.ones(TILES * 128, dtype=torch.float16)
assert "in BFloat16 or float32" in error_of(operators.ascendc_block_linear, x, *weight, half, TILES * 128, 0)
""",
    )


def test_experts_and_their_list_of_ends_are_checked(host: Host) -> None:
    host(
        """
grouped, n = operators.ascendc_block_grouped_linear, TILES // 4 * 128
x = torch.ones(5, K)
assert grouped(x, *experts, ends, n, 0).shape == (5, n)
assert grouped(x[:0], *experts, ends, n, 0).shape == (0, n)
assert calls() == ["block_grouped_linear 20"]
one = torch.tensor([1])
assert grouped(x[:1], *(tensor[:1] for tensor in experts), one, n, 0).shape == (1, n)
assert calls() == ["block_grouped_linear 16"]  # a tile is one core's
assert "ends is int64 (4)" in error_of(grouped, x, *experts, ends.int(), n, 0)
assert "ends is int64 (4)" in error_of(grouped, x, *experts, ends[:3], n, 0)
assert "the first is that of the groups" in error_of(grouped, x, *weight, ends, n, 0)
assert "the first is that of the groups" in error_of(grouped, x, experts[0][:3], *experts[1:], ends, n, 0)
assert "4096 rows" in error_of(grouped, torch.ones(4097, K), *experts, ends, n, 0)
assert calls() == []
""",
    )
