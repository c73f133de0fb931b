"""Public forms of checkpoints through vLLM, against vLLM's own layers with the same weights dequantized.

Weights only (W8A16) and in fp32, since quantized activations amplify any difference in rounding.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen3_fp8_ascend.checkpoints.dequantize import dequantize_checkpoint
from qwen3_fp8_ascend.checkpoints.inspect import check_checkpoint
from qwen3_fp8_ascend.checkpoints.quantize import quantize_checkpoint
from qwen3_fp8_ascend.testing.models import write_qwen3
from tests.support.logprobs import distance, prompt_logprobs
from tests.support.measured_forms import Measured, measure
from tests.support.offline import LOGPROBS, Run, answers
from tests.support.public_forms import FORMS, RESULTS, Form, write_forms

from .conftest import ASCEND, EAGER, Start
from .test_renewal import DEVELOPER, FP32, W8A16, reload

pytestmark = pytest.mark.server

NEAR = 1e-4
"""In nats a token: what orders of sums make is a fiftieth of it, and block FP8 moves a model by 0.05 and more."""

AGAIN = (
    "compressed-tensors `FP8_BLOCK`, bf16 scales",
    "compressed-tensors, weights only",
    "ModelOpt, `hf_quant_config.json`",
    "ModelOpt, experts",
    "`fp8`, `model.visual` alone",
    "`fp8`, scales of a KV cache",
    "`fp8`, an output head in FP8",
    "`fp8`, a list that excludes what is FP8",
    "`fp8`, a list that forgets `in_proj_a` and `in_proj_b`",
    "`fp8`, as an embedding model",
    "`fp8`, as a reranker",
    "`fp8`, `--model-impl transformers`",
)
"""Forms that are measured again in every run of the tests, by what is said of them."""


NOT_RUN = {"mistral3"}
"""Models that vLLM did not start where the record was made; the table has its error."""


def check(form: Form, measured: Measured) -> None:
    """A thousandth of what block FP8 itself costs is far above rounding, and far below any wrong block or name."""
    assert measured.error == ""
    if form.asked == LOGPROBS:
        assert measured.cost > 0.04
    if measured.dtype == "float32":
        assert measured.distance < measured.cost / 1000
    else:
        assert measured.distance < measured.cost / 3


def test_some_forms_measured_again(tmp_path: Path) -> None:
    forms = {form: folder for form, folder in write_forms(tmp_path).items() if form.said in AGAIN}
    assert len(forms) == len(AGAIN)
    for form, measured in measure(forms, tmp_path).items():
        print(f"\n{form.family}, {form.said}: {measured}")
        check(form, measured)
    log = (tmp_path / "process0" / "offline.log").read_text()
    assert log.count("scales of a quantized KV cache are ignored") == 1
    assert "config.json quantizes weights alone" in log


def test_what_vllm_refuses_here_is_served_without_the_flag(tiny_qwen3: Path, tmp_path: Path) -> None:
    """On a processor without AMX, whatever this one is. In bf16, which vLLM's own FP8 wants."""
    bf16 = {"dtype": "bfloat16"}
    given: list[dict[str, Any]] = [bf16 | {"quantization": "fp8"}, bf16, bf16 | {"quantization": "ascend"}]
    refused, unasked, asked = answers(
        [Run(str(tiny_qwen3), options, without_amx=True, may_fail=True) for options in given], tmp_path
    )
    assert "Failed to find a kernel" in refused.error and "requires AMX tile support" in refused.error
    assert (unasked.error, asked.error) == ("", "")
    assert unasked.packed and unasked.packed == asked.packed
    assert unasked.tokens == asked.tokens
    assert (unasked.logprobs == asked.logprobs).all()
    assert "as with --quantization ascend" in (tmp_path / "offline.log").read_text()


@pytest.mark.parametrize("lost", ["lm_head.weight", "model.embed_tokens.weight"])
def test_a_lost_tensor_around_the_layers_ends_the_start(tiny_qwen3: Path, tmp_path: Path, lost: str) -> None:
    """vLLM would serve whatever is in memory there. `inspect` warns before."""
    folder = tmp_path / "damaged"
    shutil.copytree(tiny_qwen3, folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors[lost]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert [warning.severity for warning in check_checkpoint(folder).anomalies] == ["warning"]
    (refused,) = answers([Run(str(folder), {"quantization": "ascend"}, may_fail=True)], tmp_path)
    assert "a weight is missing from the checkpoint" in refused.error and f"where: {lost}" in refused.error


def test_what_is_recorded_is_as_near() -> None:
    """Of all forms; tests/checkpoints/test_public_forms.py holds the table to the record, and that to the forms."""
    forms = {(form.family, form.said): form for form in FORMS}
    recorded = json.loads(RESULTS.read_text())["forms"]
    assert len(recorded) > 30
    assert {row["model"] for row in recorded if row["error"]} == NOT_RUN
    for row in recorded:
        if row["error"]:
            continue
        check(forms[row["model"], row["form"]], Measured(row["distance"], row["cost"], row["dtype"], row["error"]))


def test_a_server_obeys_the_plan_and_renews_weights(start_forked: Start, tmp_path: Path) -> None:
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
    server = start_forked(folders[0], *ASCEND, EAGER, *FP32, *W8A16, **DEVELOPER)
    assert distance(prompt_logprobs(server), one.logprobs) < NEAR
    assert reload(server, folders[1]).status_code == 200
    assert distance(prompt_logprobs(server), other.logprobs) < NEAR
    assert distance(one.logprobs, other.logprobs) > 0.1
    assert "config.json excludes a module from quantization whose weight is FP8" in server.log.read_text()
