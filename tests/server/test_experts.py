"""Mixtures of experts through vLLM: real text that must be a dense model's, families against the same weights in fp32.

Weights only (W8A16) and in fp32 unless said otherwise: quantized activations amplify any difference in rounding.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen3_fp8_ascend.backends import cpu
from qwen3_fp8_ascend.checkpoints.dequantize import dequantize_checkpoint
from qwen3_fp8_ascend.checkpoints.quantize import quantize_checkpoint
from qwen3_fp8_ascend.evaluate.precision.prompts import all_prompts
from scripts.upcycling import write_copied_experts, write_sliced_experts
from tests.support.cpu_levels import lacking
from tests.support.expert_models import FAMILIES, write_experts
from tests.support.logprobs import distance, prompt_logprobs, stock_logprobs
from tests.support.noise import FALSE_ALARMS, rank_sum_probability
from tests.support.offline import Run, answers
from tests.support.padded_heads import write_with_more_heads
from tests.support.step_models import step_logprobs, write_step

from .conftest import ASCEND, EAGER, TRACED, Start
from .test_ranks import TWO_CORES, distances
from .test_renewal import DEVELOPER, reload

pytestmark = pytest.mark.server

SETTINGS = {"qwen3_fp8_ascend": {"activation": "w8a16"}}
W8A8: dict[str, Any] = {"quantization": "ascend"}
W8A16 = W8A8 | {"additional_config": SETTINGS}
EXPERT_PARALLEL = ("--tensor-parallel-size", "2", "--enable-expert-parallel")
NEAR = 1e-4
"""In nats a token. Orders of sums move a model by a fiftieth of it; block FP8 moves it by a thousand times as much."""


def test_upcycled_models_answer_as_the_dense_one(
    smollm2: Path, smollm2_experts: dict[str, Path], tmp_path: Path
) -> None:
    """The same codes and scales in another order, so even the text is the same, and what is left is the order of sums.

    With activations quantized too, each model is as far from the unquantized one as the dense one is, so that two are
    at most twice that apart, here given twice the room. A wrong expert is ten times as far; the long form ranks noise.
    """
    models = {"dense": smollm2, **smollm2_experts}
    runs = [Run(str(model), options) for options in (W8A16, W8A8) for model in models.values()]
    made = answers(runs, tmp_path)
    weights_only, w8a8 = (dict(zip(models, part, strict=True)) for part in (made[:3], made[3:]))
    quantizing = distance(w8a8["dense"].logprobs, weights_only["dense"].logprobs)
    print(f"\nnats a token, {len(made[0].logprobs)} tokens; activations quantized or not, dense: {quantizing:.4f}")
    for form in smollm2_experts:
        near = distance(weights_only[form].logprobs, weights_only["dense"].logprobs)
        far = distance(w8a8[form].logprobs, w8a8["dense"].logprobs)
        print(f"  {form} against dense: w8a16 {near:.7f}, w8a8 {far:.4f}")
        assert near < NEAR
        assert weights_only[form].tokens == weights_only["dense"].tokens
        assert far < 4 * quantizing


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small random model of each family in block FP8; its bf16 master is beside it."""
    folder = tmp_path_factory.mktemp("families")
    return {family: write_experts(folder / family, family) for family in FAMILIES}


BF16 = {"dtype": "bfloat16"}
BF16_ONLY = "qwen3_next"
"""vLLM's delta net on a CPU is for bf16: there the model's own rounding is what is seen."""

VLLM_JUDGES = ("deepseek_v3", "llama4_text", "gemma4_text")
"""vLLM's own of the same weights is asked: it and transformers compute this small DeepSeek differently, in bf16 too,
and transformers does not read experts of Llama 4 and Gemma 4 one by one."""


