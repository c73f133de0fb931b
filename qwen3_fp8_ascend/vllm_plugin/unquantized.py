"""Layers that the checkpoint leaves as they are: whether anything was loaded into them.

Of a quantized model vLLM does not ask (`load_weights` in vllm/model_executor/model_loader/default_loader.py, 0.30 to
0.33): a layer whose tensor the checkpoint lacks would compute with whatever is in memory.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from vllm.config import VllmConfig
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

from qwen3_fp8_ascend.errors import BlockFp8Error
from qwen3_fp8_ascend.vllm_plugin.loading import DAMAGED

Method = TypeVar("Method", bound=QuantizeMethodBase)


def must_all_be_loaded(config: VllmConfig) -> bool:
    """Whether every linear, embedding and head of the model that is being built gets its weight from the checkpoint.

    Random weights come from nowhere. A model for pooling has a head that is taken away, and a draft model may get its
    embedding and its head from the model that it guesses for.
    """
    model = config.model_config
    dummy = config.load_config.load_format == "dummy"
    return model is not None and model.runner_type == "generate" and not dummy and config.speculative_config is None


def check_loaded(method: Method, prefix: str) -> Method:
    """One of vLLM's methods for a layer, which then refuses a weight that was not loaded, or not all of it.

    The instance is changed: vLLM knows its methods by the names of their classes.
    method: for this layer alone. prefix: the layer's name.
    Raises:
        BlockFp8Error: by `process_weights_after_loading`.
    """
    create, process = method.create_weights, method.process_weights_after_loading

    def create_weights(layer: Any, *args: Any, **kwargs: Any) -> None:
        create(layer, *args, **kwargs)
        _edges(layer.weight).fill_(torch.nan)

    def process_weights_after_loading(layer: Any) -> None:
        if torch.isnan(_edges(layer.weight)).any():
            raise BlockFp8Error(
                "a weight is missing from the checkpoint, or holds NaN", where=f"{prefix}.weight", fix=DAMAGED
            )
        process(layer)

    method.create_weights = create_weights
    method.process_weights_after_loading = process_weights_after_loading
    return method


def _edges(weight: torch.Tensor) -> torch.Tensor:
    """A view of the first and the last column of a weight (n, k), or (n, 1, k): of every part that may be loaded."""
    rows = weight.data.flatten(1)
    return rows[:, :: max(1, rows.shape[1] - 1)]
