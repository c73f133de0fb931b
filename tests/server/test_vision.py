"""Models that see, in the environment of `make venv`: prompts with images, against the same weights dequantized."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qwen3_fp8_ascend.checkpoints.dequantize import dequantize_checkpoint
from tests.support.logprobs import distance
from tests.support.offline import Run, answers
from tests.support.vision_models import FAMILIES, IMAGE, write_vision_model

from .conftest import TRACED
from .test_experts import BF16, W8A16

pytestmark = pytest.mark.server

PLAIN = BF16 | {"limit_mm_per_prompt": {"video": 0}}
"""vLLM measures memory for a compiled model by videos too, and none fits into so short a context."""


TRACED_FAMILY = "qwen3_5"
"""The family that is traced in the short form: it has the attention of the other one, and a delta net."""
MODES = [
    *((family, "traced" if family == TRACED_FAMILY else "eager") for family in FAMILIES),
    *(pytest.param(family, "compiled", marks=pytest.mark.long) for family in FAMILIES),
]


@pytest.mark.parametrize(("family", "mode"), MODES)
def test_prompts_with_an_image(family: str, mode: str, tmp_path: Path) -> None:
    """In bf16, which vLLM's delta net asks for on a CPU: what is left is its rounding, far below what FP8 costs."""
    folder, twin = write_vision_model(tmp_path / family, family), tmp_path / "twin"
    dequantize_checkpoint(folder, twin, dtype=torch.bfloat16, progress=False)
    runs = {
        "ours": Run(str(folder), W8A16 | PLAIN, IMAGE),
        "same weights": Run(str(twin), PLAIN, IMAGE),
        "master": Run(str(tmp_path / family), PLAIN, IMAGE),
        "other image": Run(str(folder), W8A16 | PLAIN, IMAGE, seed=1),
    }
    if mode != "eager":
        runs[mode] = Run(str(folder), W8A16 | PLAIN | {"enforce_eager": False}, IMAGE)
    environment = TRACED if mode == "traced" else {}
    made = {
        name: answer.logprobs
        for name, answer in zip(runs, answers(list(runs.values()), tmp_path, **environment), strict=True)
    }
    far = {name: distance(made[name], made["same weights"]) for name in runs}
    print(f"\n{family}, nats a token from the same weights: {far}")
    assert all(far[name] < far["master"] / 4 for name in ("ours", mode) if name in far)
    assert distance(made["other image"], made["ours"]) > far["ours"]  # the image is seen
