"""vLLM with `--quantization ascend`, compared with the same weights served otherwise; what stops a server."""

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen3_fp8_ascend.checkpoints.dequantize import dequantize_checkpoint
from qwen3_fp8_ascend.errors import BlockFp8Error
from qwen3_fp8_ascend.evaluate.answers import QUESTIONS, ask
from qwen3_fp8_ascend.serving import Server
from qwen3_fp8_ascend.testing.models import write_block_fp8_qwen3
from tests.support.logprobs import TEXTS, distance, transformers_logprobs
from tests.support.offline import Run, answers
from tests.support.quiet_waits import quiet_environment

from .conftest import ASCEND, EAGER, Start

pytestmark = pytest.mark.server

W8A8: dict[str, Any] = {"quantization": "ascend"}
W8A16 = W8A8 | {"additional_config": {"qwen3_fp8_ascend": {"activation": "w8a16"}}}
COMPILED = {"enforce_eager": False}


def test_default_settings_compile_the_model(start_forked: Start, tiny_qwen3: Path) -> None:
    """bf16, torch.compile, the automatic backend: a completion and its log-probabilities.

    What the compiled model computes is compared below.
    """
    server = start_forked(tiny_qwen3, *ASCEND)
    body = {"model": server.model, "prompt": TEXTS[0], "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    (choice,) = server.post("/v1/completions", body | {"logprobs": 1})["choices"]
    said = np.array(choice["logprobs"]["token_logprobs"])
    assert said.shape == (8,) and (said <= 0).all() and np.isfinite(said).all(), choice
    assert_default_settings(server)


@pytest.mark.long
def test_smollm2_speaks_english_through_the_compiled_model(start: Start, smollm2: Path, tmp_path: Path) -> None:
    """The same of `vllm serve` as it is typed, and of a model that has learnt something.

    The tutorial serves it eagerly in every run. Its engine sleeps while it waits: it would take a processor for as long
    as the worker compiles.
    """
    server = start(smollm2, *ASCEND, **quiet_environment(tmp_path))
    answer = ask(server.url, server.model, QUESTIONS[0])
    print(f"\n{answer.prompt} {answer.text}")
    assert answer.verdict == "passed", answer
    assert_default_settings(server)


def assert_default_settings(server: Server) -> None:
    log = server.log.read_text()
    assert "Failed to load plugin" not in log
    assert re.search(r"block FP8 on cpu: backend cpu \(\w+\); rejected: ", log)
    assert "enforce_eager=False" in log


def test_smollm2_log_probabilities(smollm2: Path, tmp_path: Path) -> None:
    """The C++ kernels, through ragged merged shards and 30 layers, are where the specification is.

    W8A16, because re-quantized activations amplify any difference in rounding to the size of a code within a few
    layers, whoever computes them: `tests/test_model.py` measures that floor.
    """
    (ours,) = (answer.logprobs for answer in answers([Run(str(smollm2), W8A16)], tmp_path))
    compare_with_the_specification(smollm2, ours)


@pytest.mark.long
def test_smollm2_log_probabilities_compiled(smollm2: Path, tmp_path: Path) -> None:
    runs = [Run(str(smollm2), W8A16), Run(str(smollm2), W8A16 | COMPILED)]
    ours, compiled = (answer.logprobs for answer in answers(runs, tmp_path))
    fp8 = compare_with_the_specification(smollm2, ours)
    print(f"  compiled against eager {distance(compiled, ours):.7f}")
    assert distance(compiled, ours) < fp8 / 1000


def compare_with_the_specification(smollm2: Path, ours: np.ndarray) -> float:
    """Returns how far block FP8 is from the original, in nats a token."""
    spec = transformers_logprobs(smollm2)
    fp8 = distance(spec, transformers_logprobs(smollm2.with_name("SmolLM2-135M-Instruct")))
    print(f"\nnats a token, {len(ours)} tokens: FP8 weights against the original {fp8:.4f};")
    print(f"  cpu against reference {distance(ours, spec):.7f}")
    assert 0.01 < fp8 < 0.3
    assert distance(ours, spec) < fp8 / 1000
    return fp8


def test_tiny_qwen3_log_probabilities(tmp_path: Path) -> None:
    """GQA and q/k norms; without activation quantization only the rounding of weights to bf16 is left.

    Compiled, W8A16 differs in the order of sums only; two ranks are in tests/server/test_ranks.py. The model has 14
    linears, each within FP32_REL_L2, and two layers of attention and norms in fp32.
    """
    model, dequantized = write_block_fp8_qwen3(tmp_path / "qwen3"), tmp_path / "dequantized"
    dequantize_checkpoint(model, dequantized)
    made = answers([Run(str(model), one) for one in (W8A16, W8A8, W8A16 | COMPILED)], tmp_path)
    weights_only, w8a8, compiled = (answer.logprobs for answer in made)
    bf16_weights = transformers_logprobs(dequantized)
    near, far = distance(weights_only, bf16_weights), distance(w8a8, bf16_weights)
    by_compiler = distance(compiled, weights_only)
    print(f"\nnats a token, {len(w8a8)} tokens, against the same weights in bf16: w8a16 {near:.6f}, w8a8 {far:.6f};")
    print(f"  compiled against eager {by_compiler:.7f}")
    assert near < 0.02
    assert near < far / 3 < 0.1
    assert by_compiler < 1e-4


def test_what_cannot_be_served_is_refused_before_weights_are_loaded(
    tiny_qwen3: Path, smollm2: Path, tmp_path: Path
) -> None:
    """A damaged file by us; by vLLM heads that two ranks cannot divide, and sleep, for which a CPU has no memory."""
    broken = tmp_path / "broken"
    shutil.copytree(tiny_qwen3, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    refused = {
        r"model\.safetensors": Run(str(broken), W8A8, may_fail=True),
        r"attention heads \(9\) must be divisible by tensor parallel size \(2\)": Run(
            str(smollm2), W8A8 | {"tensor_parallel_size": 2}, may_fail=True
        ),
        "Sleep mode is not supported on current platform": Run(
            str(tiny_qwen3), W8A8 | {"enable_sleep_mode": True}, may_fail=True
        ),
    }
    for said, answer in zip(refused, answers(list(refused.values()), tmp_path), strict=True):
        assert re.search(said, answer.error), (said, answer.error)
    assert "Starting to load model" not in (tmp_path / "offline.log").read_text()


def test_a_reason_in_a_worker_stops_the_server_with_it(start_forked: Start, tiny_qwen3: Path) -> None:
    """From the innermost process to the exception that `serve` raises."""
    with pytest.raises(BlockFp8Error, match="unknown backend 'nonsense'"):
        start_forked(tiny_qwen3, *ASCEND, EAGER, QWEN3_FP8_ASCEND_BACKEND="nonsense")
