"""Layers that a block-FP8 checkpoint leaves in bf16: a weight that was not loaded, or not all of it, is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, ReplicatedLinear, UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from qwen3_fp8_ascend.errors import BlockFp8Error
from qwen3_fp8_ascend.format import BlockFp8Config, BlockSize
from qwen3_fp8_ascend.vllm_plugin import config as plugin
from qwen3_fp8_ascend.vllm_plugin.config import BlockFp8AscendConfig
from qwen3_fp8_ascend.vllm_plugin.unquantized import must_all_be_loaded

HIDDEN, TOKENS = 64, 100


@pytest.fixture(autouse=True)
def checking(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a model that generates text."""
    monkeypatch.setattr(plugin, "must_all_be_loaded", lambda _: True)


def make(kind: Any, *sizes: Any, **options: Any) -> Any:
    config = BlockFp8AscendConfig(BlockFp8Config(BlockSize(), ("re:.*",)))
    with set_current_vllm_config(VllmConfig()):
        return kind(*sizes, params_dtype=torch.bfloat16, quant_config=config, prefix="model.it", **options)


def load(layer: Any, tensor: torch.Tensor, *shard: int) -> None:
    layer.weight.weight_loader(layer.weight, tensor.bfloat16(), *shard)


def finish(layer: Any) -> None:
    layer.quant_method.process_weights_after_loading(layer)


LAYERS: dict[str, tuple[Any, tuple[Any, ...], tuple[int, int]]] = {
    "linear": (ReplicatedLinear, (HIDDEN, 32), (32, HIDDEN)),
    "embedding": (VocabParallelEmbedding, (TOKENS, HIDDEN), (TOKENS, HIDDEN)),
    "head": (ParallelLMHead, (TOKENS, HIDDEN), (TOKENS, HIDDEN)),
    "one column": (ReplicatedLinear, (1, 32), (32, 1)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_what_was_not_loaded_is_refused_by_name(name: str) -> None:
    kind, sizes, shape = LAYERS[name]
    with pytest.raises(BlockFp8Error, match=r"missing from the checkpoint[^\n]*\n  where: model\.it\.weight\n"):
        finish(make(kind, *sizes))
    layer = make(kind, *sizes)
    weight = torch.randn(shape)
    load(layer, weight)
    finish(layer)
    if name != "embedding":
        x = torch.randn(3, shape[1]).bfloat16()
        out = layer.quant_method.apply(layer, x)[:, : shape[0]]
        torch.testing.assert_close(out, x @ weight.bfloat16().mT, rtol=0.02, atol=0.02)


def test_a_shard_that_was_not_loaded_is_refused() -> None:
    layer = make(MergedColumnParallelLinear, HIDDEN, [32, 48])
    assert type(layer.quant_method) is UnquantizedLinearMethod  # whose name decides how vLLM loads
    load(layer, torch.randn(32, HIDDEN), 0)
    with pytest.raises(BlockFp8Error, match="missing from the checkpoint"):
        finish(layer)
    load(layer, torch.randn(48, HIDDEN), 1)
    finish(layer)


def test_a_convolution_that_vllm_keeps_as_a_linear() -> None:
    """Of delta nets and Mamba: the model gives its weight an axis more before it is loaded."""
    layer = make(ReplicatedLinear, 4, 32)
    layer.weight.data = layer.weight.data.unsqueeze(1)
    with pytest.raises(BlockFp8Error, match="missing from the checkpoint"):
        finish(layer)


def test_a_tied_head_has_the_embedding() -> None:
    embedding, head = make(VocabParallelEmbedding, TOKENS, HIDDEN), make(ParallelLMHead, TOKENS, HIDDEN)
    head = head.tie_weights(embedding)
    load(embedding, torch.randn(TOKENS, HIDDEN))
    finish(head)


@pytest.mark.parametrize(
    ("asked", "changes"),
    [
        (True, {}),
        (False, {"model_config": SimpleNamespace(runner_type="pooling")}),
        (False, {"model_config": None}),
        (False, {"load_config": SimpleNamespace(load_format="dummy")}),
        (False, {"speculative_config": SimpleNamespace()}),
    ],
)
def test_whose_layers_must_all_be_loaded(asked: bool, changes: dict[str, Any]) -> None:
    config: dict[str, Any] = {
        "model_config": SimpleNamespace(runner_type="generate"),
        "load_config": SimpleNamespace(load_format="auto"),
        "speculative_config": None,
    }
    assert must_all_be_loaded(SimpleNamespace(**(config | changes))) is asked  # type: ignore[arg-type]
