"""Two processes share a model: tensor-parallel and pipeline-parallel ranks give what one process gives.

Runs are compared in fp32. W8A16 shows what splitting changes by itself: the order of sums. W8A8 quantizes
activations again in every layer and so amplifies that to its noise floor: how far one process moves when only its
order of sums changes, which is measured here with the specification as backend and with other instruction sets.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen3_fp8_ascend.backends import cpu
from qwen3_fp8_ascend.checkpoints.quantize import quantize_checkpoint
from qwen3_fp8_ascend.errors import BlockFp8Error
from qwen3_fp8_ascend.evaluate.precision.prompts import all_prompts
from qwen3_fp8_ascend.testing.models import write_block_fp8_qwen3
from tests.support.cpu_levels import lacking
from tests.support.expert_models import write_experts
from tests.support.logprobs import distance
from tests.support.noise import FALSE_ALARMS, rank_sum_probability
from tests.support.offline import Run as OfflineRun
from tests.support.offline import answers
from tests.support.padded_heads import write_with_more_heads

from .conftest import ASCEND, EAGER, TRACED, Start

pytestmark = pytest.mark.server

Run = Callable[..., list[np.ndarray]]

ACTIVATION = {
    "w8a16": ("--additional-config", json.dumps({"qwen3_fp8_ascend": {"activation": "w8a16"}})),
    "w8a8": (),
}
SPLIT = {
    "two ranks": ((EAGER,), ("--tensor-parallel-size", "2")),
    "two stages": ((), ("--pipeline-parallel-size", "2")),
}
"""How a model is served in both runs, and how it is split in one of them.

vLLM's CPU runner has pipeline stages only with torch.compile, which fuses norms and activations and so rounds otherwise
than eager execution: compiled stages are compared with one compiled process.
"""
NEAR = 1e-4
"""Largest distance without activation quantization, in nats a token; FP8 weights against bf16 ones are 0.14 apart."""
DRAWS = {"the specification": {"QWEN3_FP8_ASCEND_BACKEND": "reference"}} | {
    isa: {cpu.ENVIRONMENT_VARIABLE: isa} for isa in cpu.ISAS if lacking(isa) is None and isa != cpu.isa()
}
"""Ways to add up the same sums in one process; how far each moves the result is a draw of noise."""
CUT_BLOCKS = {"num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 320}
"""A shape of which two ranks have 1.5 blocks of query rows and o columns, 0.5 of keys and of values, 1.25 of an MLP."""
CUT_EXPERTS: dict[str, Any] = {"family": "qwen3_moe", "moe_intermediate_size": 320}
"""Two ranks have 160 channels of each expert: 1.25 blocks, of which one is shared."""
TWO_CORES = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}


@pytest.fixture(scope="session")
def smollm2_12_heads(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2's own weights with 12 heads of which 3 contribute nothing, in block FP8."""
    folder = tmp_path_factory.mktemp("heads")
    original = smollm2.with_name("SmolLM2-135M-Instruct")
    padded = write_with_more_heads(original, folder / "bf16", heads=12, kv_heads=4)
    quantize_checkpoint(padded, folder / "fp8", progress=False)
    return folder / "fp8"


