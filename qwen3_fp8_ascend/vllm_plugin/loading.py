"""What linears and experts share of loading: parameters that check what a checkpoint puts into them, and packing."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from vllm.model_executor.parameter import BlockQuantScaleParameter

from qwen3_fp8_ascend.backends.registry import PackedWeight, select_backend
from qwen3_fp8_ascend.errors import BlockFp8Error
from qwen3_fp8_ascend.format import Activation, BlockSize
from qwen3_fp8_ascend.ops import DAMAGED
from qwen3_fp8_ascend.reference import scales_as_fp32
from qwen3_fp8_ascend.vllm_plugin import logger
from qwen3_fp8_ascend.vllm_plugin.partition import Partition

UNWRITTEN_CODE = 0x7F
"""A NaN code: no good checkpoint holds it, so rows full of it were never loaded."""

REPORT_BYTES = 1 << 30
"""How much is packed between two lines in the log."""

NOTED = "qwen3_fp8_ascend_backends"
"""What `note_backend` adds to a model's config."""


class PackingProgress:
    """Says in the log how far packing has come, every GiB: a large model takes several seconds."""

    def __init__(self) -> None:
        self.layers = self.bytes = self.reported = 0
        self.seconds = 0.0

    def add(self, size: int, seconds: float) -> None:
        self.layers += 1
        self.bytes += size
        self.seconds += seconds
        if self.bytes - self.reported >= REPORT_BYTES:
            self.reported = self.bytes
            rate = self.bytes / max(self.seconds, 1e-9) / 1e9
            logger.info("packed %d block-FP8 layers, %.1f GB so far (%.1f GB/s)", self.layers, self.bytes / 1e9, rate)


packing = PackingProgress()


