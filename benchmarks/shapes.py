"""Weight shapes (n, k) that are benchmarked, merged as vLLM merges them."""

from typing import NamedTuple

QWEN3_8B = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (24576, 4096), "down": (4096, 12288)}
"""One of Qwen3-8B's 36 layers."""

SMOLLM2_135M = {"qkv": (960, 576), "o": (576, 576), "gate_up": (3072, 576), "down": (576, 1536)}
"""One of SmolLM2-135M's 30 layers."""

MODELS = {"qwen3-8b": QWEN3_8B, "smollm2-135m": SMOLLM2_135M}

ROWS = (1, 2, 4, 8, 16, 32, 128, 512)
"""Tokens in a batch (m)."""


class ExpertsShape(NamedTuple):
    """A layer of experts."""

    hidden: int
    intermediate: int
    experts: int
    top_k: int


EXPERTS = {"qwen3-30b-a3b": ExpertsShape(2048, 768, 128, 8)}
"""Layers of experts, by model."""

EXPERT_ROWS = (1, 4, 16, 64, 256)
