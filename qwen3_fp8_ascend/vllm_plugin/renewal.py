"""New weights for a layer that serves, tensor by tensor through ``model.load_weights()`` of a live model.

Trainers (verl, NeMo-RL) push weights to rollout engines that way. vLLM's own ``reload_weights`` prepares each layer for
new weights first; they do not. So a packed layer keeps a parameter for each tensor of the checkpoint, whose loader
collects what comes. As soon as a layer has all of its tensors they are packed into the memory of the old ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from vllm.model_executor.utils import set_weight_attrs

from qwen3_fp8_ascend.errors import BlockFp8Error

PACKED = "is_packed"
"""Attribute of a packed layer's parameters."""


def is_packed(parameter: torch.Tensor) -> bool:
    """Whether a layer's parameter is what was made of the checkpoint's tensors."""
    return getattr(parameter, PACKED, False)


class Renewal:
    """What has come of a layer's new weights.

    declare: registers parameters for the checkpoint's tensors on a module, as the layer had them before it was packed.
    missing: the checkpoint's names of what has not come yet.
    pack: packs what has come, into the layer.
    """

    def __init__(
        self,
        declare: Callable[[torch.nn.Module], None],
        missing: Callable[[], Iterable[str]],
        pack: Callable[[torch.nn.Module], None],
    ) -> None:
        self.declare, self.missing, self.pack = declare, missing, pack
        self.staged: torch.nn.Module | None = None
        self.device: torch.device

    def take(self, parameter: str, *args: Any, **kwargs: Any) -> Any:
        """What the parameter's loader does when a tensor comes; args: those of vLLM's loaders, but the parameter.

        Raises:
            BlockFp8Error: as when weights are loaded for the first time.
        """
        if self.staged is None:
            self.staged = torch.nn.Module()
            with self.device:  # vLLM makes the layer's the default while it loads a model, and only then
                self.declare(self.staged)
        into = getattr(self.staged, parameter)
        result = into.weight_loader(into, *args, **kwargs)
        if next(iter(self.missing()), None) is None:
            staged, self.staged = self.staged, None
            self.pack(staged)
        return result

    def offer(self, layer: torch.nn.Module, parameter: str, loader: Callable[..., Any] | None = None) -> None:
        """Let a parameter of the packed layer take new weights, by `take` or another loader of vLLM's form."""

        def load(param: torch.nn.Parameter, *args: Any, **kwargs: Any) -> Any:
            return self.take(parameter, *args, **kwargs)

        offered = getattr(layer, parameter)
        self.device = offered.device
        set_weight_attrs(offered, {"weight_loader": loader or load, PACKED: True})

    def check_whole(self, prefix: str) -> None:
        """Refuse to compute with old weights of which some new ones have come.

        Raises:
            BlockFp8Error: names the layer and the first tensor that has not come.
        """
        if self.staged is None:
            return
        missing = list(self.missing())
        raise BlockFp8Error(
            "only some of a layer's new weights have come",
            where=prefix,
            expected="all of them, before it computes again",
            got=f"{len(missing)} are missing, the first is {missing[0]}",
            fix="push all tensors of the layer, its scales too",
        )