def test_families_against_the_same_weights_dequantized(families: dict[str, Path], tmp_path: Path) -> None:
    """DeepSeek with plain attention, since what vLLM has for its latent one depends on the processor."""
    twins = {family: tmp_path / family for family in families}
    for family, folder in families.items():
        dequantize_checkpoint(folder, twins[family], dtype=torch.float32, progress=False)
    runs = [Run(str(folder), W8A16 | _dtype(family)) for family, folder in families.items()]
    judged = [path for family in VLLM_JUDGES for path in (twins[family], _master(families[family]))]
    made = answers([*runs, *(Run(str(path)) for path in judged)], tmp_path, VLLM_MLA_DISABLE="1")
    ours = {family: answer.logprobs for family, answer in zip(families, made, strict=False)}
    vllm = {path: answer.logprobs for path, answer in zip(judged, made[len(runs) :], strict=True)}
    for family, folder in families.items():
        expected, master = (
            vllm[path] if path in vllm else stock_logprobs(path) for path in (twins[family], _master(folder))
        )
        near, fp8 = distance(ours[family], expected), distance(master, expected)
        print(f"\n{family}, nats a token against the same weights: {near:.7f}; block FP8 against bf16 {fp8:.4f}")
        assert fp8 > 0.05
        assert near < (fp8 / 4 if family == BF16_ONLY else NEAR)


def test_bounded_experts_in_stacked_tensors(tmp_path: Path) -> None:
    """Step-3.5, for whose bf16 experts vLLM has nothing on a CPU: against transformers with the same weights."""
    master, fp8, twin = write_step(tmp_path / "master"), tmp_path / "fp8", tmp_path / "twin"
    quantize_checkpoint(master, fp8, progress=False)
    dequantize_checkpoint(fp8, twin, dtype=torch.float32, progress=False)
    (ours,) = answers([Run(str(fp8), W8A16)], tmp_path)
    expected = step_logprobs(master, twin)
    near, bound = distance(ours.logprobs, expected), distance(step_logprobs(master, twin, limits=None), expected)
    quantizing = distance(step_logprobs(master, master), expected)
    print(f"\nnats a token against the same weights: {near:.7f}; bounds {bound:.4f}, block FP8 {quantizing:.4f}")
    assert near < NEAR < bound / 10 and quantizing > 0.05


@pytest.mark.long
@pytest.mark.parametrize("family", ["qwen2_moe", "minimax_m2"])
def test_families_compiled(families: dict[str, Path], tmp_path: Path, family: str) -> None:
    """Shared experts, and experts that are chosen here; the short suite traces experts for two ranks, below."""
    runs = [Run(str(families[family]), W8A16 | {"enforce_eager": eager}) for eager in (True, False)]
    eager, compiled = (answer.logprobs for answer in answers(runs, tmp_path))
    assert distance(compiled, eager) < NEAR


def _dtype(family: str) -> dict[str, Any]:
    return BF16 if family == BF16_ONLY else {}


def _master(folder: Path) -> Path:
    return folder.with_name(folder.name.removesuffix("-fp8"))


def test_expert_parallel_ranks_give_what_one_process_gives(start_forked: Start, tmp_path: Path) -> None:
    """A server of two ranks, each with half of the experts, traced, against eager processes without a server.

    It is then given other weights, and at last bad ones, which are named.
    """
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4}  # whole blocks for both ranks
    folders = [write_experts(tmp_path / f"seed{seed}", "qwen3_moe", seed, **heads) for seed in (0, 1)]
    one, other = (answer.logprobs for answer in answers([Run(str(f), W8A16) for f in folders], tmp_path))
    options = (*ASCEND, "--dtype", "float32", "--additional-config", json.dumps(SETTINGS), *EXPERT_PARALLEL)
    server = start_forked(folders[0], *options, **TWO_CORES, **DEVELOPER, **TRACED)
    two = prompt_logprobs(server)
    assert reload(server, folders[1]).status_code == 200
    renewed = prompt_logprobs(server)
    print(
        f"\nnats a token between one and two ranks: {distance(two, one):.7f}, reloaded {distance(renewed, other):.7f}"
    )
    assert distance(one, other) > 0.1
    assert distance(two, one) < NEAR
    assert distance(renewed, other) < NEAR
    name = "model.layers.1.mlp.experts.6.up_proj.weight"  # the second rank's
    tensors = load_file(folders[0] / "model.safetensors")
    tensors[name].view(torch.uint8)[3, 5] = 0x7F
    save_file(tensors, folders[0] / "model.safetensors", {"format": "pt"})
    refused = reload(server, folders[0])
    assert refused.status_code == 500 and "holds NaN codes" in refused.text and name in refused.text


