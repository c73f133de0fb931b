"""What a backend is, which ones there are, and which one is used.

Adding a backend: write `backends/<name>.py` with one module-level `BACKEND = Backend(...)`, and put the
module's name in `_MODULES` below, in the order in which the automatic choice should try it. Nothing else
in the package knows backends by name.
"""

from __future__ import annotations

import functools
import importlib
import logging
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch

from qwen3_fp8_ascend.errors import BlockFp8Error
from qwen3_fp8_ascend.format import DEFAULT_BLOCK, Activation, BlockGrid, BlockSize
from qwen3_fp8_ascend.glu import Glu

logger = logging.getLogger(__name__)

ENVIRONMENT_VARIABLE = "QWEN3_FP8_ASCEND_BACKEND"

_MODULES = ("ascendc", "torch_npu", "nvidia", "triton", "nvidia_scaled_mm", "cpu", "reference")


@dataclass(frozen=True)
class PackedWeight:
    """The one resident copy of a weight, in the layout of the backend that packed it.

    grid: the checkpoint's view: shards, k and block size.
    tensors: the backend's alone.
    layout: which of its layouts they are in, where it has several.
    groups: the weights of one grid that it holds, as of a layer of experts: the leading dimension of every tensor when
        there are several.
    """

    backend: str
    grid: BlockGrid
    tensors: tuple[torch.Tensor, ...]
    layout: str = ""
    groups: int = 1

    @property
    def n(self) -> int:
        return self.grid.n

    @property
    def k(self) -> int:
        return self.grid.k

    @property
    def device(self) -> torch.device:
        return self.tensors[0].device

    @property
    def grouped_tensors(self) -> tuple[torch.Tensor, ...]:
        """The tensors with their leading dimension, whatever the number of groups."""
        return self.tensors if self.groups > 1 else tuple(t[None] for t in self.tensors)

    @property
    def nbytes(self) -> int:
        """Resident bytes: codes, scales and padding."""
        return sum(t.numel() * t.element_size() for t in self.tensors)


GroupedLinear = Callable[[torch.Tensor, PackedWeight, torch.Tensor, Activation, torch.dtype], torch.Tensor]
"""x, packed, ends, activation, dtype -> (m, n) `dtype`; as `ops.grouped_linear`."""
GluProduct = Callable[[torch.Tensor, Glu], torch.Tensor]
"""h (rows, 2 * I), the gate's columns first -> (rows, I); as `grouped.glu_product`."""


@dataclass(frozen=True)
class Backend:
    """One implementation of the block-FP8 operations.

    Shapes and semantics of `pack`, `linear`, `quantize_activation` and `dequantize_weight` are those of
    `qwen3_fp8_ascend.ops`, which validates before it calls them: codes (n, k) float8_e4m3fn without NaN, scale
    `grid.scale_shape` fp32 contiguous, x (m, k) two-dimensional and contiguous in its last dimension. None of them is
    called with an empty x or weight, or with an activation that is not in `computes`: `ops` answers that itself. A
    backend that `checks_operands` gets what it is given.

    `pack_experts`, `grouped_linear` and `block_experts` are `ops`' too. A backend may have none of the three, or
    `pack_experts` with either of the others: `grouped.block_experts` makes a layer of a grouped linear.
    `pack_experts` gets the experts' weights one by one, and gives tensors with a leading dimension of experts.
    `grouped_linear` is told the dtype of its results: x's, or fp32.
    `glu_product` is what `block_experts` computes between its linears, as `grouped.glu_product`; None: that one.

    unusable: the reason why this backend cannot run on this machine, or None.
    unsupported: the reason why it cannot serve this block size, or None.
    detail: what of it is in use on this machine (an instruction set, a chip), once it is usable.
    by_name_only: the reason why the automatic choice passes over it, or None.
    layout: of what `pack` makes on this machine, where there are several.
    plan: what serves which number of rows on this machine, as pairs like ("m <= 64", "fused kernel"), once usable.
    max_scale: the largest block scale it can represent.
    levels: kernels for several processors that this machine can all run, from the lowest to the best: the name of each,
    as `detail` has it, and the environment of a process that is to use it.
    checks_operands: `linear` computes any x (m, k) and weight, empty ones too, and raises a RuntimeError for operands
    that `ops.block_linear` would refuse, other than for gradients, or would change; `block_experts` likewise, for
    weights of whole experts that are packed alike. `ops` then asks in Python only when they have refused: while the
    caches hold nothing but the last weight, its questions take longer than the call itself.
    """

    name: str
    summary: str
    computes: frozenset[Activation]
    device_types: frozenset[str]
    unusable: Callable[[], str | None]
    pack: Callable[[torch.Tensor, torch.Tensor, BlockGrid], tuple[torch.Tensor, ...]]
    linear: Callable[[torch.Tensor, PackedWeight, torch.Tensor | None, Activation], torch.Tensor]
    quantize_activation: Callable[[torch.Tensor, int, Activation], tuple[torch.Tensor, torch.Tensor]]
    dequantize_weight: Callable[[torch.Tensor, torch.Tensor, BlockGrid, torch.dtype], torch.Tensor]
    pack_experts: Callable[[Iterable[torch.Tensor], torch.Tensor, BlockGrid], tuple[torch.Tensor, ...]] | None = None
    grouped_linear: GroupedLinear | None = None
    glu_product: GluProduct | None = None
    block_experts: (
        Callable[[torch.Tensor, PackedWeight, PackedWeight, torch.Tensor, torch.Tensor, Activation, Glu], torch.Tensor]
        | None
    ) = None
    unsupported: Callable[[BlockSize], str | None] = lambda block: None
    detail: Callable[[], str] | None = None
    by_name_only: Callable[[], str | None] = lambda: None
    layout: Callable[[], str] = lambda: ""
    plan: Callable[[], tuple[tuple[str, str], ...]] | None = None
    max_scale: float = math.inf
    levels: Callable[[], Mapping[str, Mapping[str, str]]] = dict
    checks_operands: bool = False


