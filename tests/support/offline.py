"""Several models through vLLM's offline engine, one after the other in one process: no server, vLLM imported once.

`python -m tests.support.offline RUNS.json OUTPUT.json` is the process; `answers` starts it.
"""

from __future__ import annotations

import functools
import gc
import hashlib
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from qwen3_fp8_ascend.serving import serving_environment
from tests.support.logprobs import TEXTS

ROOT = Path(__file__).parent.parent.parent
BUCKET = 7
"""Tensors that are pushed together."""
TOKENS = 12
"""How many tokens are generated after each text."""


@dataclass(frozen=True)
class Run:
    """A model and how it is run: in fp32 and eagerly, unless `options` (arguments of vLLM's LLM) say otherwise."""

    model: str
    options: dict[str, Any] = field(default_factory=dict)
    image: str | None = None
    """Text that is put before each prompt to show it an image of noise."""
    seed: int = 0
    """Of the images."""
    push: str | None = None
    """A checkpoint whose tensors are given to the live model's `load_weights` before the prompts, in several parts."""


@dataclass(frozen=True)
class Answer:
    """Log-probabilities of all tokens of `TEXTS` but the first of each, and what greedy decoding adds to each text.

    packed: a digest of every packed weight, by layer, on the first rank.
    """

    logprobs: np.ndarray
    tokens: list[list[int]]
    packed: dict[str, str]


def answers(runs: Sequence[Run], folder: Path, timeout: float = 600, **environment: str) -> list[Answer]:
    """Run them all; the log of the process is `folder`/offline.log.

    Raises:
        AssertionError: the process failed; with the end of its log.
    """
    given, made, log = (folder / name for name in ("runs.json", "answers.json", "offline.log"))
    given.write_text(json.dumps([asdict(run) for run in runs]))
    command = [sys.executable, "-m", "tests.support.offline", str(given), str(made)]
    inherited = serving_environment(VLLM_ENABLE_V1_MULTIPROCESSING="0", **environment)
    with log.open("w") as file:
        done = subprocess.run(
            command, cwd=ROOT, env=inherited, stdout=file, stderr=subprocess.STDOUT, timeout=timeout, check=False
        )
    assert done.returncode == 0, log.read_text()[-4000:]
    return [Answer(**one | {"logprobs": np.array(one["logprobs"])}) for one in json.loads(made.read_text())]


def main(given: str, made: str) -> None:
    runs = [Run(**run) for run in json.loads(Path(given).read_text())]
    Path(made).write_text(json.dumps([ask(run) for run in runs]))


def ask(run: Run) -> dict[str, Any]:
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    options: dict[str, Any] = {"dtype": "float32", "max_model_len": 512, "enforce_eager": True} | run.options
    llm = LLM(run.model, **options)
    if run.push is not None:
        llm.apply_model(functools.partial(_push, run.push))
    sampling = SamplingParams(temperature=0, max_tokens=TOKENS, prompt_logprobs=0, ignore_eos=True)
    outputs = llm.generate([_prompt(text, run) for text in TEXTS], sampling, use_tqdm=False)
    logprobs = [next(iter(entry.values())).logprob for out in outputs for entry in out.prompt_logprobs[1:]]
    tokens = [list(out.outputs[0].token_ids) for out in outputs]
    packed, *_ = llm.apply_model(_digests)  # the first rank's
    del llm, outputs
    cleanup_dist_env_and_memory()
    gc.collect()
    return {"logprobs": logprobs, "tokens": tokens, "packed": packed}


def _push(folder: str, model: Any) -> None:
    """As trainers do: no tensor's place is known to them, and buckets end anywhere.

    Routers stay, and so does the head in effect: on a CPU vLLM itself lays bf16 linears out once and for all.
    """
    from safetensors.torch import load_file

    tensors = [item for item in load_file(Path(folder) / "model.safetensors").items() if ".mlp.gate." not in item[0]]
    for first in range(0, len(tensors), BUCKET):
        model.load_weights(iter(tensors[first : first + BUCKET]))


def _digests(model: Any) -> dict[str, str]:
    import torch

    found = {}
    for name, layer in model.named_modules():
        for attribute in ("packed_weight", "packed_w13_weight", "packed_w2_weight"):
            if (packed := getattr(layer, attribute, None)) is not None:
                content = b"".join(t.contiguous().view(torch.uint8).numpy().tobytes() for t in packed.tensors)
                found[f"{name}.{attribute}"] = hashlib.sha256(content).hexdigest()
    return found


def _prompt(text: str, run: Run) -> Any:
    if run.image is None:
        return text
    from PIL import Image

    pixels = np.random.default_rng(run.seed).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    return {"prompt": run.image + text, "multi_modal_data": {"image": Image.fromarray(pixels)}}


if __name__ == "__main__":
    main(*sys.argv[1:])
