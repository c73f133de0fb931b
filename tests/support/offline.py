"""Several models through vLLM's offline engine, one after the other in one process: no server.

`python -m tests.support.offline RUNS.json OUTPUT.json` is the process; `answers` forks it from one that has vLLM.
"""

from __future__ import annotations

import functools
import gc
import hashlib
import json
import sys
import traceback
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from qwen3_fp8_ascend.serving import serving_environment
from tests.support import preloaded
from tests.support.cpu_speculation import use_native_kernels
from tests.support.forked_spawn import fork_what_is_spawned
from tests.support.logprobs import TEXTS
from tests.support.quiet_waits import sleep_at_once

BUCKET = 7
"""Tensors that are pushed together."""
TOKENS = 12
"""How many tokens are generated after each text."""
LOGPROBS, EMBEDDINGS, SCORES = "logprobs", "embeddings", "scores"
KV_CACHE_BYTES = 256 << 20
"""Of each rank. vLLM fills it with zeros, so that a gigabyte costs as much as running the model does."""
MTP = "mtp"
"""vLLM's word for speculating with a layer of the checkpoint itself."""


DEFAULTS: Mapping[str, Any] = {
    "dtype": "float32",
    "max_model_len": 512,
    "enforce_eager": True,
    "kv_cache_memory_bytes": KV_CACHE_BYTES,
}


@dataclass(frozen=True)
class Run:
    """A model and how it is run: `DEFAULTS`, unless `options` (arguments of vLLM's LLM) say otherwise."""

    model: str
    options: dict[str, Any] = field(default_factory=dict)
    image: str | None = None
    """Text that is put before each prompt to show it an image of noise."""
    seed: int = 0
    """Of the images."""
    push: str | None = None
    """A checkpoint whose tensors are given to the live model's `load_weights` before the prompts, in several parts."""
    native_speculation: bool = False
    """Whether vLLM's native kernels for speculation are put where they are called (`cpu_speculation`)."""
    without_amx: bool = False
    """Whether vLLM is told that the processor has no AMX, without which it has no kernel for block FP8."""
    may_fail: bool = False
    """Whether an error is an answer."""
    asked: str = LOGPROBS
    """What the model is asked for: `LOGPROBS`, `EMBEDDINGS` or `SCORES`."""
    texts: Sequence[str] = TEXTS
    isa: str | None = None
    """The instruction set that the CPU backend's kernels are of, if not the best one."""


@dataclass(frozen=True)
class Answer:
    """Log-probabilities of all tokens of the texts but the first of each, and what greedy decoding adds to each text.

    logprobs: the embeddings of the texts, or the scores of all but the first for the first, of a model that is asked
        for these; it generates no tokens.
    counts: how many log-probabilities each text has.
    packed: a digest of every packed weight, by layer, on the first rank; of a draft model as `draft.<layer>`.
    drafted, accepted: tokens that were guessed, and that were right, where the run speculates.
    guesses: log-probabilities under the draft model of what it guessed, where it is a part of the checkpoint (MTP).
    error: why a run that may fail has failed.
    """

    logprobs: np.ndarray
    tokens: list[list[int]]
    packed: dict[str, str]
    counts: list[int] = field(default_factory=list)
    drafted: int = 0
    accepted: int = 0
    guesses: np.ndarray = field(default_factory=lambda: np.zeros(0))
    error: str = ""


def answers(runs: Sequence[Run], folder: Path, timeout: float = 600, **environment: str) -> list[Answer]:
    """Run them all; the log of the process is `folder`/offline.log.

    Raises:
        AssertionError: the process failed, as where a model was to be compiled and was not; with the end of its log.
    """
    given, made, log = (folder / name for name in ("runs.json", "answers.json", "offline.log"))
    given.write_text(json.dumps([asdict(run) for run in runs]))
    inherited = serving_environment(VLLM_ENABLE_V1_MULTIPROCESSING="0", **environment)
    inherited.pop("VLLM_CPU_KVCACHE_SPACE", None)  # whole gigabytes, which would win over the option
    template = preloaded.shared()
    status = template.run(__name__, str(given), str(made), environment=inherited, log=log, timeout=timeout)
    assert status == 0, log.read_text()[-4000:]
    return [
        Answer(**one | {key: np.array(one.get(key, [])) for key in ("logprobs", "guesses")})
        for one in json.loads(made.read_text())
    ]


def main(given: str, made: str) -> None:
    runs = [Run(**run) for run in json.loads(Path(given).read_text())]
    ranks = any("parallel_size" in option for run in runs for option in run.options)
    if ranks:
        sleep_at_once()
    with fork_what_is_spawned() if ranks else nullcontext():
        Path(made).write_text(json.dumps([_answer(run) for run in runs]))


def _answer(run: Run) -> dict[str, Any]:
    from vllm.distributed import cleanup_dist_env_and_memory

    try:
        return ask(run)
    except Exception as error:
        if not run.may_fail:
            raise
        traceback.print_exc()
        return NOTHING | {"packed": {}, "error": f"{type(error).__name__}: {error}"}
    finally:
        gc.collect()
        with patch.object(gc, "unfreeze"):  # else it would look through all that is imported (`preloaded`)
            cleanup_dist_env_and_memory()


