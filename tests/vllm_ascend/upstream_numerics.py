"""Run by test_upstream.py where the pull request is applied: its scheme against this project's specification."""

import dataclasses
from unittest.mock import patch

import pytest
import torch
from vllm_ascend.quantization.methods.w8a8 import fp8_block_exact

from qwen3_fp8_ascend.testing.judges import assert_prefill, random_problem
from tests.ut.quantization.conftest_quantization import create_mock_vllm_config


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "k"), [(384, 256), (200, 576), (128, 100)])
def test_linear(n: int, k: int, dtype: torch.dtype) -> None:
    problem = random_problem(65, (n,), k)
    x = problem.x.to(dtype)
    config = create_mock_vllm_config()
    config.model_config.dtype = dtype
    parent = "vllm_ascend.quantization.methods.w8a8.fp8_block"
    with (
        patch(f"{parent}.get_current_vllm_config", return_value=config),
        patch(f"{parent}.is_950", return_value=False),
        patch.object(fp8_block_exact, "is_950", return_value=False),
    ):
        scheme = fp8_block_exact.AscendFp8BlockExactLinearMethod((128, 128))
    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter(problem.weight, requires_grad=False)
    layer.weight_scale_inv = torch.nn.Parameter(problem.scale, requires_grad=False)
    scheme.process_weights_after_loading(layer)
    assert_prefill(scheme.apply(layer, x), dataclasses.replace(problem, x=x))
