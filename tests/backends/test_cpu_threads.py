"""The CPU backend from several Python threads at once, and after a fork: the serial bits, and nobody waits for ever."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from qwen3_fp8_ascend import ops
from qwen3_fp8_ascend.backends import cpu
from qwen3_fp8_ascend.format import Activation
from qwen3_fp8_ascend.testing.judges import Problem, random_problem
from tests.support.cpu_levels import (
    ACTIVATIONS,
    DTYPES,
    ISAS,
    instruction_set,
    lacking,
    needs_cpu_backend,
    same_bits,
    threads,
)

pytestmark = needs_cpu_backend

WIDTHS = (576, 192, 192)
OPERATORS = torch.ops.qwen3_fp8_ascend
FORK_SECONDS = 60
PAUSE = 1e-4
"""Seconds between two changes. Without a pause, calls would wait for the interpreter's lock."""

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")


def work(problem: Problem, activation: Activation) -> list[torch.Tensor]:
    """Every operator once, packing included."""
    packed = ops.pack_weight(problem.weight, problem.scale, problem.grid, "cpu")
    return [
        *packed.tensors,
        ops.block_linear(problem.x, packed, problem.bias, activation),
        *ops.quantize_activation(problem.x, backend="cpu"),
        ops.dequantize_weight(problem.weight, problem.scale, problem.grid, problem.x.dtype, backend="cpu"),
        torch.tensor(OPERATORS.cpu_read(problem.weight.view(torch.uint8))),
    ]


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("isa", ISAS)
def test_several_python_threads_at_once(isa: str, count: int) -> None:
    """Four callers, each with other problems of other sizes, and in each call torch's threads.

    Every size with every dtype and every activation, and every dtype with every activation.
    """
    jobs = [
        (random_problem(m, WIDTHS, 300, dtype=dtype, bias=True, seed=m), ACTIVATIONS[(i + j) % len(ACTIVATIONS)])
        for i, m in enumerate((1, 5, 33))
        for j, dtype in enumerate(DTYPES)
    ]
    with instruction_set(isa), threads(count):
        want = [work(*job) for job in jobs]
        ready = threading.Barrier(4)

        def caller(offset: int) -> bool:
            ready.wait()
            order = [(i * 7 + offset * 5) % len(jobs) for i in range(len(jobs))]
            return all(all(map(same_bits, work(*jobs[i]), want[i])) for i in order)

        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(caller, range(4)))


@pytest.mark.parametrize("isa", ISAS)
def test_several_python_threads_share_a_weight(isa: str) -> None:
    """Six callers, each in another order of batches: none, what registers take, tiles, and one more than those."""
    problem = random_problem(33, WIDTHS, 300, seed=5)
    packed = ops.pack_weight(problem.weight, problem.scale, problem.grid, "cpu")
    sizes = (0, 1, 2, 3, 5, 6, 12, 13, 16, 17, 33)
    with instruction_set(isa), threads(2):
        want = [ops.block_linear(problem.x[:m], packed) for m in sizes]

        def caller(offset: int) -> bool:
            order = [(i * 4 + offset) % len(sizes) for i in range(len(sizes))]
            return all(same_bits(ops.block_linear(problem.x[: sizes[i]], packed), want[i]) for i in order)

        with ThreadPoolExecutor(6) as pool:
            assert all(pool.map(caller, range(6)))


def test_the_instruction_set_may_change_while_others_compute() -> None:
    """A call keeps to the one that it began with: every result is that of some level."""
    problem = random_problem(20, WIDTHS, 300, dtype=torch.float32)
    packed = ops.pack_weight(problem.weight, problem.scale, problem.grid, "cpu")
    before, possible = cpu.isa(), []
    here = [name for name in cpu.ISAS if lacking(name) is None]
    for name in here:
        cpu.set_isa(name)
        possible.append(ops.block_linear(problem.x, packed))
    stop = threading.Event()

    def change() -> None:
        levels = itertools.cycle(here)
        while not stop.wait(PAUSE):
            cpu.set_isa(next(levels))

    changer = threading.Thread(target=change)
    changer.start()
    try:
        for _ in range(100):
            y = ops.block_linear(problem.x, packed)
            assert any(same_bits(y, want) for want in possible)
    finally:
        stop.set()
        changer.join()
        cpu.set_isa(before)


