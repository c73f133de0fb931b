"""Which of vLLM's layers are FP8: by the checkpoint's plan where there are headers, else by its ignore list."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from qwen3_fp8_ascend.checkpoints.ignore import IgnoreList
from qwen3_fp8_ascend.checkpoints.plan import FLOAT, FP8
from qwen3_fp8_ascend.errors import BlockFp8Error, describe
from qwen3_fp8_ascend.format import WEIGHT_SUFFIX, BlockFp8Config


class Modules:
    """The checkpoint's modules under vLLM's names. Plain values only: it travels to workers by pickle.

    kinds: module -> "fp8" or "float", from the checkpoint's tensors; empty where there are no headers to look at
        (``--load-format dummy``, a remote model), and then the ignore list decides.
    """

    def __init__(self, checkpoint: BlockFp8Config) -> None:
        self.ignored = list(checkpoint.ignored)
        self.targets = list(checkpoint.targets)
        self.kinds: dict[str, str] = {}
        self._lists: tuple[IgnoreList, IgnoreList] | None = None

    def __repr__(self) -> str:
        if self.kinds:
            return f"{sum(kind == FP8 for kind in self.kinds.values())} FP8 modules of {len(self.kinds)}"
        return f"{len(self.ignored)} names excluded"

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_lists": None}

    def obey(self, kinds: Mapping[str, str]) -> None:
        """Take over a checkpoint's plan."""
        self.kinds = dict(kinds)

    def rename(self, mapper: Any) -> None:
        """Map the checkpoint's names to vLLM's; a model and the models within it each come with a mapper of their own.

        Names are mapped as those of weights, since mappers are made for these: ``model.visual`` alone would stay.
        What was not mapped remains too, for it may be the name of a model within.
        """
        self.kinds = self.kinds | {
            renamed: self.kinds[name] for name, renamed in _mapped(self.kinds, mapper) if renamed is not None
        }
        plain = {name: renamed for name, renamed in _mapped(self.ignored, mapper) if renamed is not None}
        self.ignored = list(dict.fromkeys([*self.ignored, *plain.values()]))
        self._lists = None

    def skipped(self, prefix: str, shards: Sequence[str]) -> list[str]:
        """Which of a layer's shards stay unquantized: all of them if the layer itself does.

        Raises:
            BlockFp8Error: a pattern of the list is not understood, and there are no tensors to look at.
            UnreadableError: the list's patterns take too long.
        """
        whole = list(shards) or [prefix]
        if prefix in self.kinds:
            return whole if self.kinds[prefix] == FLOAT else []
        known = [shard for shard in shards if shard in self.kinds]
        if known:
            unquantized = [shard for shard in known if self.kinds[shard] == FLOAT]
            return whole if len(unquantized) == len(known) else unquantized
        if self._leaves_alone(prefix) or self._is_beside_floats(prefix):
            return whole
        return [shard for shard in shards if self._leaves_alone(shard)]

    def _is_beside_floats(self, prefix: str) -> bool:
        """Whether a layer that the checkpoint has under other names is in a block of which nothing is FP8.

        GraniteMoE: what vLLM calls `block_sparse_moe.experts` is `input_linear` and `output_linear` there.
        """
        block = prefix.rpartition(".")[0] + "."
        kinds = {kind for name, kind in self.kinds.items() if name.startswith(block)}
        return kinds == {FLOAT}

    def _leaves_alone(self, module: str) -> bool:
        """Whether the config's list, or its targets, leave a module unquantized."""
        if self._lists is None:
            self._lists = IgnoreList(self.ignored), IgnoreList(self.targets)
        ignored, targets = self._lists
        unreadable = [*ignored.unreadable, *targets.unreadable]
        if unreadable and not self.kinds:
            raise BlockFp8Error(
                "a pattern of the ignore list is not understood, and there are no tensors to look at",
                where="config.json: quantization_config",
                expected="a module's name, a shell-style pattern, or a regular expression without look-around",
                got=describe(unreadable[0], 100),
                fix="write it otherwise, or serve a local folder with its weights",
            )
        return ignored.has(module) or (bool(self.targets) and not targets.has(module))


def _mapped(names: Iterable[str], mapper: Any) -> list[tuple[str, str | None]]:
    """Each name with vLLM's for it."""
    found: list[tuple[str, str | None]] = []
    for name in names:
        renamed = mapper.apply_list([name + WEIGHT_SUFFIX])
        found.append((name, renamed[0].removesuffix(WEIGHT_SUFFIX) if renamed else None))
    return found