class ShardScaleParameter(BlockQuantScaleParameter):
    """Scales of merged shards, each with a block grid of its own, of which a rank may hold any rows or columns.

    vLLM's own parameter takes a shard's first scale row as ceil(row offset / block_n), which overlaps the
    shard before it when that one is ragged: q/k/v of 576/192/192 rows would start at 0, 5, 6 instead of 0, 5, 7.
    It cuts scales among ranks as if every rank held whole blocks.
    """

    def __init__(self, *, partition: Partition, **kwargs: Any) -> None:
        self.partition = partition
        super().__init__(**kwargs)

    def _load_shard(self, loaded: torch.Tensor, shard: int, rank: int) -> None:
        block, counts = self.partition.block.n, [extent.count for extent in self.partition.scale_rows]
        row = rank * self.partition.widths[shard]
        if (row - self.partition.rows[shard]) % block:  # some layers give all ranks the same part of a shard
            raise ValueError(f"rows for rank {rank} are loaded, which start elsewhere in a block than was planned")
        loaded = loaded.narrow(0, row // block, counts[shard])
        self._copy(self.data.narrow(0, sum(counts[:shard]), counts[shard]), loaded)

    @staticmethod
    def _copy(target: torch.Tensor, loaded: torch.Tensor) -> None:
        if target.shape != loaded.shape:
            raise ValueError(f"expected a scale of shape {tuple(target.shape)}, got {tuple(loaded.shape)}")
        target.copy_(loaded)

    def load_column_parallel_weight(self, loaded_weight: torch.Tensor) -> None:
        self._load_shard(loaded_weight, 0, self.tp_rank)

    def load_row_parallel_weight(self, loaded_weight: torch.Tensor) -> None:
        columns = self.partition.scale_columns
        self._copy(self.data, loaded_weight.narrow(1, columns.first, columns.count))

    def load_merged_column_weight(self, loaded_weight: torch.Tensor, **kwargs: Any) -> None:
        self._load_shard(loaded_weight, kwargs["shard_id"], self.tp_rank)

    def load_qkv_weight(self, loaded_weight: torch.Tensor, **kwargs: Any) -> None:
        shard = self._shard_id_as_int(kwargs["shard_id"])
        # Ranks share key/value heads when there are fewer of them than ranks.
        rank = self.tp_rank if shard == 0 else self.tp_rank // kwargs["num_heads"]
        self._load_shard(loaded_weight, shard, rank)


def checked_loader(
    load: Callable[..., None],
    name: str,
    widths: tuple[int, ...],
    block_n: int,
    dtypes: tuple[torch.dtype, ...],
    loaded: set[Any],
) -> Callable[..., None]:
    """Wrap a layer's weight loader so that what does not fit is refused with the tensor's name.

    Tensors are handed on as parameters hold them (`as_held`). Shards that were loaded are added to
    `loaded` (None: all of them), except on the meta device, where vLLM only counts what will come.
    vLLM copies with an implicit cast: bf16 weights where FP8 is declared would be accepted and come out wrong.
    It also takes a tensor that is merged on disk apart at the merged layer's shards, whose blocks are not the
    tensor's own unless all shards are whole blocks. widths: the rows of the shards, before ranks divide them.
    """
    ragged_merge = len(widths) > 1 and any(width % block_n for width in widths[:-1])

    def load_checked(param: torch.nn.Parameter, loaded_weight: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        shard = args[0] if args else kwargs.get("loaded_shard_id")
        where = name if shard is None else f"{name}, shard {shard}"
        if ragged_merge and (shard is None or isinstance(shard, tuple)):
            raise BlockFp8Error(
                "a tensor that is merged on disk has shards that are not whole blocks",
                where=where,
                expected=f"shards of a multiple of {block_n} rows",
                got=" + ".join(map(str, widths)),
                fix="store the shards (q_proj, k_proj, ...) as tensors of their own, each with its own scales",
            )
        loaded_weight = without_single_axes(loaded_weight)
        check_dtype(loaded_weight, dtypes, where)
        loaded_weight = as_held(loaded_weight)
        with explain_load_errors(where, param, loaded_weight):
            load(param, loaded_weight, *args, **kwargs)
        if not param.is_meta:
            loaded.add(shard)

    return load_checked


def as_held(tensor: torch.Tensor) -> torch.Tensor:
    """A checkpoint's tensor as parameters hold it: codes as bytes, e8m0 scales as fp32, both before they are copied to
    a device that may know neither. Other scales are cast as they are copied.
    """
    if tensor.dtype == torch.float8_e4m3fn:
        return tensor.view(torch.uint8)
    return scales_as_fp32(tensor) if tensor.dtype == torch.float8_e8m0fnu else tensor


def without_single_axes(tensor: torch.Tensor) -> torch.Tensor:
    """A matrix of scales that ModelOpt has stored as (rows, 1, columns, 1); anything else as it is."""
    return tensor[:, 0, :, 0] if tensor.dim() == 4 and tensor.shape[1::2] == (1, 1) else tensor


def check_dtype(tensor: torch.Tensor, dtypes: tuple[torch.dtype, ...], where: str) -> None:
    """Refuse a checkpoint's tensor of another dtype, which vLLM would cast.

    Raises:
        BlockFp8Error: names `where`.
    """
    if tensor.dtype not in dtypes:
        raise BlockFp8Error(
            "the checkpoint's tensor has the wrong dtype",
            where=where,
            expected=" or ".join(str(d).removeprefix("torch.") for d in dtypes),
            got=str(tensor.dtype).removeprefix("torch."),
            fix=DAMAGED,
        )


@contextmanager
def explain_load_errors(where: str, param: torch.Tensor, tensor: torch.Tensor) -> Iterator[None]:
    """Turn what vLLM's loaders raise for a tensor of another shape into an error that names it.

    Raises:
        BlockFp8Error: names `where`.
    """
    try:
        yield
    except (AssertionError, RuntimeError, ValueError, IndexError) as error:
        if isinstance(error, BlockFp8Error):
            raise
        raise BlockFp8Error(
            "the checkpoint's tensor does not fit the layer",
            where=where,
            expected=f"a part of {tuple(param.shape)}",
            got=f"{tuple(tensor.shape)} ({error or type(error).__name__})",
            fix=DAMAGED,
        ) from error


def shard_numbers(loaded: Collection[Any], count: int) -> set[int]:
    """Positions of merged shards among `count`, from vLLM's names for them: 0, 1, ..., "q", "k", "v", several, all."""
    numbers: set[int] = set()
    for shard in loaded:
        if shard is None:
            return set(range(count))
        parts = shard if isinstance(shard, tuple) else (shard,)
        numbers.update("qkv".index(part) if isinstance(part, str) else part for part in parts)
    return numbers


def fill_with_small_values(codes: torch.Tensor, scale: torch.Tensor) -> None:
    """What vLLM's dummy loader does for floating-point weights; it does not know that these bytes are codes."""
    generator = torch.Generator(codes.device).manual_seed(0)
    first = codes if codes.dim() == 2 else codes[0]  # random numbers cost far more than copies, and experts are many
    first.random_(0, 80, generator=generator)
    first += 88 * (first >= 40)  # the upper half becomes negative
    if codes.dim() == 3:
        codes[1:] = first
    scale.abs_()


class ScaleNote:
    """Says once in the log that scales are no powers of two though the checkpoint's ``scale_fmt`` says that they are.

    They multiply exactly all the same, so it is no error. Activations get powers of two, as ``scale_fmt`` says.
    """

    def __init__(self) -> None:
        self.said = False

    def look(self, scale: torch.Tensor, activation: Activation, where: str) -> None:
        if self.said or activation is not Activation.W8A8_UE8M0:
            return
        normal = scale >= torch.finfo(torch.float32).tiny
        if (normal & ((scale.view(torch.int32) & 0x7FFFFF) != 0)).any():
            self.said = True
            logger.warning("%s: scale_fmt is ue8m0, but its scales are no powers of two; used as they are", where)


scale_note = ScaleNote()


def check_served(
    backend: str | None, device: torch.device, activation: Activation, block: BlockSize, *, experts: bool = False
) -> None:
    """Choose the backend before weights are read: what none can serve is then said within seconds.

    Raises:
        BlockFp8Error: as `select_backend`.
    """
    if device.type != "meta":  # where vLLM only counts
        select_backend(backend, device.type, activation, block, experts)


def check_serving(layer: Any, attribute: str, prefix: str) -> None:
    """Refuse to compute with a layer whose new weights were refused.

    Raises:
        BlockFp8Error: names the layer.
    """
    if getattr(layer, attribute) is None:
        raise BlockFp8Error(
            "the layer has no weights, since those that were loaded last were refused",
            where=prefix,
            fix="restart the server",
        )


def install_packed(layer: Any, packed: PackedWeight, name: str = "weight") -> None:
    """Give a layer its packed weight, as `packed_<name>`, in the memory of the one it has if there is one.

    vLLM copies renewed parameters into the memory of the old ones, which compiled code refers to. It sees only the
    parameter called `name`, so all the tensors are copied here; the layer never holds two packed weights.
    """
    attribute = f"packed_{name}"
    old = getattr(layer, attribute, None)
    if old is not None and _layout(old) == _layout(packed):
        for into, renewed in zip(old.tensors, packed.tensors, strict=True):
            into.copy_(renewed)
        packed = old
    setattr(layer, attribute, packed)
    # vLLM (LoRA, memory accounting) looks for a parameter of that name; it shares the packed storage.
    setattr(layer, name, torch.nn.Parameter(packed.tensors[0], requires_grad=False))


def no_scale(scale: torch.Tensor) -> torch.nn.Parameter:
    """What a packed layer has in place of its scales, for loaders to find: (0,), of their dtype, on their device.

    Not `scale.new_empty`, for which torch_npu has no kernel of its own.
    """
    return torch.nn.Parameter(torch.empty(0, dtype=scale.dtype, device=scale.device), requires_grad=False)


def note_backend(hf_config: Any, backend: str) -> None:
    """Make the backend a part of the key under which vLLM keeps compiled graphs.

    A graph holds a backend's operators and the layout of its weights, while the choice may come from the environment
    or from what is installed, which vLLM does not know. The model's config is hashed when the graph is made or looked
    for, which is after loading.
    """
    if hf_config is not None:
        noted = getattr(hf_config, NOTED, [])
        setattr(hf_config, NOTED, sorted({*noted, backend}))


def _layout(packed: PackedWeight) -> tuple[Any, ...]:
    return packed.backend, packed.grid, [(t.shape, t.dtype, t.device) for t in packed.tensors]
