"""A source to convert, and what its conversion must give."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen3_fp8_ascend.checkpoints.quantize import quantize_checkpoint
from tests.support.checkpoint_folders import digests, in_files, random_model, write_folder

FILES = 3


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = write_folder(tmp_path / "source", in_files(random_model(1, hidden=64, inner=72, kv=24), FILES))
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture
def expected(source: Path, tmp_path: Path) -> dict[str, str]:
    quantize_checkpoint(source, tmp_path / "uninterrupted", progress=False)
    return digests(tmp_path / "uninterrupted")
