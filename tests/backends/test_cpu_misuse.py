"""torch.ops.qwen3_fp8_ascend.cpu_* called with what nobody should give them: a clear error, or the right answer.

The same tests run under AddressSanitizer (test_cpu_sanitizers.py), which is what shows that nothing is read or
written outside the tensors on the way to either.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3_fp8_ascend import ops
from qwen3_fp8_ascend.backends import cpu
from qwen3_fp8_ascend.format import Activation
from qwen3_fp8_ascend.glu import Glu
from qwen3_fp8_ascend.testing.experts import random_experts
from qwen3_fp8_ascend.testing.judges import random_problem
from tests.support.cpu_levels import ISAS, instruction_set, needs_cpu_backend, same_bits

pytestmark = needs_cpu_backend

OPERATORS = torch.ops.qwen3_fp8_ascend
N, K, BLOCK = 70, 292, 128
INTERMEDIATE = 140
HUGE = 2**63 - 4

Arguments = dict[str, Any]


@functools.cache
def all_good_arguments() -> dict[str, Arguments]:
    """Of each operator, arguments that it accepts."""
    problem = random_problem(3, (N,), K, bias=True)
    codes, scales, panels = ops.pack_weight(problem.weight, problem.scale, backend="cpu").tensors
    weight = problem.weight.view(torch.uint8)
    experts = random_experts(3, 3, 2, K, INTERMEDIATE)
    w13, w2 = (packed.tensors for packed in experts.pack("cpu"))
    glu = dataclasses.asdict(Glu.clamped(7.0))
    return {
        "cpu_pack": {"weight": weight, "panels": panels, "codes": torch.zeros_like(codes)},
        "cpu_block_linear": {
            **{"x": problem.x, "codes": codes, "scales": scales, "panels": panels, "bias": problem.bias},
            **{"n": N, "k": K, "block_k": BLOCK, "quantization": 1},
        },
        "cpu_quantize_activation": {"x": problem.x, "block_k": BLOCK, "quantization": 1},
        "cpu_dequantize_weight": {
            **{"weight": weight, "scales": scales, "scale_rows": torch.zeros(N, dtype=torch.int32)},
            **{"block_k": BLOCK, "dtype": torch.float32},
        },
        "cpu_read": {"bytes": weight},
        "cpu_grouped_linear": {
            **{"x": experts.x, "codes": w13[0], "scales": w13[1], "panels": w13[2], "ends": torch.tensor([1, 1, 3])},
            **{"n": 2 * INTERMEDIATE, "k": K, "block_k": BLOCK, "quantization": 1},
        },
        "cpu_glu_product": {"x": experts.x, **glu},
        "cpu_block_experts": {
            **{"x": experts.x, "w13_codes": w13[0], "w13_scales": w13[1], "w13_panels": w13[2], "w2_codes": w2[0]},
            **{"w2_scales": w2[1], "w2_panels": w2[2], "topk_weights": experts.topk_weights},
            **{"topk_ids": torch.tensor([[0, -1], [2, 2], [1, 0]])},
            **{"intermediate": INTERMEDIATE, "block_k": BLOCK, "quantization": 1, **glu},
        },
    }


def good_arguments(name: str) -> Arguments:
    """Arguments of an operator that it accepts, each tensor in memory of its own."""
    arguments = all_good_arguments()[name]
    return {key: value.clone() if torch.is_tensor(value) else value for key, value in arguments.items()}


LINEARS = ("cpu_pack", "cpu_block_linear", "cpu_quantize_activation", "cpu_dequantize_weight")
EXPERTS = ("cpu_grouped_linear", "cpu_glu_product", "cpu_block_experts")
NAMES = (*LINEARS, *EXPERTS, "cpu_read")
TENSORS = {name: [key for key, value in good_arguments(name).items() if torch.is_tensor(value)] for name in NAMES}


def call(name: str, arguments: Arguments) -> list[torch.Tensor | int]:
    """Everything that the operator returns or writes."""
    got = getattr(OPERATORS, name)(**arguments)
    if name == "cpu_pack":
        return [arguments["codes"], arguments["panels"]]
    return list(got) if isinstance(got, tuple) else [got]


def misaligned(t: torch.Tensor) -> torch.Tensor:
    """The same numbers one byte behind an aligned address."""
    size = t.numel() * t.element_size()
    buffer = bytearray(size + 1)
    if not size:
        return t
    out = torch.frombuffer(buffer, dtype=torch.uint8, offset=1)
    out.copy_(t.contiguous().reshape(-1).view(torch.uint8))
    return torch.frombuffer(buffer, dtype=t.dtype, offset=1).view(t.shape)


def shrunk(t: torch.Tensor) -> torch.Tensor:
    """A tensor from which memory was taken."""
    out = t.clone()
    storage = out.untyped_storage()
    storage.resize_(max(0, storage.nbytes() - 1))
    return out


def emptied(t: torch.Tensor) -> torch.Tensor:
    out = t.clone()
    out.untyped_storage().resize_(0)
    return out


def in_a_wider_one(t: torch.Tensor) -> torch.Tensor:
    out = torch.zeros(*t.shape[:-1], t.shape[-1] + 3, dtype=torch.uint8 if t.element_size() == 1 else t.dtype)
    part = out[..., 1:-2] if t.dtype == out.dtype else out[..., 1:-2].view(t.dtype)
    return part.copy_(t)


CHANGES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "float64": lambda t: t.double(),
    "float32": lambda t: t.float(),
    "float16": lambda t: t.half(),
    "int64": lambda t: t.float().nan_to_num().long(),
    "bool": lambda t: t.float().bool(),
    "complex": lambda t: t.float().to(torch.complex64),
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.float().to_sparse(),
    "one dimension less": lambda t: t[0],
    "one dimension more": lambda t: t[None],
    "a scalar": lambda t: t.flatten()[:1].squeeze(),
    "a row less": lambda t: t[:-1],
    "a row more": lambda t: torch.cat([t, t[-1:]]),
    "no rows": lambda t: t[:0],
    "a column less": lambda t: t[..., :-1],
    "a column more": lambda t: torch.cat([t, t[..., -1:]], -1),
    "no columns": lambda t: t[..., :0],
    "transposed": lambda t: t.mT.contiguous().mT if t.dim() > 1 else t,
    "every other": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "reversed shape": lambda t: t.reshape(t.shape[::-1]),
    "rows expanded": lambda t: t[:1].expand(t.shape),
    "columns expanded": lambda t: t[..., :1].expand(t.shape),
    "all expanded": lambda t: t.flatten()[:1].view((1,) * t.dim()).expand(t.shape),
    "in a wider one": in_a_wider_one,
    "misaligned": misaligned,
    "shrunk": shrunk,
    "emptied": emptied,
    "negated lazily": lambda t: torch._neg_view(-t) if t.is_floating_point() and t.element_size() > 1 else t,
    "all ones": lambda t: torch.full_like(t.contiguous().view(torch.uint8), 0xFF).view(t.dtype),
    "all large": lambda t: torch.full_like(t.contiguous().view(torch.uint8), 0x7F).view(t.dtype),
    "many empty rows": lambda t: t.new_empty(2**62, 0),
    "many empty columns": lambda t: t.new_empty(0, 2**63 - 1),
    "many rows in the memory of one": lambda t: t[:1].expand(2**40, *t.shape[1:]) if t.dim() else t,
}
"""What is done to a tensor. Some of it is no misuse for some arguments: the answer must then be right."""

NUMBERS = (0, 1, -1, 3, 4, 36, 292, 2**31, -(2**31), 2**40, HUGE, 2**63 - 1, -(2**63))


def settled(value: Any) -> Any:
    """A tensor of the same numbers, contiguous, aligned, in memory of its own."""
    return value.resolve_neg().clone(memory_format=torch.contiguous_format) if torch.is_tensor(value) else value


def check(name: str, arguments: Arguments) -> bool:
    """Whether the operator accepts the arguments; if so, strides, addresses and sharing have not changed its answer."""
    try:
        got = call(name, arguments)
    except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
        assert len(str(error)) > 10
        return False
    if any(torch.is_tensor(value) and value.is_meta for value in (*arguments.values(), *got)):
        # Shapes only, and only if nothing here is real.
        assert all(value.is_meta for value in (*arguments.values(), *got) if torch.is_tensor(value))
        return True
    if name == "cpu_pack":
        return True  # its arguments have changed: nothing to compare with
    want = call(name, {key: settled(value) for key, value in arguments.items()})
    for one, other in zip(got, want, strict=True):
        assert same_bits(one, other) if isinstance(one, torch.Tensor) else one == other
    return True


@pytest.mark.parametrize("name", NAMES)
def test_good_arguments_are_accepted(name: str) -> None:
    assert check(name, good_arguments(name))


@pytest.mark.parametrize(("name", "key"), [(name, key) for name in NAMES for key in TENSORS[name]])
def test_every_change_of_every_tensor(name: str, key: str) -> None:
    refused = []
    for change, function in CHANGES.items():
        arguments = good_arguments(name)
        try:
            arguments[key] = function(arguments[key])
        except RuntimeError:
            continue  # torch has no such tensor
        if not check(name, arguments):
            refused.append(change)
    never_right = {
        "float64",
        "int64",
        "bool",
        "complex",
        "sparse",
        "one dimension less",
        "a scalar",
        "shrunk",
        "emptied",
    }
    if name == "cpu_read":  # which takes bytes of any shape and type
        never_right = {"float64", "int64", "complex", "sparse", "shrunk", "emptied"}
    elif len(TENSORS[name]) > 1:
        never_right.add("meta")
    if key in ("ends", "topk_ids"):  # which are int64
        never_right.remove("int64")
    assert never_right <= set(refused)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=100)
@given(data=st.data())
def test_several_changes_at_once(name: str, data: st.DataObject) -> None:
    arguments = good_arguments(name)
    last = set()  # torch itself would read behind their memory, or ask for more than there is
    for _ in range(data.draw(st.integers(1, 3))):
        key = data.draw(st.sampled_from(sorted(arguments)))
        value = arguments[key]
        if key in last:
            continue
        if torch.is_tensor(value):
            change = data.draw(st.sampled_from(sorted(CHANGES)))
            if change in ("shrunk", "emptied", "many empty columns", "many rows in the memory of one"):
                last.add(key)
            try:
                arguments[key] = CHANGES[change](value)
            except (RuntimeError, IndexError, NotImplementedError):
                continue  # torch has no such tensor
        elif isinstance(value, bool):
            arguments[key] = not value
        elif isinstance(value, int):
            arguments[key] = data.draw(st.sampled_from(NUMBERS))
        elif isinstance(value, float):
            arguments[key] = data.draw(st.floats())
        else:
            arguments[key] = data.draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float64, torch.int32]))
    check(name, arguments)


@pytest.mark.parametrize("name", [*LINEARS[1:], *EXPERTS])
@pytest.mark.parametrize("number", [n for n in NUMBERS if n < 1 or n > 2**30])
def test_sizes_that_overflow(name: str, number: int) -> None:
    """A block wider than the weight is one block, whatever its width; no other size may be wrong."""
    for key, value in good_arguments(name).items():
        if isinstance(value, bool) or not isinstance(value, int):
            continue
        arguments = good_arguments(name) | {key: number}
        any_size = name in ("cpu_quantize_activation", "cpu_dequantize_weight")
        one_block = key == "block_k" and number > K and (any_size or number % 4 == 0)
        for scales in (other for other in arguments if one_block and other.endswith("scales")):
            arguments[scales] = arguments[scales][..., :1].contiguous()
        not_quantized = key == "quantization" and number == 0 and not any_size
        assert check(name, arguments) == (one_block or not_quantized), key
        if one_block:
            got = call(name, arguments)
            for one, other in zip(got, call(name, arguments | {"block_k": 512}), strict=True):
                assert isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor) and same_bits(one, other)


@pytest.mark.parametrize("name", EXPERTS[1:])
def test_activations_that_are_none(name: str) -> None:
    arguments = good_arguments(name)
    for key in (key for key, value in arguments.items() if isinstance(value, float)):
        limit, beta, zero = key.endswith("_limit"), key == "beta", key in ("beta", "cubic")
        for number in (0.0, -1.0, float("nan"), float("inf"), -float("inf")):
            taken = (limit and number > 0) or (beta and abs(number) < 2) or (zero and number == 0)
            assert check(name, arguments | {key: number}) == taken, (key, number)


@pytest.mark.parametrize("column", range(4))
@pytest.mark.parametrize("value", [-1, 1, 31, 33, 64, 2**31 - 1, -(2**31)])
def test_panel_tables_that_lie(column: int, value: int) -> None:
    """A panel is where the kernels take addresses from; only its mark, whether it holds NaN, may be any number."""
    arguments = good_arguments("cpu_block_linear")
    for row in range(3):
        panels = arguments["panels"].clone()
        panels[row, column] = value
        right = column == 3 or torch.equal(panels, arguments["panels"])
        if right:
            assert check("cpu_block_linear", arguments | {"panels": panels})
        else:
            with pytest.raises(RuntimeError, match=r"panel \d|the panels hold"):
                call("cpu_block_linear", arguments | {"panels": panels})


@pytest.mark.parametrize("which", ["w13_panels", "w2_panels"])
@pytest.mark.parametrize("column", range(4))
@pytest.mark.parametrize("value", [-1, 1, 31, 33, 64, 2**31 - 1, -(2**31)])
def test_panel_tables_of_experts_that_lie(which: str, column: int, value: int) -> None:
    """Those of every expert that a token is sent to; what an expert that is not used says is never looked at."""
    for expert in range(3):
        arguments = good_arguments("cpu_block_experts")
        panels = arguments[which].clone()
        panels[expert, 1, column] = value
        right = column == 3 or torch.equal(panels, arguments[which])
        if right:
            assert check("cpu_block_experts", arguments | {which: panels})
            continue
        with pytest.raises(RuntimeError, match=r"panel|cut"):
            call("cpu_block_experts", arguments | {which: panels})
        if expert > 0:
            arguments["topk_ids"][arguments["topk_ids"] == expert] = -1
            assert check("cpu_block_experts", arguments | {which: panels})


def test_gate_and_up_must_be_cut_alike() -> None:
    """A table that covers all rows, but has a panel across the border of gate and up."""
    arguments = good_arguments("cpu_block_experts")
    panels = arguments["w13_panels"].clone()
    half = panels.shape[1] // 2
    panels[:, half - 1, 1] -= 4
    panels[:, half, 0] -= 4
    panels[:, half, 1] = 32
    panels[:, half + 1 :, 0] -= 4
    panels[:, -1, 1] += 4
    with pytest.raises(RuntimeError, match=r"panel|cut"):
        call("cpu_block_experts", arguments | {"w13_panels": panels})


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("id_", [3, -2, 2**31 - 1, -(2**31), 2**62, -(2**63)])
def test_experts_that_there_are_not(id_: int, dtype: torch.dtype) -> None:
    if dtype == torch.int32 and not -(2**31) <= id_ < 2**31:
        return
    arguments = good_arguments("cpu_block_experts")
    ids = arguments["topk_ids"].to(dtype)
    ids[1, 1] = id_
    with pytest.raises(RuntimeError, match=f"topk_ids.*one is {id_}"):
        call("cpu_block_experts", arguments | {"topk_ids": ids})


@pytest.mark.parametrize("ends", [(0, 2, 1), (0, 0, 4), (-1, 2, 3), (2**62, 2**62, 2**62), (3, 3, -(2**63))])
def test_ends_that_lead_nowhere(ends: tuple[int, ...]) -> None:
    with pytest.raises(RuntimeError, match="ends must not decrease or exceed"):
        call("cpu_grouped_linear", good_arguments("cpu_grouped_linear") | {"ends": torch.tensor(ends)})


def test_packing_in_place_is_refused() -> None:
    """The table is read while codes are written: shared memory would let codes become addresses."""
    arguments = good_arguments("cpu_pack")
    memory = torch.zeros(arguments["codes"].numel() + 64, dtype=torch.uint8)
    codes = memory[: arguments["codes"].numel()].view(arguments["codes"].shape)
    panels = memory[:48].view(torch.int32).view(3, 4).copy_(arguments["panels"])
    weight = memory[: N * K].view(N, K)
    for shared in ({"codes": codes, "panels": panels}, {"codes": codes, "weight": weight}):
        with pytest.raises(RuntimeError, match="must not share memory"):
            call("cpu_pack", arguments | shared)


@pytest.mark.parametrize("name", [name for name in (*LINEARS, *EXPERTS) if len(TENSORS[name]) > 1])
@pytest.mark.parametrize("real", ["first", "others"])
def test_tensors_on_different_devices_are_refused(name: str, real: str) -> None:
    """One tensor on the meta device sends a call to the function that knows shapes only."""
    keys = TENSORS[name]
    arguments = good_arguments(name)
    for key in keys[1:] if real == "first" else keys[:1]:
        arguments[key] = arguments[key].to("meta")
    with pytest.raises(RuntimeError, match="different devices"):
        call(name, arguments)


def test_there_is_no_level_beyond_the_last() -> None:
    for function in (OPERATORS.cpu_register_rows, OPERATORS.cpu_set_isa):
        for level in (-1, len(cpu.ISAS), 2**62, -(2**63)):
            with pytest.raises(RuntimeError, match="instruction set"):
                function(level)


@pytest.mark.parametrize("name", ISAS)
def test_bare_multiply_adds(name: str) -> None:
    """The benchmark's loop: of a sensible length, and where a level has none, said so."""
    with instruction_set(name):
        if OPERATORS.cpu_has_multiply_add():
            for count in (0, 1, 10**6):
                OPERATORS.cpu_multiply_add(count)
            for count in (-1, 2**62, -(2**63)):
                with pytest.raises(RuntimeError, match="count must be within"):
                    OPERATORS.cpu_multiply_add(count)
        else:
            with pytest.raises(RuntimeError, match="no such loop"):
                OPERATORS.cpu_multiply_add(1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_addresses_need_not_be_multiples_of_anything(dtype: torch.dtype) -> None:
    """Tensors over a file or a message: activations, biases, weights and scales, through the public operations."""
    problem = random_problem(5, (N,), K, dtype=dtype, bias=True)
    assert problem.bias is not None
    x, bias, weight, scale = map(misaligned, (problem.x, problem.bias, problem.weight, problem.scale))
    assert all(operator.mod(t.data_ptr(), 2) == 1 for t in (x, bias, weight, scale))
    packed, want = (ops.pack_weight(w, s, backend="cpu") for w, s in ((weight, scale), (problem.weight, problem.scale)))
    assert all(map(same_bits, packed.tensors, want.tensors))
    for activation in Activation:
        got = ops.block_linear(x, packed, bias, activation)
        assert same_bits(got, ops.block_linear(problem.x, want, problem.bias, activation))
    for got, same in zip(
        (*ops.quantize_activation(x), ops.dequantize_weight(weight, scale, dtype=dtype, backend="cpu")),
        (
            *ops.quantize_activation(problem.x),
            ops.dequantize_weight(problem.weight, problem.scale, dtype=dtype, backend="cpu"),
        ),
        strict=True,
    ):
        assert same_bits(got, same)
