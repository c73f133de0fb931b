"""Every backend against the specification: values, non-finite values, determinism, graphs, torch.compile."""

from __future__ import annotations

import functools
import itertools
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch

from qwen3_fp8_ascend import ops, reference
from qwen3_fp8_ascend.backends import nvidia_scaled_mm, prefill
from qwen3_fp8_ascend.backends.registry import Backend
from qwen3_fp8_ascend.evaluate.validate.cases import Case, Context, Found
from qwen3_fp8_ascend.format import DEFAULT_BLOCK, Activation, BlockGrid
from qwen3_fp8_ascend.testing import nonfinite
from qwen3_fp8_ascend.testing.judges import (
    Judgement,
    Problem,
    judge_exact,
    judge_prefill,
    judge_scaled_mm,
    random_problem,
)

ROWS = (0, 1, 2, 3, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 512)
SOME = 3
"""One of so many numbers of rows is tried where a step is not thorough."""
DECODE_ROWS = 64
"""A step of more tokens is counted as prefill here."""

SMALL = (((1,), 1), ((130, 70), 300), ((576, 192, 192), 576), ((31, 1, 97), 130))
"""(widths of merged shards, k): the smallest, ragged ones, a real model's whose heads are not whole blocks."""
FULL = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (24576, 4096), "down": (4096, 12288)}
"""Qwen3-8B's."""
FULL_ROWS = (1, 16, 64, 65, 512)
REPETITIONS = 200
"""A race that shows once in fifty is missed by so many with a probability of 2 %, in each of several cases."""


def pack(problem: Problem, context: Context) -> ops.PackedWeight:
    """The weight as the step's backend has it, on the step's device."""
    assert context.backend is not None
    return ops.pack_weight(problem.weight, problem.scale, problem.grid, context.backend.name)


def rows_of(backend: Backend) -> list[int]:
    """All numbers of rows: the usual ones, and those on both sides of each hand-over that the backend names."""
    plan = backend.plan() if backend.plan else ()
    limits = {int(limit) for rows, _ in plan for limit in re.findall(r"\d+", rows)}
    return sorted({*ROWS, *(limit + off for limit in limits for off in (-1, 0, 1) if 0 <= limit + off <= 512)})


def judge(backend: Backend, rows: int, got: torch.Tensor, problem: Problem, activation: Activation) -> Judgement:
    """By the bound of the path that the backend takes for so many rows."""
    named = {prefill.PLAN: judge_prefill, nvidia_scaled_mm.PLAN: judge_scaled_mm}
    for condition, how in backend.plan() if backend.plan else ():
        if how in named and (condition == "any" or _holds(condition, rows)):
            return named[how](got, problem, activation)
    return judge_exact(got, problem, activation)


def _holds(condition: str, rows: int) -> bool:
    sign, limit = condition.removeprefix("m ").split()
    return {"=": rows == int(limit), "<=": rows <= int(limit), ">": rows > int(limit)}[sign]


def name_of(dtype: torch.dtype, rows: int, widths: Sequence[int], k: int) -> str:
    """A case's name."""
    return f"{str(dtype).removeprefix('torch.')}/m{rows}/n{'+'.join(map(str, widths))}/k{k}"


def decode(context: Context) -> Iterator[Case]:
    """Linears of up to 64 rows; every other one has a bias."""
    return _linears(context, lambda rows: rows <= DECODE_ROWS)


def many_rows(context: Context) -> Iterator[Case]:
    """Linears of more."""
    return _linears(context, lambda rows: rows > DECODE_ROWS)


def _linears(context: Context, wanted: Callable[[int], bool]) -> Iterator[Case]:
    backend = context.backend
    assert backend is not None
    numbers = rows_of(backend) if context.thorough else rows_of(backend)[1::SOME]
    for (widths, k), dtype in itertools.product(SMALL, ops.ACTIVATION_DTYPES):
        for rows in filter(wanted, numbers):
            run = functools.partial(_linear, context, rows, widths, k, dtype)
            yield Case(name_of(dtype, rows, widths, k), run)
    if context.thorough and backend.by_name_only() is None:
        for n, k in FULL.values():
            for rows in filter(wanted, FULL_ROWS):
                run = functools.partial(_full_size, context, rows, n, k)
                yield Case(name_of(torch.bfloat16, rows, (n,), k), run, 8 * n * k)


