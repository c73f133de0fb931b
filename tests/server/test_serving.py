"""Real servers: `vllm serve ... --quantization ascend`, compared with the same weights served otherwise."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from qwen3_fp8_ascend.checkpoints.dequantize import dequantize_checkpoint
from qwen3_fp8_ascend.errors import BlockFp8Error
from qwen3_fp8_ascend.evaluate.answers import QUESTIONS, ask
from qwen3_fp8_ascend.testing.models import write_block_fp8_qwen3
from tests.support.logprobs import distance, transformers_logprobs

from .conftest import ASCEND, EAGER, Start

pytestmark = pytest.mark.server

W8A16 = ("--additional-config", json.dumps({"qwen3_fp8_ascend": {"activation": "w8a16"}}))

Run = Callable[..., np.ndarray]


def test_smollm2_speaks_english_through_the_compiled_model(start: Start, smollm2: Path) -> None:
    """Default settings: bf16, torch.compile, the automatic backend."""
    server = start(smollm2, *ASCEND)
    answer = ask(server.url, server.model, QUESTIONS[0])
    print(f"\n{answer.prompt} {answer.text}")
    assert answer.verdict == "passed", answer
    log = server.log.read_text()
    assert re.search(r"block FP8 on cpu: backend cpu \(\w+\); rejected: ", log)
    assert "enforce_eager=False" in log


def test_smollm2_log_probabilities(smollm2: Path, logprobs_of: Run) -> None:
    """The C++ kernels, through ragged merged shards and 30 layers, are where the specification is.

    W8A16, because re-quantized activations amplify any difference in rounding to the size of a code within a few
    layers, whoever computes them: `tests/test_model.py` measures that floor.
    """
    ours = logprobs_of(smollm2, *ASCEND, EAGER, *W8A16)
    compiled = logprobs_of(smollm2, *ASCEND, *W8A16)
    spec = transformers_logprobs(smollm2)
    fp8 = distance(spec, transformers_logprobs(smollm2.with_name("SmolLM2-135M-Instruct")))
    print(f"\nnats a token, {len(ours)} tokens: FP8 weights against the original {fp8:.4f};")
    print(f"  cpu against reference {distance(ours, spec):.7f}, compiled against eager {distance(compiled, ours):.7f}")
    assert 0.01 < fp8 < 0.3
    assert distance(ours, spec) < fp8 / 1000
    assert distance(compiled, ours) < fp8 / 1000


@pytest.fixture(scope="module")
def divisible_qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Qwen3 with heads that two ranks can share in whole blocks."""
    folder = tmp_path_factory.mktemp("divisible") / "qwen3"
    return write_block_fp8_qwen3(folder, num_attention_heads=8, num_key_value_heads=4)


def test_tiny_qwen3_log_probabilities(divisible_qwen3: Path, tmp_path: Path, logprobs_of: Run) -> None:
    """GQA and q/k norms; without activation quantization only the rounding of weights to bf16 is left."""
    dequantized = tmp_path / "dequantized"
    dequantize_checkpoint(divisible_qwen3, dequantized)
    weights_only = logprobs_of(divisible_qwen3, *ASCEND, EAGER, *W8A16)
    w8a8 = logprobs_of(divisible_qwen3, *ASCEND, EAGER)
    bf16_weights = transformers_logprobs(dequantized)
    near, far = distance(weights_only, bf16_weights), distance(w8a8, bf16_weights)
    print(f"\nnats a token, {len(w8a8)} tokens, against the same weights in bf16: w8a16 {near:.6f}, w8a8 {far:.6f}")
    assert near < 0.02
    assert near < far / 3 < 0.1


def test_two_ranks_give_what_one_gives(divisible_qwen3: Path, logprobs_of: Run) -> None:
    """W8A16, where two ranks differ in the order of sums only; W8A8 in tests/server/test_ranks.py.

    The model has 14 linears, each within FP32_REL_L2, and two layers of attention and norms in fp32.
    """
    options = (*ASCEND, EAGER, *W8A16)
    one = logprobs_of(divisible_qwen3, *options)
    two = logprobs_of(divisible_qwen3, *options, "--tensor-parallel-size", "2", VLLM_CPU_OMP_THREADS_BIND="0|1")
    print(f"\nnats a token between one and two ranks: {distance(one, two):.7f}")
    assert distance(one, two) < 1e-4


def test_a_bad_checkpoint_stops_the_server_with_the_reason(start: Start, tiny_qwen3: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in tiny_qwen3.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(BlockFp8Error, match=r"model\.safetensors") as stopped:
        start(broken, *ASCEND, EAGER)
    print(stopped.value)


def test_an_unknown_backend_stops_the_server_with_the_reason(start: Start, tiny_qwen3: Path) -> None:
    with pytest.raises(BlockFp8Error, match="unknown backend 'nonsense'"):
        start(tiny_qwen3, *ASCEND, EAGER, QWEN3_FP8_ASCEND_BACKEND="nonsense")
