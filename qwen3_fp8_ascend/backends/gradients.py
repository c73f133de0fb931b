"""Refuses to be differentiated through: block FP8 is for inference, and a gradient that is silently absent is wrong.

The kernels have no backward pass, and torch would give none for them without a word, while the specification, plain
torch, would give one. So all backends refuse, by an operator in front of them: an operator, because only torch's own
dispatch sees what asks for a gradient under `torch.func` and inside a graph that `torch.compile` traces.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import forward_ad

from qwen3_fp8_ascend.backends.operators import NAMESPACE
from qwen3_fp8_ascend.errors import BlockFp8Error

_library = torch.library.Library(NAMESPACE, "FRAGMENT")
_library.define("refuse_gradients(Tensor?[] tensors, str where) -> ()")


def refuse_gradients(where: str, *tensors: torch.Tensor | None) -> None:
    """Refuse tensors that want a gradient. Costs nothing under `torch.no_grad()` and `torch.inference_mode()`.

    Raises:
        BlockFp8Error: gradients are enabled and one of the tensors requires one, in reverse or in forward mode. Inside
            torch.compile it is raised while tracing, and torch wraps it in an error of its own.
    """
    if torch.is_grad_enabled():
        torch.ops.qwen3_fp8_ascend.refuse_gradients(tensors, where)


def _refuse(tensors: list[torch.Tensor | None], where: str) -> None:
    for tensor in tensors:
        if tensor is None:
            continue
        forward = forward_ad.unpack_dual(tensor).tangent is not None
        if forward or (tensor.requires_grad and torch.is_grad_enabled()):
            raise BlockFp8Error(
                "block FP8 computes no gradients: its operations are for inference",
                where=where,
                expected="tensors that require no gradient, or gradients disabled",
                got=f"a tensor of shape {tuple(tensor.shape)} that {'has a tangent' if forward else 'requires one'}",
                fix="call it under torch.inference_mode() or torch.no_grad(), or pass x.detach()",
            )


def _accept(tensors: list[torch.Tensor | None], where: str) -> None:
    pass


def _batched(info: Any, in_dims: Any, tensors: list[torch.Tensor | None], where: str) -> tuple[None, None]:
    torch.ops.qwen3_fp8_ascend.refuse_gradients(tensors, where)  # a gradient may be asked for outside of the vmap
    return None, None


_library.impl("refuse_gradients", _refuse, "Autograd")
_library.impl("refuse_gradients", _accept, "CompositeExplicitAutograd")
torch.library.register_fake(f"{NAMESPACE}::refuse_gradients", _accept, lib=_library)
torch.library.register_vmap(f"{NAMESPACE}::refuse_gradients", _batched, lib=_library)