def in_a_fork(child: Callable[[], bool]) -> None:
    """Run `child` in a fork of this process; a child that waits for ever is ended and fails the test."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)  # pytest-timeout's handler would wait too
            signal.alarm(FORK_SECONDS)
            status = 0 if child() else 2
        finally:
            os._exit(status)
    _, status = os.waitpid(pid, 0)
    assert not os.WIFSIGNALED(status), f"the child was ended by signal {os.WTERMSIG(status)}"
    assert os.WEXITSTATUS(status) == 0, "the child raised" if os.WEXITSTATUS(status) == 1 else "other bits than here"


@pytest.fixture
def used_threads() -> Iterator[tuple[Problem, list[torch.Tensor]]]:
    """Threads of this process have worked, torch's own operators and ours, and wait for more."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    (torch.randn(2000, 2000) + 1).sum()
    problem = random_problem(64, WIDTHS, 1300, bias=True)
    want = work(problem, Activation.W8A8)
    yield problem, want
    torch.set_num_threads(before)


Used = tuple[Problem, list[torch.Tensor]]


@needs_fork
def test_after_a_fork(used_threads: Used) -> None:
    problem, want = used_threads
    assert not OPERATORS.cpu_threads_lost()

    def child() -> bool:
        assert OPERATORS.cpu_threads_lost() and torch.get_num_threads() == 1
        (torch.randn(2000, 2000) + 1).sum()  # torch's own operators do not wait either
        return all(map(same_bits, work(problem, Activation.W8A8), want))

    in_a_fork(child)
    assert not OPERATORS.cpu_threads_lost() and torch.get_num_threads() == 4
    assert all(map(same_bits, work(problem, Activation.W8A8), want))


@needs_fork
def test_after_a_fork_whoever_asks_for_more_threads(used_threads: Used) -> None:
    """torch's own operators would wait for ever then; ours compute alone."""
    problem, want = used_threads
    packed = ops.pack_weight(problem.weight, problem.scale, problem.grid, "cpu")

    def child() -> bool:
        torch.set_num_threads(4)
        got = ops.block_linear(problem.x, packed, problem.bias)
        torch.set_num_threads(1)
        return same_bits(got, want[3])

    in_a_fork(child)


@needs_fork
def test_after_a_fork_new_threads_have_threads(used_threads: Used) -> None:
    """Only the thread that forked is without; what it starts may use as many as it likes."""
    problem, want = used_threads

    def child() -> bool:
        torch.set_num_threads(3)
        with ThreadPoolExecutor(1) as pool:
            lost = pool.submit(OPERATORS.cpu_threads_lost).result()
            got = pool.submit(work, problem, Activation.W8A8).result()
        torch.set_num_threads(1)
        return not lost and all(map(same_bits, got, want))

    in_a_fork(child)


@needs_fork
def test_after_a_fork_of_a_fork_and_from_another_thread(used_threads: Used) -> None:
    problem, want = used_threads

    def grandchild() -> bool:
        return OPERATORS.cpu_threads_lost() and all(map(same_bits, work(problem, Activation.W8A8), want))

    def child() -> bool:
        in_a_fork(grandchild)
        return True

    in_a_fork(child)
    with ThreadPoolExecutor(1) as pool:
        assert all(map(same_bits, pool.submit(work, problem, Activation.W8A8).result(), want))
        pool.submit(in_a_fork, child).result()


def _linear_of_a_worker(seed: int) -> torch.Tensor:
    problem = random_problem(40, WIDTHS, 600, seed=seed)
    return ops.block_linear(problem.x, ops.pack_weight(problem.weight, problem.scale, problem.grid, "cpu"))


@needs_fork
def test_in_a_pool_of_forked_workers(used_threads: Used) -> None:
    want = [_linear_of_a_worker(seed) for seed in range(6)]
    with multiprocessing.get_context("fork").Pool(2) as pool:
        got = pool.map_async(_numpy_of_a_worker, range(6)).get(FORK_SECONDS)
    assert all(same_bits(torch.from_numpy(one), other.view(torch.int16)) for one, other in zip(got, want, strict=True))


def _numpy_of_a_worker(seed: int):  # type: ignore[no-untyped-def]
    return _linear_of_a_worker(seed).view(torch.int16).numpy()