@pytest.fixture(scope="session")
def qwen3_8b_slice(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of Qwen3-8B's shape with random weights."""
    return write_block_fp8_qwen3(
        tmp_path_factory.mktemp("slice") / "qwen3",
        hidden_size=4096,
        intermediate_size=12288,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
    )


@pytest.mark.long
@pytest.mark.parametrize("activation", ACTIVATION)
def test_smollm2_in_two_processes(
    smollm2: Path, smollm2_12_heads: Path, text_logprobs_of: Run, activation: str
) -> None:
    original = np.concatenate(text_logprobs_of(smollm2, *ASCEND, EAGER, *ACTIVATION[activation], texts=all_prompts()))
    one = compare_one_with_two(smollm2_12_heads, text_logprobs_of, activation)
    print(f"  three heads of zeros {distance(one, original):.2e}")
    assert distance(one, original) == 0


@pytest.mark.long
@pytest.mark.parametrize("activation", ACTIVATION)
def test_qwen3_8b_slice_in_two_processes(qwen3_8b_slice: Path, text_logprobs_of: Run, activation: str) -> None:
    compare_one_with_two(qwen3_8b_slice, text_logprobs_of, activation)


@pytest.mark.long
@pytest.mark.parametrize("activation", ACTIVATION)
def test_cut_blocks_in_two_processes(tmp_path: Path, text_logprobs_of: Run, activation: str) -> None:
    compare_one_with_two(write_block_fp8_qwen3(tmp_path / "cut" / "qwen3", **CUT_BLOCKS), text_logprobs_of, activation)


@pytest.mark.long
@pytest.mark.parametrize("activation", ACTIVATION)
def test_cut_experts_in_two_processes(tmp_path: Path, text_logprobs_of: Run, activation: str) -> None:
    compare_one_with_two(write_experts(tmp_path / "cut" / "qwen3_moe", **CUT_EXPERTS), text_logprobs_of, activation)


def compare_one_with_two(model: Path, logprobs_of: Run, activation: str) -> np.ndarray:
    """Serve a model in one process and in two, and judge the distance. Returns what one eager process gives."""
    options = (*ASCEND, *ACTIVATION[activation])

    def run(*arguments: str, **environment: str) -> list[np.ndarray]:
        return logprobs_of(model, *options, *arguments, texts=all_prompts(), **environment)

    eager = run(EAGER)
    print(f"\n{model.parent.name}, {activation}, nats a token, {sum(map(len, eager))} tokens, against one process:")
    noise = []
    if activation == "w8a8":
        for draw, change in DRAWS.items():
            noise.append(distances(run(EAGER, **change), eager))
            print(f"  one process that adds up as {draw} {noise[-1].mean():.2e}")
    for name, (mode, split) in SPLIT.items():
        one = eager if mode else run()
        moved = distances(run(*mode, *split, **TWO_CORES), one)
        print(f"  {name} {moved.mean():.2e}; one process {' '.join(mode) or 'compiled'} against eager", end=" ")
        print(f"{distances(one, eager).mean():.2e}")
        if activation == "w8a8":
            assert rank_sum_probability(moved, np.stack(noise, axis=1)) > FALSE_ALARMS
        else:
            assert moved.mean() <= NEAR
    return np.concatenate(eager)


def distances(a: list[np.ndarray], b: list[np.ndarray]) -> np.ndarray:
    """Of each text, in nats a token. Shapes: -> (texts,)."""
    return np.array([distance(one, other) for one, other in zip(a, b, strict=True)])


@pytest.mark.long
def test_eager_pipeline_stages_stop_the_server_with_the_reason(start: Start, tiny_qwen3: Path) -> None:
    """Otherwise vLLM says that it is healthy and dies of the first request."""
    with pytest.raises(BlockFp8Error, match="cannot run pipeline stages on a CPU"):
        start(tiny_qwen3, *ASCEND, EAGER, "--pipeline-parallel-size", "2", **TWO_CORES)


EAGER_RANKS, TRACED_RANKS, COMPILED_RANKS = "eager", "traced", "compiled"
"""How the ranks of W8A8 run: operator by operator; as one graph of torch.compile whose operators run as they are, which
is where the exchange may be lost; and as what Inductor makes of that graph.
"""
COMPILED = pytest.param(COMPILED_RANKS, marks=pytest.mark.long)


@pytest.mark.parametrize("mode", [TRACED_RANKS, COMPILED])
def test_ranks_that_cut_through_blocks(tmp_path: Path, mode: str) -> None:
    """Rows of q, k, v, gate and up, and columns of o and down: two ranks have 1.5, 0.5 and 1.25 blocks each.

    Without the exchange W8A8 moves nearly as far as quantizing activations moves this model.
    """
    compare_offline(write_block_fp8_qwen3(tmp_path / "qwen3", **CUT_BLOCKS), tmp_path, mode)


@pytest.mark.parametrize("mode", [EAGER_RANKS, COMPILED])
def test_ranks_that_cut_through_blocks_of_experts(tmp_path: Path, mode: str) -> None:
    compare_offline(write_experts(tmp_path / "qwen3_moe", **CUT_EXPERTS), tmp_path, mode)


def compare_offline(folder: Path, tmp_path: Path, mode: str) -> None:
    """W8A16: the order of sums alone. W8A8: codes and scales are those of one process, because the ranks agree on the
    groups that both have part of; W8A8 runs in `mode` on both sides, since Inductor rounds norms elsewhere, which moved
    a model of experts by 0.07. What is left is noise: the long form ranks it.
    """
    w8a8 = {"quantization": "ascend", "enforce_eager": mode == EAGER_RANKS}
    w8a16 = {"quantization": "ascend", "additional_config": {"qwen3_fp8_ascend": {"activation": "w8a16"}}}
    ranks = {"tensor_parallel_size": 2}
    without_inductor = TRACED if mode == TRACED_RANKS else {}
    one = answers([OfflineRun(str(folder), o) for o in (w8a8, w8a16)], tmp_path, **without_inductor)
    split = (w8a8 | ranks, w8a16 | ranks)
    two = answers([OfflineRun(str(folder), o) for o in split], tmp_path, **TWO_CORES, **without_inductor)
    moved, exact = (distance(b.logprobs, a.logprobs) for a, b in zip(one, two, strict=True))
    quantizing = distance(one[0].logprobs, one[1].logprobs)
    print(f"\nnats a token between one and two ranks: w8a16 {exact:.7f}, w8a8 {mode} {moved:.6f};")
    print(f"  quantizing activations {quantizing:.4f}")
    assert exact < NEAR
    assert moved < quantizing / 4