def _linear(context: Context, rows: int, widths: tuple[int, ...], k: int, dtype: torch.dtype, seed: int) -> Judgement:
    problem = random_problem(rows, widths, k, dtype=dtype, bias=bool(rows % 2), seed=seed)
    there = problem.to(context.device.place)
    got = ops.block_linear(there.x, pack(there, context), there.bias, context.activation)
    assert context.backend is not None
    return judge(context.backend, rows, got, problem, context.activation)


@functools.lru_cache(maxsize=1)
def _full_weight(n: int, k: int, seed: int, context: Context) -> tuple[Problem, ops.PackedWeight]:
    """Codes repeat every 1024 rows, which takes a tenth of the time; scales do not."""
    part = random_problem(1, (1024,), k, seed=seed)
    scale = torch.exp2(torch.rand(n // DEFAULT_BLOCK.n, k // DEFAULT_BLOCK.k, generator=_generator(seed)) * 8 - 14)
    codes = part.weight.view(torch.uint8).repeat(n // 1024, 1).view(torch.float8_e4m3fn)
    problem = replace(part, weight=codes, scale=scale, grid=BlockGrid((n,), k))
    return problem, pack(problem.to(context.device.place), context)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _full_size(context: Context, rows: int, n: int, k: int, seed: int) -> Judgement:
    """The whole linear is computed; the oracle is asked for some of its tokens and blocks of rows of the weight."""
    problem, packed = _full_weight(n, k, context.seed, context)
    x = random_problem(rows, (1,), k, seed=seed).x
    got = ops.block_linear(x.to(context.device.place), packed, None, context.activation).cpu()
    generator = _generator(seed)
    blocks = torch.cat([torch.tensor([0, n // DEFAULT_BLOCK.n - 1]), torch.randperm(n // 128, generator=generator)[:4]])
    columns = (blocks[:, None] * DEFAULT_BLOCK.n + torch.arange(DEFAULT_BLOCK.n)).flatten()
    tokens = torch.cat([torch.tensor([0, rows - 1]), torch.randperm(rows, generator=generator)[:6]])
    codes = problem.weight.view(torch.uint8)[columns].view(torch.float8_e4m3fn)
    part = Problem(x[tokens], codes, problem.scale[blocks])
    assert context.backend is not None
    judgement = judge(context.backend, rows, got[tokens][:, columns], part, context.activation)
    if not got.isfinite().all():
        judgement.faults.append(f"{int((~got.isfinite()).sum())} of {got.numel()} outputs are not finite")
    return judgement


def quantize(context: Context) -> Iterator[Case]:
    """Bit for bit, finite activations of every size and those with a NaN or an infinity of every payload."""
    assert context.backend is not None
    for activation in (Activation.W8A8, Activation.W8A8_UE8M0):
        if activation not in context.backend.computes:
            continue
        prefix = "" if activation is Activation.W8A8 else "ue8m0/"
        for dtype, rows, k in itertools.product(ops.ACTIVATION_DTYPES, (0, 1, 7, 65, 512), (1, 128, 300, 4096)):
            name = prefix + name_of(dtype, rows, (), k).replace("/n/", "/")
            yield Case(name, functools.partial(_quantize, context, activation, dtype, rows, k))
        for case in nonfinite.NON_FINITE:
            run = functools.partial(_quantize_nonfinite, context, activation, case)
            yield Case(f"{prefix}nonfinite/{case}", run)


def _quantize(context: Context, activation: Activation, dtype: torch.dtype, rows: int, k: int, seed: int) -> Judgement:
    generator = _generator(seed)
    x = torch.randn(rows, k, generator=generator) * torch.exp2(torch.randint(-30, 12, (rows, 1), generator=generator))
    special = torch.tensor([0.0, -0.0, 448, -448, 464, 2.0**-9, 2.0**-10, 1e-10, 1e-12, 6e4])
    here = torch.rand(rows, k, generator=generator) < 0.02
    x = torch.where(here, special[torch.randint(len(special), (rows, k), generator=generator)], x).to(dtype)
    assert context.backend is not None
    there = x.to(context.device.place)
    codes, scale = ops.quantize_activation(there, activation=activation, backend=context.backend.name)
    want_codes, want_scale = reference.quantize_activation(x, activation=activation)
    found = Found()
    compare_bits("codes", codes, want_codes, found)
    compare_bits("scales", scale, want_scale, found)
    return found


def compare_bits(what: str, got: torch.Tensor, want: torch.Tensor, found: Judgement) -> None:
    """A fault for each kind of difference: in the form, or in any bit."""
    if got.shape != want.shape or got.dtype != want.dtype:
        found.faults.append(f"{what}: {tuple(got.shape)} {got.dtype}, expected {tuple(want.shape)} {want.dtype}")
        return
    if not got.numel():
        return
    size = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[got.element_size()]
    ours, theirs = got.contiguous().view(torch.uint8).cpu().view(size), want.cpu().contiguous().view(size)
    different = ours != theirs
    share = float(different.double().mean())
    fault = ""
    if share:
        at = tuple(different.nonzero()[0].tolist())
        mask = (1 << 8 * got.element_size()) - 1
        pair = f"{int(ours[at]) & mask:#x}, expected {int(theirs[at]) & mask:#x}"
        fault = f"{what}: {int(different.sum())} of {different.numel()} differ, the first at {at}: {pair}"
    found.hold(f"{what} that differ", share, 0.0, fault)


def _quantize_nonfinite(context: Context, activation: Activation, case: nonfinite.NonFinite, seed: int) -> Judgement:
    assert context.backend is not None
    x = nonfinite.activation(case)
    there = x.to(context.device.place)
    codes, scale = ops.quantize_activation(there, activation=activation, backend=context.backend.name)
    return Found(nonfinite.wrong_quantization(x, codes.view(torch.uint8).cpu(), scale.cpu(), activation))


def dequantize(context: Context) -> Iterator[Case]:
    """Bit for bit; every code is in every case that is large enough."""
    for (widths, k), dtype in itertools.product([*SMALL, ((1280, 256), 4096)], ops.ACTIVATION_DTYPES):
        run = functools.partial(_dequantize, context, widths, k, dtype)
        yield Case(name_of(dtype, 0, widths, k).replace("/m0/", "/"), run, 12 * sum(widths) * k)


def _dequantize(context: Context, widths: tuple[int, ...], k: int, dtype: torch.dtype, seed: int) -> Judgement:
    problem = random_problem(0, widths, k, seed=seed)
    there, found = problem.to(context.device.place), Found()
    assert context.backend is not None
    got = ops.dequantize_weight(there.weight, there.scale, there.grid, dtype, backend=context.backend.name)
    want = reference.dequantize_weight(problem.weight, problem.scale, problem.grid, dtype)
    compare_bits("weights", got, want, found)
    return found


def not_finite(context: Context) -> Iterator[Case]:
    """Linears whose activations hold a NaN or an infinity: where the specification has one, and nowhere else."""
    for case in nonfinite.NON_FINITE:
        yield Case(str(case), functools.partial(_linear_nonfinite, context, case))


def _linear_nonfinite(context: Context, case: nonfinite.NonFinite, seed: int) -> Judgement:
    problem = replace(random_problem(0, (130, 62), 300, seed=seed), x=nonfinite.activation(case))
    oracle = problem.oracle(context.activation)
    packed, found = pack(problem.to(context.device.place), context), Found()
    for rows in (6, 40, 80):
        x = torch.cat([problem.x, problem.x[:1].expand(rows - 6, -1)]).to(context.device.place)
        out = ops.block_linear(x, packed, None, context.activation).cpu()
        found.faults += [f"{fault}, of {rows} rows" for fault in nonfinite.wrong_linear(case, out[:6], oracle)]
    return found


def _steady_problem(context: Context, rows: int, seed: int) -> tuple[torch.Tensor, ops.PackedWeight]:
    problem = random_problem(rows, (200, 184), 640, seed=seed).to(context.device.place)
    return problem.x, pack(problem, context)


def determinism(context: Context) -> Iterator[Case]:
    """The same bits from run to run, at every position of a batch, and from streams that run at once."""
    for rows in (1, 16, 64, 200):
        yield Case(f"repetitions/m{rows}", functools.partial(_repetitions, context, rows))
        yield Case(f"positions/m{rows}", functools.partial(_positions, context, rows))
        yield Case(f"streams/m{rows}", functools.partial(_streams, context, rows))


def _repetitions(context: Context, rows: int, seed: int) -> Judgement:
    x, packed = _steady_problem(context, rows, seed)
    want, found = ops.block_linear(x, packed, None, context.activation).cpu(), Found()
    outs = [ops.block_linear(x, packed, None, context.activation) for _ in range(REPETITIONS)]
    wrong = [number for number, out in enumerate(outs, 1) if not torch.equal(out.cpu(), want)]
    shown = ", ".join(map(str, wrong[:5])) + ("..." if len(wrong) > 5 else "")
    fault = f"{len(wrong)} of {REPETITIONS} repetitions have other bits than the first: {shown}"
    found.hold("repetitions that differ", len(wrong) / REPETITIONS, 0.0, fault)
    return found


def _positions(context: Context, rows: int, seed: int) -> Judgement:
    """Every token of a batch is the same one, so every row of the result is."""
    x, packed = _steady_problem(context, rows, seed)
    out = ops.block_linear(x[:1].expand(rows, -1).contiguous(), packed, None, context.activation).cpu()
    wrong, found = (out != out[0]).any(1).nonzero().flatten().tolist(), Found()
    fault = f"one token has other bits at positions {wrong[:5]} of a batch of {rows}"
    found.hold("positions that differ", len(wrong) / rows, 0.0, fault)
    return found


def _streams(context: Context, rows: int, seed: int) -> Judgement:
    device, found = context.device, Found()
    if not device.has_graphs:
        found.skipped = "a CPU has no streams"
        return found
    layers = [_steady_problem(context, rows, seed + number) for number in range(2)]
    want = [ops.block_linear(x, packed, None, context.activation).cpu() for x, packed in layers]
    outs: list[list[torch.Tensor]] = [[], []]
    streams = [device.module.Stream() for _ in layers]
    for _ in range(REPETITIONS // 4):
        for stream, (x, packed), kept in zip(streams, layers, outs, strict=True):
            with device.on_stream(stream):
                kept.append(ops.block_linear(x, packed, None, context.activation))
    device.synchronize()
    wrong = sum(not torch.equal(out.cpu(), one) for kept, one in zip(outs, want, strict=True) for out in kept)
    found.hold("calls that differ", wrong, 0.0, f"{wrong} calls have other bits when two streams run at once")
    return found


def graphs(context: Context) -> Iterator[Case]:
    """Captured once, replayed with other activations."""
    for rows in (1, 16, 64, 65, 200):
        yield Case(f"m{rows}", functools.partial(_graph, context, rows))


def _graph(context: Context, rows: int, seed: int) -> Judgement:
    if not context.device.has_graphs:
        return Found(skipped="a CPU has no graphs to capture")
    x, packed = _steady_problem(context, rows, seed)
    held, found = x.clone(), Found()
    replay, out = context.device.capture(lambda: ops.block_linear(held, packed, None, context.activation))
    for number, fresh in enumerate((x, x.flip(0), x * 2)):
        held.copy_(fresh)
        replay()
        context.device.synchronize()
        want = ops.block_linear(fresh, packed, None, context.activation)
        compare_bits(f"results of replay {number + 1}", out, want, found)
    return found


def compiled(context: Context) -> Iterator[Case]:
    """One graph for any number of rows, with the bits of the call alone: without and with a compiler behind it."""
    for compiler in ("aot_eager", "inductor"):
        yield Case(compiler, functools.partial(_compiled, context, compiler))


def _compiled(context: Context, compiler: str, seed: int) -> Judgement:
    if compiler == "inductor" and context.device.kind == "npu":
        return Found(skipped="on an NPU vLLM-Ascend compiles with a backend of its own")
    if compiler == "inductor" and context.device.kind == "cpu" and not (shutil.which("g++") or shutil.which("c++")):
        return Found(skipped="there is no C++ compiler")
    x, packed = _steady_problem(context, 200, seed)

    def layer(rows: torch.Tensor) -> torch.Tensor:
        return ops.block_linear(rows * 2, packed, None, context.activation)

    found, run = Found(), torch.compile(layer, backend=compiler, fullgraph=True, dynamic=True)
    with torch.inference_mode():
        for rows in (2, 16, 65, 200):
            compare_bits(f"results of {rows} rows", run(x[:rows]), layer(x[:rows]), found)
    return found
