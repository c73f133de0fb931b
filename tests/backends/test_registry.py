"""Which backend is chosen, and what is said of it."""

import pytest

from qwen3_fp8_ascend.backends import load_backend, select_backend
from qwen3_fp8_ascend.backends.registry import ENVIRONMENT_VARIABLE
from qwen3_fp8_ascend.errors import BlockFp8Error
from tests.support.devices import device

PLACE = device().place


@pytest.mark.skipif(PLACE.type != "cpu", reason="it is about machines that have the CPU's library")
def test_automatic_choice_is_logged_and_never_the_reference(caplog: pytest.LogCaptureFixture) -> None:
    select_backend.cache_clear()
    with caplog.at_level("INFO", logger="qwen3_fp8_ascend"):
        assert select_backend(None, "cpu").name == "cpu"
    assert any("backend cpu" in r.message for r in caplog.records)
    with pytest.raises(BlockFp8Error, match="no backend can run block FP8 on meta"):
        select_backend(None, "meta")


def test_environment_chooses_and_is_strict(monkeypatch: pytest.MonkeyPatch) -> None:
    select_backend.cache_clear()
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "reference")
    assert select_backend(None, "cpu").name == "reference"
    select_backend.cache_clear()
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "nonsense")
    with pytest.raises(BlockFp8Error, match="unknown backend 'nonsense'"):
        select_backend(None, "cpu")
    select_backend.cache_clear()


def test_a_backend_that_cannot_run_says_why() -> None:
    with pytest.raises(BlockFp8Error, match="runs on cpu, not on cuda"):
        select_backend("cpu", "cuda")
    assert load_backend("reference").unusable() is None
