"""The block-FP8 checkpoint format: what config.json says, how tensors are named, where blocks lie.

Source: https://huggingface.co/Qwen/Qwen3-8B-FP8 (config.json) and DeepSeek-V3's ``weights/README_WEIGHTS.md``.
Nothing here imports torch: the format is arithmetic on shapes and names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, NamedTuple

from qwen3_fp8_ascend import containers
from qwen3_fp8_ascend.errors import BlockFp8Error, describe

E4M3_MAX = 448.0
"""Largest finite e4m3fn value."""

AMAX_FLOOR = 1e-10
"""Lower bound of a group's amax before it becomes a scale, so that a zero group has a finite scale."""

WEIGHT_SUFFIX = ".weight"
SCALE_NAME = "weight_scale_inv"
SCALE_SUFFIX = "." + SCALE_NAME
"""In spite of its name the checkpoint's ``weight_scale_inv`` MULTIPLIES the codes."""

SCALE_DTYPES = ("F32", "BF16", "F8_E8M0")
"""safetensors dtypes seen for ``weight_scale_inv``; all become fp32 at load, which is exact."""

FP32_SCALES, UE8M0_SCALES = "fp32", "ue8m0"
"""What ``scale_fmt`` says of all scales, those of activations included: any fp32 numbers, or powers of two."""


SCALE_FORMATS = {**dict.fromkeys(("none", "float", "fp32", "float32"), FP32_SCALES), "ue8m0": UE8M0_SCALES}
"""Spellings of ``scale_fmt``, in lower case."""

MAX_IGNORED = 1 << 16
"""Bound on the names of an ignore list: many times what the largest models have."""


class Activation(str, Enum):
    """What a linear does with x: one encoding, from the user's flag to the kernels."""

    W8A8 = "w8a8"
    """Quantized to e4m3 in groups of channels first: what the checkpoint's ``"activation_scheme": "dynamic"`` says."""
    W8A16 = "w8a16"
    """Taken as it is."""
    W8A8_UE8M0 = "w8a8-ue8m0"
    """As W8A8, each group's scale rounded up to a power of two: what W8A8 means where ``"scale_fmt": "ue8m0"``."""

    def __str__(self) -> str:
        return self.value

    @classmethod
    def parse(cls, text: object, where: object = None) -> Activation:
        """The value that a user named; also by the words of earlier versions, which result files and scripts hold.

        Raises:
            BlockFp8Error: there is no such value.
        """
        word = {"dynamic": "w8a8", "none": "w8a16"}.get(text, text) if isinstance(text, str) else text
        if isinstance(word, str) and word in list(cls):
            return cls(word)
        raise BlockFp8Error("unknown activation mode", where=where, expected=" or ".join(cls), got=describe(text))


class BlockSize(NamedTuple):
    """Rows (n) and columns (k) of the weight that share one scale."""

    n: int = 128
    k: int = 128

    def __str__(self) -> str:
        return f"{self.n}x{self.k}"


DEFAULT_BLOCK = BlockSize()
"""What every backend serves."""

SMALLEST_BLOCK = BlockSize(32, 4)
"""The CPU's kernels take blocks of at least so many rows, and of a multiple of so many columns. `reference` takes any,
the others `DEFAULT_BLOCK` alone."""


