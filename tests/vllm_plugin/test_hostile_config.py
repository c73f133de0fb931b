"""What the vLLM plugin makes of configs from strangers, before any weight is read."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from qwen3_fp8_ascend.format import MAX_IGNORED, BlockFp8Config
from qwen3_fp8_ascend.vllm_plugin.config import BlockFp8AscendConfig
from tests.fuzz.drafts import sound_checkpoint
from tests.fuzz.folders import HostileFolder, Link
from tests.support.own_time import within


@pytest.mark.parametrize("given", [None, 3, "fp8", ["fp8"], {}, {"quant_method": 3}])
def test_what_is_no_quantization_config_is_not_ours(given: Any) -> None:
    assert BlockFp8AscendConfig.override_quantization_method(given, "ascend") is None


def test_the_longest_ignore_list_costs_no_time() -> None:
    """A large model has a few hundred linear layers, each of which is looked up."""
    config = BlockFp8AscendConfig(BlockFp8Config(ignored=tuple(f"module{i}" for i in range(MAX_IGNORED))))
    config.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    with within(1):
        for layer in range(20):
            assert not config._is_skipped(f"model.language_model.layers.{layer}.self_attn.qkv_proj")


def test_a_weight_behind_a_link_is_served_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    draft = sound_checkpoint()
    draft.lay_out()
    draft.render()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_bytes(draft.files["model.safetensors"])  # type: ignore[arg-type]
    folder = tmp_path / "a" / "b" / "model"
    folder.mkdir(parents=True)
    HostileFolder(draft.files | {"model.safetensors": Link(str(elsewhere))}).write(folder)
    config = BlockFp8AscendConfig.from_config(draft.config["quantization_config"])
    logger = logging.getLogger("vllm")
    logger.addHandler(caplog.handler)
    try:
        config.maybe_update_config(str(folder))
    finally:
        logger.removeHandler(caplog.handler)
    assert "leaves the checkpoint folder" in caplog.text
