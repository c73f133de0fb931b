"""vLLM's settings that have nothing to do with linear layers: with each, a model is as near to its weights in fp32."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen3_fp8_ascend.checkpoints.dequantize import dequantize_checkpoint
from qwen3_fp8_ascend.checkpoints.quantize import quantize_checkpoint
from qwen3_fp8_ascend.testing.models import write_qwen3
from tests.support.logprobs import distance
from tests.support.offline import Run, answers

pytestmark = pytest.mark.server

OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "a cache in e4m3": {"kv_cache_dtype": "fp8_e4m3"},
    "a cache in e5m2": {"kv_cache_dtype": "fp8_e5m2"},
    "prompts in pieces": {"max_num_batched_tokens": 16, "max_num_seqs": 4, "enable_chunked_prefill": True},
    "files read at once": {"safetensors_load_strategy": "eager"},
    "files read by threads": {"model_loader_extra_config": {"enable_multithread_load": True, "num_threads": 2}},
    "offloading": {"cpu_offload_gb": 0.01},
}
W8A16: Mapping[str, Any] = {"quantization": "ascend", "hf_overrides": {"qwen3_fp8_ascend": {"activation": "w8a16"}}}
NEAR = 1e-5
"""In nats a token; another order of sums makes a tenth of it."""

STEPS = 1 / 20
"""Of what a cache in eight bits changes: that order puts one key or value in some ten thousand on the other side of
a rounding, so that the square root of that share, a hundredth, of the change is another."""


@pytest.mark.long
def test_settings_change_the_double_alike(tmp_path: Path) -> None:
    fp8, double = tmp_path / "fp8", tmp_path / "fp32"
    quantize_checkpoint(write_qwen3(tmp_path / "bf16"), fp8, progress=False)
    dequantize_checkpoint(fp8, double, dtype=torch.float32, progress=False)
    runs = [Run(str(double))]
    for options in OPTIONS.values():
        runs += [Run(str(fp8), {**options, **W8A16}), Run(str(double), dict(options))]
    plain, *made = (answer.logprobs for answer in answers(runs, tmp_path))
    for name, served, wanted in zip(OPTIONS, made[::2], made[1::2], strict=True):
        change = distance(wanted, plain)
        assert (change > 100 * NEAR) == ("cache" in name), (name, change)
        assert distance(served, wanted) < max(NEAR, STEPS * change), (name, change)
