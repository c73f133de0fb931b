"""Every public form of a checkpoint: serving says of it what `inspect` says, before a process is started."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qwen3_fp8_ascend.checkpoints.anomaly import CheckpointError
from qwen3_fp8_ascend.checkpoints.inspect import inspect_checkpoint
from qwen3_fp8_ascend.errors import BlockFp8Error
from qwen3_fp8_ascend.vllm_plugin.config import BlockFp8AscendConfig
from tests.support.checkpoint_folders import one_thread  # noqa: F401
from tests.support.public_forms import FORMS, Form, write_forms


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> dict[Form, Path]:
    return write_forms(tmp_path_factory.mktemp("forms"))


def first_words(error: BlockFp8Error) -> str:
    """Without what counts the others."""
    return str(error).partition(" (and ")[0].partition("\n")[0] + str(error).partition("\n")[2]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: f"{form.family}: {form.said}")
def test_serving_says_what_inspect_says(forms: dict[Form, Path], form: Form) -> None:
    folder = forms[form]
    errors = inspect_checkpoint(folder).errors
    quantization = json.loads((folder / form.file).read_text())
    quantization = quantization.get("quantization_config", quantization)
    assert BlockFp8AscendConfig.override_quantization_method(quantization, "ascend") == "ascend"
    try:
        BlockFp8AscendConfig.from_config(quantization).maybe_update_config(str(folder))
    except BlockFp8Error as refused:
        assert errors
        assert first_words(refused) == first_words(CheckpointError(errors[0]))
    else:
        assert errors == ()
