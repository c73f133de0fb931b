"""A run: what one model on one machine made of the prompts. It is one safetensors file, so that it travels."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from qwen3_fp8_ascend.errors import BlockFp8Error
from qwen3_fp8_ascend.evaluate.precision.prompts import fingerprint
from qwen3_fp8_ascend.provenance import provenance
from qwen3_fp8_ascend.terminal import write_bytes

KEY = "qwen3_fp8_ascend.evaluate.precision_run"
VERSION = 1
TOP = 20
"""Most probable tokens kept of each position; vLLM's servers give as many unless told otherwise."""


@dataclass
class Run:
    """What was computed for each prompt token but the first, one prompt after the other.

    Shapes: ids (all tokens,) int64, lengths (prompts,) int64, logprobs (tokens,) fp32 of the text's own tokens, top_ids
        and top_logprobs (tokens, TOP) most probable first, greedy (prompts, steps) int64 the greedy continuation,
        logits (tokens, vocabulary) fp32 and layers (layers, tokens, hidden) fp32 or None.

    `facts` are those of `provenance`, and `device` (cpu, or the name of an NPU or GPU; "not said" of a server
    elsewhere); of a direct run also `backend`, `activation` and `dtype`.
    """

    name: str
    model: str
    prompts: list[str]
    ids: np.ndarray
    lengths: np.ndarray
    logprobs: np.ndarray
    top_ids: np.ndarray
    top_logprobs: np.ndarray
    greedy: np.ndarray
    logits: np.ndarray | None = None
    layers: np.ndarray | None = None
    facts: dict[str, Any] = field(default_factory=provenance)

    @property
    def tokens(self) -> int:
        return len(self.logprobs)


_ARRAYS = ("ids", "lengths", "logprobs", "top_ids", "top_logprobs", "greedy", "logits", "layers")


def save_run(run: Run, path: Path) -> None:
    """Write a run; the file is there completely or not at all.

    Raises:
        BlockFp8Error: it cannot be written, or the disk is full.
    """
    arrays = {name: np.ascontiguousarray(a) for name in _ARRAYS if (a := getattr(run, name)) is not None}
    about = {"version": VERSION, "name": run.name, "model": run.model, "prompts": run.prompts, "provenance": run.facts}
    write_bytes(path, save(arrays, {KEY: json.dumps(about, ensure_ascii=False)}))


def load_run(path: Path) -> Run:
    """Read a run of this machine or another.

    Raises:
        BlockFp8Error: no such file, damaged, not a run, or written by a later version.
    """
    try:
        with safe_open(path, "numpy") as file:
            about = json.loads((file.metadata() or {}).get(KEY, "null"))
            if about is None:
                raise _unreadable(path, "a safetensors file of something else")
            if about.get("version") != VERSION:
                raise _unreadable(path, f"version {about.get('version')}")
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        return Run(about["name"], about["model"], about["prompts"], facts=about["provenance"], **arrays)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, BlockFp8Error):
            raise
        raise _unreadable(path, error) from error


def _unreadable(path: Path, got: object) -> BlockFp8Error:
    return BlockFp8Error(
        "this is no saved run",
        where=path,
        expected=f"a complete file that `eval-precision run` wrote, version {VERSION}",
        got=got,
        fix="copy the file again, or make the run again",
    )


def check_comparable(run: Run, reference: Run) -> None:
    """Refuse to compare runs of different texts or tokens.

    Raises:
        BlockFp8Error: as said; the message names what differs.
    """
    where = f"{run.name} and {reference.name}"
    if run.prompts != reference.prompts:
        raise BlockFp8Error(
            "the runs are of different prompts",
            where=where,
            expected=f"{len(reference.prompts)} prompts, {fingerprint(reference.prompts)}",
            got=f"{len(run.prompts)} prompts, {fingerprint(run.prompts)}",
            fix="make both with the same version of this package and the same --prompts and --limit",
        )
    if not np.array_equal(run.ids, reference.ids):
        different = [
            i for i, (a, b) in enumerate(zip(_split(run), _split(reference), strict=True)) if not np.array_equal(a, b)
        ]
        raise BlockFp8Error(
            "the runs are of different tokens, so their tokenizers differ",
            where=where,
            expected=f"equal tokens of all {len(run.prompts)} prompts",
            got=f"{len(different)} prompts differ, the first is number {different[0] + 1}",
            fix="compare runs of one model with one tokenizer (a tokenizer that adds a token for the start counts)",
        )


def _split(run: Run) -> list[np.ndarray]:
    return np.split(run.ids, np.cumsum(run.lengths)[:-1])