def ceil_div(a: int, b: int) -> int:
    """Smallest integer that is at least a / b."""
    return -(-a // b)


def scale_shape(n: int, k: int, block: BlockSize = DEFAULT_BLOCK) -> tuple[int, int]:
    """Shape of the scale tensor that belongs to an (n, k) weight; ragged edges have a block of their own."""
    return ceil_div(n, block.n), ceil_div(k, block.k)


def check_block_sizes(sizes: Sequence[Any], what: str) -> None:
    """Refuse sizes of blocks that are not integers of at least 1 which 64 bits can hold.

    Raises:
        BlockFp8Error: names `what`.
    """
    for size in sizes:
        if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size < 1 << 63:
            raise BlockFp8Error(
                f"{what} must be a positive integer",
                expected="an integer of at least 1, below 2**63",
                got=f"{describe(size)} ({type(size).__name__})",
            )


class RowSpan(NamedTuple):
    """Consecutive weight rows that share one row of scales."""

    start: int
    rows: int
    scale_row: int


@dataclass(frozen=True)
class BlockGrid:
    """Block grid of a weight (n, k), whose rows may be merged shards: each of them starts a block of its own.

    widths: the rows of each shard; one that was not merged has one.
    A q/k/v projection of 576, 192 and 192 rows has 5 + 2 + 2 scale rows: shards are quantized one by one
    in the checkpoint, so blocks never straddle two of them.
    """

    widths: tuple[int, ...]
    k: int
    block: BlockSize = DEFAULT_BLOCK

    def __post_init__(self) -> None:
        check_block_sizes(self.block, "a block's size")
        if not self.widths or any(w < 0 for w in self.widths) or self.k < 0:
            raise BlockFp8Error(
                "a block grid needs at least one shard, and sizes of zero or more",
                got=f"widths {self.widths}, k {self.k}",
            )

    @property
    def n(self) -> int:
        return sum(self.widths)

    @property
    def scale_rows(self) -> tuple[int, ...]:
        """Number of scale rows of each shard."""
        return tuple(ceil_div(w, self.block.n) for w in self.widths)

    @property
    def scale_shape(self) -> tuple[int, int]:
        return sum(self.scale_rows), ceil_div(self.k, self.block.k)

    def spans(self) -> Iterator[RowSpan]:
        """The row blocks from top to bottom, ragged ones included."""
        row = scale_row = 0
        for width in self.widths:
            end = row + width
            while row < end:
                rows = min(self.block.n, end - row)
                yield RowSpan(row, rows, scale_row)
                row += rows
                scale_row += 1


@dataclass(frozen=True)
class BlockFp8Config:
    """What a checkpoint's ``quantization_config`` says, checked.

    ignored: names and patterns of modules that stay unquantized (``ignored_layers``, ``modules_to_not_convert``,
        ``ignore``, ``exclude_modules``).
    scale_fmt: `FP32_SCALES` or `UE8M0_SCALES`.
    container: whose words config.json uses, one of `containers.SCALE_ENDINGS`.
    targets: the modules that are quantized, if not every linear layer.
    weights_only: the checkpoint asks for activations as they are (W8A16).
    set_aside: keys that are not obeyed, since they say nothing about linear layers.
    """

    block: BlockSize = DEFAULT_BLOCK
    ignored: tuple[str, ...] = ()
    scale_fmt: str = FP32_SCALES
    container: str = containers.FP8
    targets: tuple[str, ...] = ()
    weights_only: bool = False
    set_aside: tuple[str, ...] = field(default=(), compare=False)

    @property
    def scale_name(self) -> str:
        """What a module's block scales are called: ``weight_scale_inv`` or ``weight_scale``."""
        return self.scale_of("weight")

    def scale_of(self, weight: str) -> str:
        """What the block scales of a weight are called: ``mlp.up_proj.weight`` -> ``mlp.up_proj.weight_scale_inv``."""
        return weight + containers.SCALE_ENDINGS[self.container]

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], where: str = "config.json: quantization_config") -> BlockFp8Config:
        """Parse and check a ``quantization_config`` of any container.

        Raises:
            BlockFp8Error: not FP8, no block size, static or per-tensor activations, another FP8 format, scales of a
                format that is not known, or a key that changes what the weights are. The message names the key.
        """
        if not isinstance(config, Mapping):
            raise BlockFp8Error("quantization_config is not an object", where=where, got=type(config).__name__)
        reading = containers.read_container(config, where)
        if reading.container != containers.FP8:
            settings = cls._checked(reading.settings, where)
            return replace(
                settings,
                container=reading.container,
                targets=reading.targets,
                weights_only=reading.weights_only,
                set_aside=reading.set_aside,
            )
        if config.get("fmt", "e4m3") not in ("e4m3", "float8_e4m3fn"):
            raise containers.refusal(config, "fmt", where, "'e4m3'")
        if config.get("activation_scheme", "dynamic") != "dynamic":
            expected = "'dynamic' (one scale per token and 128 channels)"
            raise containers.refusal(config, "activation_scheme", where, expected)
        containers.check_meaning(config, where)
        return replace(cls._checked(config, where), set_aside=reading.set_aside)

    @classmethod
    def _checked(cls, config: Mapping[str, Any], where: str) -> BlockFp8Config:
        """What all containers say, in this format's own words."""
        named = config.get("scale_fmt")
        scale_fmt = SCALE_FORMATS.get("none" if named is None else named.lower() if isinstance(named, str) else "")
        if scale_fmt is None:
            expected = "'ue8m0' (powers of two), or 'float' or nothing (fp32)"
            raise containers.refusal(config, "scale_fmt", where, expected)
        sizes = config.get("weight_block_size")
        if (
            not isinstance(sizes, Sequence)
            or isinstance(sizes, str)
            or len(sizes) != 2
            or not all(isinstance(s, int) and not isinstance(s, bool) and 1 <= s <= 1 << 20 for s in sizes)
        ):
            expected = "two positive integers, such as [128, 128]"
            raise containers.refusal(config, "weight_block_size", where, expected)
        ignored: dict[str, None] = {}  # in their order, each once
        for key in ("ignored_layers", "modules_to_not_convert"):
            names = config.get(key) or []
            if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
                fix = "correct the list in config.json"
                raise containers.refusal(config, key, where, "a list of module names", fix)
            if len(names) > MAX_IGNORED:
                raise BlockFp8Error(
                    "an ignore list has more names than any model has modules",
                    where=f"{where}.{key}",
                    expected=f"at most {MAX_IGNORED}; a parent's name stands for all below it",
                    got=len(names),
                    fix="correct the list in config.json",
                )
            ignored |= dict.fromkeys(names)
        return cls(BlockSize(*sizes), tuple(ignored), scale_fmt)

    def activation(self, asked: Activation | None) -> Activation:
        """What a linear of this checkpoint does with x where a user asks for `asked`, or for nothing (None).

        W8A8 has the checkpoint's scales; nothing means what the checkpoint says. The one place where that is decided.
        """
        if asked is None:
            asked = Activation.W8A16 if self.weights_only else Activation.W8A8
        return Activation.W8A8_UE8M0 if asked is Activation.W8A8 and self.scale_fmt == UE8M0_SCALES else asked

    def to_dict(self) -> dict[str, Any]:
        """The ``quantization_config`` to write into config.json."""
        if self.container != containers.FP8:
            return containers.written(self.container, self.block, self.ignored, self.targets, self.weights_only)
        out: dict[str, Any] = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": list(self.block),
        }
        if self.scale_fmt != FP32_SCALES:
            out["scale_fmt"] = self.scale_fmt
        if self.ignored:
            out["modules_to_not_convert"] = list(self.ignored)
        return out
