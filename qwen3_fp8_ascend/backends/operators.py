"""Registers Python functions as torch operators, so that torch.compile and graph capture see one opaque node.

What a linear does may depend on its number of rows. A compiler that traces Python would bake the branch taken by the
first batch into the graph for all of them; inside an operator it is taken anew at every call. This is the direct form
of `torch.library.custom_op`, without that one's checks at each call: there are 144 calls in a step of Qwen3-8B.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from qwen3_fp8_ascend.errors import BlockFp8Error

NAMESPACE = "qwen3_fp8_ascend"

IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {}
"""The functions behind the operators, by name: for tracing what an operator hides from a tracer."""

_library = torch.library.Library(NAMESPACE, "FRAGMENT")


def torch_operator(fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """Make a function without side effects on its arguments an operator for every device, under its own name.

    `fake` computes shapes and dtypes only. The decorated name becomes `torch.ops.qwen3_fp8_ascend.<name>`.
    Raises:
        ValueError: the annotations are not those of an operator (`torch.library.infer_schema`).
    """

    def register(function: Callable[..., Any]) -> Any:
        name = function.__name__
        IMPLEMENTATIONS[name] = function
        _library.define(name + torch.library.infer_schema(function, mutates_args=()))
        _library.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
        return getattr(getattr(torch.ops, NAMESPACE), name)

    return register


def check_packed(where: str, backend: str, **operands: tuple[torch.Tensor, torch.dtype, tuple[int, ...]]) -> None:
    """Refuse operands of an operator that its backend's `pack` or `pack_experts` did not make.

    operands: each tensor with the dtype and the shape that it has to have.
    Raises:
        BlockFp8Error: names the operand, its form and the expected one.
    """
    for name, (tensor, dtype, shape) in operands.items():
        if tuple(tensor.shape) != shape or tensor.dtype != dtype or not tensor.is_contiguous():
            raise BlockFp8Error(
                f"{name} is not a packed weight's",
                where=where,
                expected=f"contiguous {dtype} {shape}",
                got=f"{'' if tensor.is_contiguous() else 'strided '}{tensor.dtype} {tuple(tensor.shape)}",
                fix=f"pass the tensors that ops.pack_weight(..., backend={backend!r}) made for this k",
            )
