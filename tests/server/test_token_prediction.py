"""Speculating with a checkpoint's own layer for multi-token prediction (MTP), its linears in block FP8.

In fp32 and with weights only (W8A16), so that what is left between it and its dequantized twin is the order of sums.
vLLM's native kernels are put where they are called, as for other speculation on a CPU; the plugin changes nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qwen3_fp8_ascend.checkpoints.dequantize import dequantize_checkpoint
from qwen3_fp8_ascend.checkpoints.quantize import quantize_checkpoint
from tests.support.measured_forms import NO_IMAGES
from tests.support.mtp_models import DEEPSEEK, GLM4_MOE, QWEN3_5, write_mtp
from tests.support.offline import MTP, Answer, Run, answers
from tests.support.public_forms import REFERENCE_MLA

from .test_experts import NEAR, W8A16

pytestmark = pytest.mark.server

SPECULATION = {"method": MTP, "num_speculative_tokens": 1}
OPTIONS: dict[str, dict[str, Any]] = {DEEPSEEK: REFERENCE_MLA, GLM4_MOE: {}, QWEN3_5: NO_IMAGES}
"""What vLLM takes for latent attention on an AMX processor is for bf16; a draft inherits nothing of this, so it is said
to it too."""

SAID_OTHERWISE = {DEEPSEEK: 1}
"""Texts that differ from those without speculation where vLLM verifies by CPU_MLA, on its own layers too."""

DRAFT_OPTIONS = {DEEPSEEK: REFERENCE_MLA}
LAYERS = {DEEPSEEK: "model.layers.1.mtp_block.", GLM4_MOE: "model.layers.1.mtp_block."}


def speculating(family: str, model: Path, options: dict[str, Any]) -> Run:
    speculation = SPECULATION | DRAFT_OPTIONS.get(family, {})
    more = {"speculative_config": speculation, "disable_log_stats": False}
    return Run(str(model), OPTIONS[family] | options | more, native_speculation=True)


def served(family: str, folder: Path) -> dict[str, Answer]:
    """A model with an MTP layer that says what it will, and with one of other weights; and the first one's twin."""
    for name, echo in (("echo", True), ("other", False)):
        master = write_mtp(folder / f"{name}-bf16", family, echo=echo)
        quantize_checkpoint(master, folder / name, progress=False)
    dequantize_checkpoint(folder / "echo", folder / "twin", dtype=torch.float32, progress=False)
    runs = {
        "plain": Run(str(folder / "echo"), OPTIONS[family] | W8A16),
        "plain twin": Run(str(folder / "twin"), OPTIONS[family]),
        "echo": speculating(family, folder / "echo", W8A16),
        "twin": speculating(family, folder / "twin", {}),
        "other": speculating(family, folder / "other", W8A16),
    }
    return dict(zip(runs, answers(list(runs.values()), folder, timeout=1500), strict=True))


@pytest.mark.parametrize(
    "family",
    [
        DEEPSEEK,
        pytest.param(GLM4_MOE, marks=pytest.mark.long),
    ],
)
def test_an_mtp_layer_guesses_what_its_twin_guesses(tmp_path: Path, family: str) -> None:
    made = served(family, tmp_path)
    for name, answer in made.items():
        print(f"\n{family}, {name}: {answer.accepted} of {answer.drafted} tokens accepted, {len(answer.packed)} packed")
    echo, twin, other = made["echo"], made["twin"], made["other"]
    assert made["plain"].tokens == made["plain twin"].tokens
    assert echo.tokens == twin.tokens
    for name in ("echo", "other"):
        same = [ours == plain for ours, plain in zip(made[name].tokens, made["plain"].tokens, strict=True)]
        assert sum(same) >= len(same) - SAID_OTHERWISE.get(family, 0)
    assert not any(name.startswith("draft.") for name in made["plain"].packed | twin.packed)
    drafts = {name.removeprefix("draft.") for name in echo.packed if name.startswith("draft.")}
    assert drafts and all(name.startswith(LAYERS[family]) or name.startswith("model.fc.") for name in drafts)
    assert {name.rpartition("packed_")[2] for name in drafts} <= {"weight", "w13_weight", "w2_weight"}
    far = float(np.abs(echo.guesses - twin.guesses).mean())
    print(f"  guesses: {far:.1e} nats from the twin's, {len(echo.guesses)} of them; packed: {sorted(drafts)}")
    assert far < NEAR
    assert (echo.accepted, echo.drafted) == (twin.accepted, twin.drafted)
    assert echo.accepted > echo.drafted / 2 > other.accepted


@pytest.mark.long
def test_vllm_itself_ends_of_delta_nets(tmp_path: Path) -> None:
    """A bf16 Qwen3.5 on a CPU, nothing of ours in it. Once this fails, the model belongs into the test above."""
    model = write_mtp(tmp_path / "bf16", QWEN3_5, echo=True)
    with pytest.raises(AssertionError, match="no mamba layers in the model"):
        answers([speculating(QWEN3_5, model, {})], tmp_path)
