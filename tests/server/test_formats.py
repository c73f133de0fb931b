"""Public forms of checkpoints through vLLM, against vLLM's own layers with the same weights dequantized.

Weights only (W8A16) and in fp32, since quantized activations amplify any difference in rounding.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen3_fp8_ascend.checkpoints.dequantize import dequantize_checkpoint
from qwen3_fp8_ascend.checkpoints.quantize import quantize_checkpoint
from qwen3_fp8_ascend.testing.models import write_qwen3
from tests.support.logprobs import distance, prompt_logprobs
from tests.support.offline import Run, answers
from tests.support.public_forms import FORMS, Form, write_forms

from .conftest import ASCEND, EAGER, Start
from .test_renewal import DEVELOPER, FP32, W8A16, reload

pytestmark = pytest.mark.server

NEAR = 1e-4
"""In nats a token: what orders of sums make is a fiftieth of it, and block FP8 moves a model by 0.05 and more."""

NO_IMAGES: dict[str, Any] = {"limit_mm_per_prompt": {"image": 0, "video": 0}}
SERVED = (
    "compressed-tensors `FP8_BLOCK`, bf16 scales",
    "compressed-tensors, experts",
    "ModelOpt, `hf_quant_config.json`",
    "ModelOpt, experts",
    "`fp8`, `model.visual` alone",
    "`fp8`, scales of a KV cache",
    "`fp8`, an output head in FP8",
    "`fp8`, a list that excludes what is FP8",
    "`fp8`, a list that forgets `in_proj_a` and `in_proj_b`",
)
BF16_ONLY = "qwen3_5"
"""vLLM's delta net on a CPU is for bf16: there the model's own rounding is what is seen."""


def test_forms_against_the_same_weights_dequantized(tmp_path: Path) -> None:
    made = write_forms(tmp_path)
    forms = {form: folder for form, folder in made.items() if form.said in SERVED}
    assert len(forms) == len(SERVED)
    runs: list[Run] = []
    for form, folder in forms.items():
        dtype = torch.bfloat16 if form.family == BF16_ONLY else torch.float32
        twin = folder.with_name(folder.name + "-twin")
        dequantize_checkpoint(folder, twin, dtype=dtype, progress=False)
        options = _options(form)
        ours = options | {
            "quantization": "ascend",
            "additional_config": {"qwen3_fp8_ascend": {"activation": "w8a16"}},
        }
        runs += [Run(str(folder), ours), Run(str(twin), options), Run(str(tmp_path / f"{form.family}-bf16"), options)]
    found = answers(runs, tmp_path)
    for number, form in enumerate(forms):
        ours, twin, master = (answer.logprobs for answer in found[3 * number : 3 * number + 3])
        near, fp8 = distance(ours, twin), distance(twin, master)
        print(f"\n{form.family}, {form.said}: {near:.7f} nats a token; block FP8 against bf16 {fp8:.4f}")
        assert fp8 > 0.04
        assert near < (fp8 / 3 if form.family == BF16_ONLY else NEAR)
    log = (tmp_path / "offline.log").read_text()
    assert log.count("scales of a quantized KV cache are ignored") == 1


def _options(form: Form) -> dict[str, Any]:
    options: dict[str, Any] = {"dtype": "bfloat16"} if form.family == BF16_ONLY else {}
    return options | (NO_IMAGES if form.family in ("qwen3_vl", "qwen3_5") else {})


def test_the_forms_are_in_the_table() -> None:
    assert set(SERVED) <= {form.said for form in FORMS}


def test_a_server_obeys_the_plan_and_renews_weights(start: Start, tmp_path: Path) -> None:
    """The plan travels to vLLM's processes: by its list alone, this compressed-tensors checkpoint would not load."""
    folders = [tmp_path / f"seed{seed}" for seed in (0, 1)]
    for seed, folder in enumerate(folders):
        master = write_qwen3(folder.with_name(folder.name + "-bf16"), seed)
        quantize_checkpoint(master, folder, container="compressed-tensors", progress=False)
        dequantize_checkpoint(folder, folder.with_name(folder.name + "-twin"), dtype=torch.float32, progress=False)
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"]["ignore"] = ["lm_head", "re:.*mlp.*"]
        (folder / "config.json").write_text(json.dumps(config))
    one, other = answers([Run(f"{folder}-twin") for folder in folders], tmp_path)
    server = start(folders[0], *ASCEND, EAGER, *FP32, *W8A16, **DEVELOPER)
    assert distance(prompt_logprobs(server), one.logprobs) < NEAR
    assert reload(server, folders[1]).status_code == 200
    assert distance(prompt_logprobs(server), other.logprobs) < NEAR
    assert distance(one.logprobs, other.logprobs) > 0.1
    assert "config.json excludes a module from quantization whose weight is FP8" in server.log.read_text()
