"""vLLM's own models on its CUDA platform, on FakeTensors: our methods, backend, shapes, memory, what a graph captures.

No GPU is asked for a value, and none is needed: what the kernels compute is tests/test_ops.py's, with `--device cuda`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen3_fp8_ascend.testing.models import QWEN3_8B, qwen3_config
from tests.support import device_guard
from tests.support.expert_models import write_experts

ROOT = Path(__file__).parents[2]
BLOCK_FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
FAMILIES = ("qwen3_moe", "qwen2_moe", "deepseek_v3")
HIDDEN = 256
LINEAR = {"quantize": 1, "linear": 1}
EXPERTS = {"quantize": 2, "grouped_linear": 2}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    dense = root / "dense"
    dense.mkdir()
    shape = QWEN3_8B | {"num_hidden_layers": 1, "vocab_size": 264, "quantization_config": BLOCK_FP8}
    (dense / "config.json").write_text(json.dumps(qwen3_config(**shape)))
    return {"dense": dense} | {family: write_experts(root / family, family) for family in FAMILIES}


@pytest.fixture(scope="module", params=["8.0", "9.0"])
def found(
    request: pytest.FixtureRequest, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What a process finds on a GPU of that compute capability, model by model."""
    guard = tmp_path_factory.mktemp("guard") / "guard.so"
    if torch.version.cuda is None:
        device_guard.build(guard, "CUDA")
    command = [sys.executable, "-m", "tests.support.gpu_platform", request.param, str(guard)]
    run = subprocess.run(
        [*command, *map(str, folders.values())], cwd=ROOT, capture_output=True, text=True, env=os.environ, timeout=300
    )
    assert run.returncode == 0, run.stderr[-4000:]
    lines = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    return dict(zip(folders, lines, strict=True))


def test_a_dense_model_has_our_linears_on_the_gpu(found: dict[str, Any]) -> None:
    model = found["dense"]
    assert (model["worker"], model["config"]) == ("vllm.v1.worker.gpu_worker.Worker", "BlockFp8AscendConfig")
    assert model["methods"]["BlockFp8LinearMethod"] == 4 and model["backends"] == {"nvidia": 4}
    widths = {"self_attn.qkv_proj": 6144, "self_attn.o_proj": 4096, "mlp.gate_up_proj": 24576, "mlp.down_proj": 4096}
    expected = {f"model.layers.0.{name}": n for name, n in widths.items()}
    linears = [result for result in model["results"] if result["layer"] in expected]
    assert {result["layer"] for result in linears} == expected.keys() and len(linears) == 3 * len(expected)
    for result in linears:
        assert result["out"] == [[result["rows"], expected[result["layer"]]], "torch.bfloat16", "cuda:0"]
        assert result["launched"] == LINEAR


def test_weights_stay_at_one_byte(found: dict[str, Any]) -> None:
    model = found["dense"]
    assert model["weights"] == 4096 * (6144 + 4096 + 24576 + 12288)
    assert 1 < model["bytes"] / model["weights"] < 1.0003


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_have_ours_too(found: dict[str, Any], family: str) -> None:
    """Through vLLM's runner on a GPU: it routes, adds shared experts, and multiplies by the experts' weights."""
    model = found[family]
    layers = 1 if family == "deepseek_v3" else 2  # whose first layer is dense
    assert model["methods"]["BlockFp8ExpertsMethod"] == layers and model["backends"].keys() == {"nvidia"}
    moe = [result for result in model["results"] if "grouped_linear" in result["launched"]]
    assert len(moe) == 3 * layers
    for result in moe:
        assert result["out"] == [[result["rows"], HIDDEN], "torch.bfloat16", "cuda:0"]
        shared = 0 if family == "qwen3_moe" else 2
        assert result["launched"]["grouped_linear"] == EXPERTS["grouped_linear"]
        assert result["launched"].get("linear", 0) == shared
        assert result["launched"]["quantize"] == EXPERTS["quantize"] + shared
