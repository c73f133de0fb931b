"""Rules of an NPU for the operations that a call dispatches: what a graph can capture, and what may touch FP8.

A captured graph replays kernels on fixed addresses. So while it is captured nothing may ask the device for a value,
nothing may move between host and device, and nothing that is allocated may outlive the call but its result: results
and temporaries come from the graph's own memory pool, which gives them the same addresses at each replay.
"""

from __future__ import annotations

import gc
import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qwen3_fp8_ascend.backends import operators

WAITS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)

FP8_VIEWS = frozenset({"aten::view.dtype", "aten::detach", "aten::alias", "prim::device"})
"""What may touch an FP8 tensor on A2 and A3: it changes no byte and launches no kernel."""


class GraphFault(AssertionError):
    """An operation that cannot be captured."""


class Watch(TorchDispatchMode):
    """Notes what is dispatched; looks into this package's own operators, which are opaque to other modes.

    seen: the names of all operations. touched_fp8: those that had a float8 tensor as operand or result.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()
        self.touched_fp8: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        namespace, _, name = function.name().partition("::")
        body = operators.IMPLEMENTATIONS.get(name) if namespace == operators.NAMESPACE else None
        if body is None and namespace == "aten":
            body = function.decompose  # what torch makes from other operations is looked into as well
        with self:
            out = NotImplemented if body is None else body(*args, **kwargs)
        if out is not NotImplemented:
            return out
        self.before(function)
        out = function(*args, **kwargs)
        given, made = (
            [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)] for tree in ((args, kwargs), out)
        )
        self.seen.add(function.name())
        if any(tensor.dtype == torch.float8_e4m3fn for tensor in given + made):
            self.touched_fp8.add(function.name())
        self.after(function, given, [tensor for tensor in made if not any(tensor is operand for operand in given)])
        return out

    def before(self, function: Any) -> None:
        """Called before an operation runs."""

    def after(self, function: Any, given: list[torch.Tensor], made: list[torch.Tensor]) -> None:
        """Called with its operands and with the tensors that are new."""


class Capture(Watch):
    """Refuses what cannot be captured."""

    def __init__(self) -> None:
        super().__init__()
        self._made: list[weakref.ref[torch.Tensor]] = []

    def before(self, function: Any) -> None:
        if any(tag in function.tags for tag in WAITS):
            raise GraphFault(f"{function.name()} waits for the device")

    def after(self, function: Any, given: list[torch.Tensor], made: list[torch.Tensor]) -> None:
        devices = {tensor.device.type for tensor in given + made}
        if len(devices) > 1 or "cpu" in devices:
            raise GraphFault(f"{function.name()} works on {' and '.join(sorted(devices))}")
        self._made += [weakref.ref(tensor) for tensor in made]

    def left_behind(self) -> list[torch.Tensor]:
        """Tensors made while capturing that are still alive; ask after the result was dropped."""
        if any(ref() is not None for ref in self._made):
            gc.collect()
        return [tensor for ref in self._made if (tensor := ref()) is not None]


def falls_back_to_the_host(name: str) -> bool:
    """Whether torch_npu has no kernel for an operation of torch's or of its own, and would compute it on the host.

    Views need none, also the one whose schema does not call it so. One that torch makes from other operations counts
    as missing, since those are not seen here.
    """
    lines = torch._C._dispatch_dump_table(name).splitlines()
    entry = next(line for line in lines if line.startswith("PrivateUse1:"))
    if entry.endswith("[kernel]") or name == "aten::_unsafe_view":
        return False
    returned = torch._C._get_schema(*(name.split(".", 1) if "." in name else (name, ""))).returns
    return not (returned and returned[0].alias_info is not None and "[default backend kernel]" in entry)
