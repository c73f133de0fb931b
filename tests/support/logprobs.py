"""Teacher-forced log-probabilities from a running server or from transformers, and how far two runs are apart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qwen3_fp8_ascend.errors import BlockFp8Error
from qwen3_fp8_ascend.evaluate.precision.direct import encode, load_model
from qwen3_fp8_ascend.format import Activation
from qwen3_fp8_ascend.serving import Server

TEXTS = (
    "The future of AI is increasingly intertwined with advances in machine learning, natural language processing, "
    "and robotics. As these technologies continue to evolve, systems become more capable and more autonomous.",
    "If a train travels 120 km in 2 hours, its average speed is the distance divided by the time: 60 km per hour.",
    "def fibonacci(n):\n    a, b = 0, 1\n    for _ in range(n):\n        a, b = b, a + b\n    return a\n",
    "Water boils at 100 degrees Celsius at sea level. At the top of a high mountain the pressure is lower, and so "
    "it boils at a lower temperature, which is why cooking takes longer there.",
)


def text_logprobs(server: Server, texts: Sequence[str] = TEXTS) -> list[np.ndarray]:
    """Log-probability of every token but the first of each text.

    Shapes: -> (tokens of the text,) float64 each.
    """
    out = []
    for text in texts:
        body = {"model": server.model, "prompt": text, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
        entries = server.post("/v1/completions", body)["choices"][0]["prompt_logprobs"][1:]
        out.append(np.array([next(iter(entry.values()))["logprob"] for entry in entries]))
    return out


def prompt_logprobs(server: Server, texts: Sequence[str] = TEXTS) -> np.ndarray:
    """The same, one text after the other. Shapes: -> (tokens,) float64."""
    return np.concatenate(text_logprobs(server, texts))


def transformers_logprobs(
    folder: Path, texts: Sequence[str] = TEXTS, activation: Activation = Activation.W8A16
) -> np.ndarray:
    """The same from transformers in fp32: block-FP8 linears by the specification.

    Nothing of vLLM and none of the kernels is in it.
    """
    return logprobs_of(folder, load_model(folder, "reference", activation, torch.float32, "cpu"), texts)


def stock_logprobs(folder: Path, texts: Sequence[str] = TEXTS) -> np.ndarray:
    """The same of a model that is not quantized, as transformers itself loads it: with its own layers of experts."""
    from transformers import AutoModelForCausalLM

    return logprobs_of(folder, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), texts)


def logprobs_of(folder: Path, model: Any, texts: Sequence[str] = TEXTS) -> np.ndarray:
    """The same from a model of transformers, by the folder's tokenizer."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    out = []
    with torch.inference_mode():
        for text in texts:
            ids = encode(tokenizer, text, model)
            logprobs = model(ids).logits[0, :-1].double().log_softmax(-1)
            out.append(logprobs.gather(1, ids[0, 1:, None])[:, 0].numpy())
    return np.concatenate(out)


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Mean absolute difference of log-probabilities, in nats a token."""
    if a.shape != b.shape:
        raise BlockFp8Error("the runs are not of the same tokens", expected=a.shape, got=b.shape)
    return float(np.abs(a - b).mean())