WRITE_DIVISIBLE = {"copied": write_copied_experts, "sliced": functools.partial(write_sliced_experts, family="glm4_moe")}
"""Each form in a family that lets attention have any number of heads; Qwen2-MoE's head size follows from it."""


@pytest.mark.long
@pytest.mark.parametrize("mode", ["eager", "compiled"])
@pytest.mark.parametrize("form", WRITE_DIVISIBLE)
def test_upcycled_smollm2_in_two_processes(
    smollm2: Path, tmp_path: Path, logprobs_of: Callable[..., np.ndarray], form: str, mode: str
) -> None:
    """Experts divided among two ranks against the dense model in one; its nine heads are made twelve first."""
    original = smollm2.with_name("SmolLM2-135M-Instruct")
    padded = write_with_more_heads(original, tmp_path / "padded", heads=12, kv_heads=4)
    experts = tmp_path / "fp8"
    quantize_checkpoint(WRITE_DIVISIBLE[form](padded, tmp_path / "experts"), experts, progress=False)
    options = (*ASCEND, "--additional-config", json.dumps(SETTINGS), *((EAGER,) if mode == "eager" else ()))
    dense = logprobs_of(smollm2, *options)
    two = logprobs_of(experts, *options, *EXPERT_PARALLEL, **TWO_CORES)
    print(f"\n{form}, {mode}, nats a token, two ranks of experts against one dense process: {distance(two, dense):.7f}")
    assert distance(two, dense) < NEAR


@pytest.mark.long
def test_upcycled_smollm2_at_the_noise_floor(smollm2: Path, smollm2_experts: dict[str, Path], tmp_path: Path) -> None:
    """W8A8, where only the noise tells: how far the dense model moves when its sums are added up in other orders.

    Experts that have each other's down projection are told from noise.
    """
    isas = [isa for isa in cpu.ISAS if lacking(isa) is None and isa != cpu.isa()]
    if len(isas) < 2:
        pytest.skip(f"too few orders of sums to tell a fault from: {', '.join(isas)} beside {cpu.isa()}")
    models = {**smollm2_experts, "mixed up": write_mixed_up(smollm2_experts["copied"], tmp_path / "mixed-up")}
    texts = all_prompts()
    runs = [Run(str(model), W8A8, texts=texts) for model in (smollm2, *models.values())]
    draws = [Run(str(smollm2), W8A8, texts=texts, isa=isa) for isa in isas]
    dense, *others = answers([*runs, *draws], tmp_path, timeout=1500)
    per_text = [np.split(answer.logprobs, np.cumsum(answer.counts)[:-1]) for answer in (dense, *others)]
    moved = [distances(texts, per_text[0]) for texts in per_text[1:]]
    noise = np.stack(moved[len(models) :], axis=1)
    as_noise = {name: rank_sum_probability(values, noise) for name, values in zip(models, moved, strict=False)}
    print(f"\nnats a token, {len(dense.logprobs)} tokens; dense with {', '.join(isas)}: {noise.mean(0)};", end=" ")
    print(", ".join(f"{name} {values.mean():.4f}" for name, values in zip(models, moved, strict=False)))
    print(f"  the probability that noise ranks as high: {as_noise}")
    assert min(as_noise[form] for form in smollm2_experts) > FALSE_ALARMS
    assert as_noise["mixed up"] < FALSE_ALARMS


def write_mixed_up(copied: Path, folder: Path) -> Path:
    """The upcycled model in which two experts of each layer have each other's down projection."""
    shutil.copytree(copied, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = load_file(copied / "model.safetensors")
    for name in [name for name in tensors if ".experts.0.w2." in name]:
        other = name.replace(".experts.0.", ".experts.1.")
        tensors[name], tensors[other] = tensors[other], tensors[name]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder
