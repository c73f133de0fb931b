"""Speculative decoding with block-FP8 models, as far as vLLM's CPU build goes: the text stays what it is without.

Greedy decoding, so each token that is accepted is the target's own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.offline import Run, answers

from .test_experts import W8A8

pytestmark = pytest.mark.server

NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}


def speculating(model: Path, config: dict[str, Any], **changes: Any) -> Run:
    options = W8A8 | {"speculative_config": config, "disable_log_stats": False}
    return Run(str(model), options, **{"native_speculation": True} | changes)


def draft(model: Path, **changes: Any) -> dict[str, Any]:
    """A draft needs the flag itself: without, vLLM would serve it by its own means, or not at all."""
    return {
        "model": str(model),
        "method": "draft_model",
        "quantization": "ascend",
        "num_speculative_tokens": 1,
    } | changes


def test_what_is_accepted_is_what_the_target_says(tiny_qwen3: Path, other_qwen3: Path, tmp_path: Path) -> None:
    """A draft that is the target's double is always right, one of other weights is not; both are packed by us."""
    runs = {
        "as vLLM is": speculating(tiny_qwen3, NGRAM, native_speculation=False, may_fail=True),
        "plain": Run(str(tiny_qwen3), W8A8),
        "ngram": speculating(tiny_qwen3, NGRAM),
        "double": speculating(tiny_qwen3, draft(tiny_qwen3)),
        "other": speculating(tiny_qwen3, draft(other_qwen3)),
    }
    made = dict(zip(runs, answers(list(runs.values()), tmp_path), strict=True))
    for name, answer in made.items():
        print(f"\n{name}: {answer.accepted} of {answer.drafted} tokens accepted {answer.error}")
    assert "Cannot inspect kernel parameters" in made["as vLLM is"].error  # else the repair can go
    for name in ("ngram", "double", "other"):
        assert made[name].tokens == made["plain"].tokens
        assert made[name].drafted > 0
    assert made["ngram"].accepted > 0
    assert made["double"].accepted == made["double"].drafted
    assert made["other"].accepted < made["other"].drafted
    assert "loading drafter" in (tmp_path / "offline.log").read_text().lower()
