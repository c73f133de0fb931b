"""Every public form of a checkpoint: what docs/checkpoints.md says of it is what `inspect` says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="transformers is not installed")

from tests.support.checkpoint_folders import one_thread  # noqa: F401
from tests.support.public_forms import DOCUMENT, FORMS, RESULTS, renewed, verdict, write_forms


def test_the_table_is_what_inspect_says(tmp_path: Path) -> None:
    forms = write_forms(tmp_path)
    text = DOCUMENT.read_text(encoding="utf-8")
    assert renewed(text, forms) == text, "python -m tests.support.public_forms"
    verdicts = [verdict(folder) for folder in forms.values()]
    recorded = {(row["model"], row["form"]) for row in json.loads(RESULTS.read_text())["forms"]}
    served = [(form.family, form.said) for form, folder in forms.items() if verdict(folder).startswith("served")]
    assert recorded == set(served), "python -m tests.support.measured_forms"
    assert len(verdicts) == len(FORMS)
    assert sum(said.startswith("refused") for said in verdicts) >= 6
    assert sum(said.startswith("served") for said in verdicts) >= 40