@dataclass(frozen=True)
class BackendStatus:
    """A line of `available_backends()`: `reason` is None if the backend is usable here."""

    name: str
    usable: bool
    reason: str | None
    computes: tuple[Activation, ...]
    device_types: tuple[str, ...]
    summary: str
    detail: str | None
    plan: tuple[tuple[str, str], ...]


LOADED: dict[str, Backend] = {}
"""Backends imported so far. A plain dictionary, so that torch.compile sees through the lookup of a packed weight's."""


def load_backend(name: str) -> Backend:
    """The backend of that name, usable or not.

    Raises:
        BlockFp8Error: there is no such backend.
    """
    if name in LOADED:
        return LOADED[name]
    if name not in _MODULES:
        raise BlockFp8Error(
            f"unknown backend {name!r}",
            expected=f"one of {', '.join(_MODULES)}",
            got=name,
            fix=f"correct {ENVIRONMENT_VARIABLE}, --additional-config or the `backend` argument",
        )
    backend = importlib.import_module(f"qwen3_fp8_ascend.backends.{name}").BACKEND
    assert isinstance(backend, Backend) and backend.name == name
    LOADED[name] = backend
    return backend


def available_backends() -> tuple[BackendStatus, ...]:
    """Every backend in the order of preference: name, usable or the reason why not, what it computes."""
    out = []
    for name in _MODULES:
        backend = load_backend(name)
        reason = backend.unusable()
        out.append(
            BackendStatus(
                name,
                reason is None,
                reason,
                tuple(sorted(backend.computes)),
                tuple(sorted(backend.device_types)),
                backend.summary,
                backend.detail() if backend.detail and reason is None else None,
                backend.plan() if backend.plan and reason is None else (),
            )
        )
    return tuple(out)


def usable_backends(device_type: str, slow: bool = True) -> list[Backend]:
    """Those that can run on a device of that type, in the order of preference.

    Backends of other devices are not asked, since asking loads their drivers. slow: also those that the automatic
    choice passes over.
    """
    backends = [backend for backend in map(load_backend, _MODULES) if device_type in backend.device_types]
    usable = [backend for backend in backends if backend.unusable() is None]
    return [backend for backend in usable if slow or backend.by_name_only() is None]


def _described(backend: Backend) -> str:
    return f"{backend.name} ({backend.detail()})" if backend.detail else backend.name


def default_block_only(block: BlockSize) -> str | None:
    """`Backend.unsupported` of kernels that are written for one block size."""
    return None if block == DEFAULT_BLOCK else f"its kernels are written for blocks of {DEFAULT_BLOCK}, not {block}"


def _objection(
    backend: Backend, device_type: str, computes: Activation | None, block: BlockSize, experts: bool
) -> str | None:
    if device_type not in backend.device_types:
        return f"runs on {'/'.join(sorted(backend.device_types))}, not on {device_type}"
    if computes is not None and computes not in backend.computes:
        return f"computes {'/'.join(sorted(backend.computes))}, not {computes}"
    if experts and backend.pack_experts is None:
        return "has no kernels for experts"
    return backend.unusable() or backend.unsupported(block)


def _by_reason(rejected: dict[str, list[str]]) -> str:
    """Backends that are passed over for one reason share it: an absent NPU is said once, not three times."""
    return "; ".join(f"{', '.join(names)}: {reason}" for reason, names in rejected.items())


@functools.cache
def select_backend(
    name: str | None,
    device_type: str,
    computes: Activation | None = None,
    block: BlockSize = DEFAULT_BLOCK,
    experts: bool = False,
) -> Backend:
    """The backend to use: `name`, else $QWEN3_FP8_ASCEND_BACKEND, else the first that fits.

    experts: whether it has to serve layers of experts.

    An explicit choice that cannot run raises with the reason. The automatic choice is logged once, with what
    was rejected and why; it never ends at a backend that is far too slow to be anybody's accident.

    Raises:
        BlockFp8Error: unknown name, the named backend cannot run here, or none can.
    """
    what = "block-FP8 experts" if experts else "block FP8"
    explicit = name or os.environ.get(ENVIRONMENT_VARIABLE) or None
    if explicit is not None and explicit != "auto":
        backend = load_backend(explicit)
        if reason := _objection(backend, device_type, computes, block, experts):
            raise BlockFp8Error(
                f"the backend {explicit!r} cannot be used here{' for experts' if experts else ''}",
                got=reason,
                fix="choose another one; `qwen3-fp8-ascend doctor` lists them with reasons",
            )
        logger.info("%s on %s: backend %s, asked for by name", what, device_type, _described(backend))
        return backend
    rejected: dict[str, list[str]] = {}
    for candidate in _MODULES:
        backend = load_backend(candidate)
        reason = _objection(backend, device_type, computes, block, experts) or backend.by_name_only()
        if reason is None:
            logger.info(
                "%s on %s: backend %s; rejected: %s",
                what,
                device_type,
                _described(backend),
                _by_reason(rejected) or "none",
            )
            return backend
        rejected.setdefault(reason, []).append(candidate)
    raise BlockFp8Error(
        f"no backend can run {what} on {device_type}",
        got=_by_reason(rejected),
        fix="see `qwen3-fp8-ascend doctor`; slow backends that run anyway must be asked for by name",
    )