def ask(run: Run) -> dict[str, Any]:
    import torch
    from torch._dynamo.utils import counters
    from vllm import LLM
    from vllm.model_executor.models import registry

    options = {**DEFAULTS, **run.options}
    counters.clear()
    if run.native_speculation:
        use_native_kernels()
    # vLLM looks at a model's class in a new process, lest CUDA be initialized in this one: there is no CUDA.
    inspected_here = patch.object(registry, "_run_in_subprocess", lambda look: look())
    amx = patch.object(torch.cpu, "_is_amx_tile_supported", lambda: False) if run.without_amx else nullcontext()
    with inspected_here, amx:
        llm = LLM(run.model, **options)
    if run.push is not None:
        llm.apply_model(functools.partial(_push, run.push))
    speculation = run.options.get("speculative_config", {})
    if speculation.get("method") == MTP:
        llm.collective_rpc(_watch_draft)
    if run.isa is not None:
        llm.apply_model(functools.partial(_set_isa, run.isa))
    made = ASK[run.asked](llm, run)
    graphs = min(llm.collective_rpc(_count_graphs))
    assert graphs or options["enforce_eager"], f"{options}: the model was to be compiled, and Dynamo made no graph"
    packed, *_ = llm.apply_model(_digests)  # the first rank's
    if speculation:
        ((draft, guesses), *_) = llm.collective_rpc(_draft)
        packed |= {f"draft.{name}": digest for name, digest in draft.items()}
        made |= {"guesses": guesses}
    if llm.llm_engine.vllm_config.parallel_config.world_size > 1:
        llm.llm_engine.model_executor.shutdown()  # ranks that wait for their engine do so in a busy loop
    return made | {"packed": packed}


def _count_graphs(worker: Any) -> int:
    """How many graphs Dynamo has made in this process since the run began."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


def _watch_draft(worker: Any) -> None:
    """Keep what a draft model says of each of its guesses."""
    draft = worker.model_runner.drafter.model
    compute, draft.guesses = draft.compute_logits, []

    def watched(*arguments: Any, **options: Any) -> Any:
        logits = compute(*arguments, **options)
        draft.guesses += logits.double().log_softmax(-1).amax(-1).tolist()
        return logits

    draft.compute_logits = watched


def _draft(worker: Any) -> tuple[dict[str, str], list[float]]:
    """Digests of a draft model's packed weights, and its guesses' log-probabilities if they were kept."""
    draft = getattr(worker.model_runner.drafter, "model", None)
    return ({}, []) if draft is None else (_digests(draft), getattr(draft, "guesses", []))


def _ask_for_logprobs(llm: Any, run: Run) -> dict[str, Any]:
    from vllm import SamplingParams

    prompt_logprobs = None if "speculative_config" in run.options else 0  # vLLM does not give them then
    sampling = SamplingParams(temperature=0, max_tokens=TOKENS, prompt_logprobs=prompt_logprobs, ignore_eos=True)
    outputs = llm.generate([_prompt(text, run) for text in run.texts], sampling, use_tqdm=False)
    counts = {metric.name.rpartition("spec_decode_num_")[2]: getattr(metric, "value", 0) for metric in _metrics(llm)}
    entries = [(out.prompt_logprobs or ())[1:] for out in outputs]
    return {
        "logprobs": [next(iter(entry.values())).logprob for of_text in entries for entry in of_text],
        "counts": [len(of_text) for of_text in entries],
        "tokens": [list(out.outputs[0].token_ids) for out in outputs],
        "drafted": counts.get("draft_tokens", 0),
        "accepted": counts.get("accepted_tokens", 0),
    }


def _metrics(llm: Any) -> list[Any]:
    return llm.get_metrics() if llm.llm_engine.log_stats else []


def _ask_for_embeddings(llm: Any, run: Run) -> dict[str, Any]:
    outputs = llm.embed(list(run.texts), use_tqdm=False)
    return {"logprobs": [x for out in outputs for x in out.outputs.embedding], "tokens": []}


def _ask_for_scores(llm: Any, run: Run) -> dict[str, Any]:
    outputs = llm.score(run.texts[0], list(run.texts[1:]), use_tqdm=False)
    return {"logprobs": [out.outputs.score for out in outputs], "tokens": []}


NOTHING: dict[str, Any] = {"logprobs": [], "tokens": []}
ASK = {LOGPROBS: _ask_for_logprobs, EMBEDDINGS: _ask_for_embeddings, SCORES: _ask_for_scores}


def _push(folder: str, model: Any) -> None:
    """As trainers do: no tensor's place is known to them, and buckets end anywhere.

    Routers stay, and so does the head in effect: on a CPU vLLM itself lays bf16 linears out once and for all.
    """
    from safetensors.torch import load_file

    tensors = [item for item in load_file(Path(folder) / "model.safetensors").items() if ".mlp.gate." not in item[0]]
    for first in range(0, len(tensors), BUCKET):
        model.load_weights(iter(tensors[first : first + BUCKET]))


def _set_isa(name: str, model: Any) -> None:
    from qwen3_fp8_ascend.backends import cpu

    cpu.set_isa(name)


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
