"""The unfinished output: resumed, never mixed up, never taken for what is the user's."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen3_fp8_ascend.checkpoints import conversion, output
from qwen3_fp8_ascend.checkpoints.inspect import inspect_checkpoint
from qwen3_fp8_ascend.checkpoints.quantize import quantize_checkpoint
from qwen3_fp8_ascend.errors import BlockFp8Error
from tests.checkpoints.conftest import FILES
from tests.support.checkpoint_folders import digests, in_files, one_thread, random_model, write_folder  # noqa: F401


def stop_after(monkeypatch: pytest.MonkeyPatch, files: int, error: BaseException) -> None:
    """Let a conversion fail after that many finished files."""
    finished = 0
    original = output.UnfinishedOutput.write

    def write(self: Any, file: str, produce: Any) -> None:
        nonlocal finished
        if finished == files:
            raise error
        original(self, file, produce)
        finished += 1

    monkeypatch.setattr(output.UnfinishedOutput, "write", write)


@pytest.mark.parametrize("finished", range(1, FILES + 4))
def test_resumes_at_every_file(
    source: Path, expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: int
) -> None:
    destination = tmp_path / "fp8"
    with monkeypatch.context() as patch:
        stop_after(patch, finished, KeyboardInterrupt())
        if finished < FILES + 3:
            with pytest.raises(KeyboardInterrupt):
                quantize_checkpoint(source, destination, progress=False)
            assert not destination.exists()
            with pytest.raises(BlockFp8Error, match="unfinished conversion"):
                inspect_checkpoint(tmp_path / "fp8.incomplete")
    written = []
    original = conversion._write_file
    monkeypatch.setattr(conversion, "_write_file", lambda *a: (written.append(a[1].file), original(*a)))
    summary = quantize_checkpoint(source, destination, progress=False)
    assert digests(destination) == expected
    assert len(written) == max(0, FILES - finished) if finished < FILES + 3 else FILES
    assert summary.reused == FILES - len(written)
    assert not (tmp_path / "fp8.incomplete").exists()


def interrupt(source: Path, destination: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, 2, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            quantize_checkpoint(source, destination, progress=False, **options)


def test_other_settings_do_not_continue(
    source: Path, expected: dict[str, str], tmp_path: Path, monkeypatch: Any
) -> None:
    destination = tmp_path / "fp8"
    interrupt(source, destination, monkeypatch, block=(64, 64))
    with pytest.raises(BlockFp8Error, match="difference in settings"):
        quantize_checkpoint(source, destination, progress=False)
    assert (tmp_path / "fp8.incomplete").exists(), "an earlier run's work is not thrown away"
    quantize_checkpoint(source, destination, progress=False, overwrite=True)
    assert digests(destination) == expected


def test_another_source_does_not_continue(source: Path, tmp_path: Path, monkeypatch: Any) -> None:
    destination = tmp_path / "fp8"
    interrupt(source, destination, monkeypatch)
    write_folder(source, in_files(random_model(1, hidden=64, inner=72, kv=24, seed=1), FILES))
    with pytest.raises(BlockFp8Error, match="difference in source"):
        quantize_checkpoint(source, destination, progress=False)


def test_a_broken_journal_is_named(source: Path, tmp_path: Path, monkeypatch: Any) -> None:
    destination = tmp_path / "fp8"
    interrupt(source, destination, monkeypatch)
    (tmp_path / "fp8.incomplete" / "journal.json").write_text("{")
    with pytest.raises(BlockFp8Error, match="unreadable journal"):
        quantize_checkpoint(source, destination, progress=False)


def test_a_folder_of_the_users_is_not_taken_for_ours(source: Path, tmp_path: Path) -> None:
    mine = tmp_path / "fp8.incomplete" / "thesis.txt"
    mine.parent.mkdir()
    mine.write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(BlockFp8Error, match="no unfinished conversion"):
            quantize_checkpoint(source, tmp_path / "fp8", progress=False, overwrite=overwrite)
    assert mine.read_text() == "years of work"


def test_an_existing_destination_is_kept_unless_overwritten(
    source: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    destination = write_folder(tmp_path / "fp8", {"model.safetensors": {"old": torch.ones(1)}})
    before = digests(destination)
    with pytest.raises(BlockFp8Error, match="exists"):
        quantize_checkpoint(source, destination, progress=False)
    assert digests(destination) == before
    quantize_checkpoint(source, destination, progress=False, overwrite=True)
    assert digests(destination) == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fp8", "source", "uninterrupted"]


def test_an_overwritten_destination_stays_until_the_end(source: Path, tmp_path: Path, monkeypatch: Any) -> None:
    destination = write_folder(tmp_path / "fp8", {"model.safetensors": {"old": torch.ones(1)}})
    before = digests(destination)
    interrupt(source, destination, monkeypatch, overwrite=True)
    assert digests(destination) == before


def test_only_checkpoints_are_overwritten(source: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.txt").write_text("years of work")
    with pytest.raises(BlockFp8Error, match="not a checkpoint folder"):
        quantize_checkpoint(source, home, progress=False, overwrite=True)
    for name, make in (("file", lambda p: p.write_text("x")), ("link", lambda p: p.symlink_to(tmp_path / "nowhere"))):
        make(tmp_path / name)
        with pytest.raises(BlockFp8Error, match="not a folder"):
            quantize_checkpoint(source, tmp_path / name, progress=False, overwrite=True)


def test_an_empty_destination_is_used(source: Path, expected: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "fp8").mkdir()
    quantize_checkpoint(source, tmp_path / "fp8", progress=False)
    assert digests(tmp_path / "fp8") == expected


def test_two_runs_at_once_do_not_mix(source: Path, expected: dict[str, str], tmp_path: Path, monkeypatch: Any) -> None:
    began, go_on = threading.Event(), threading.Event()
    original = conversion._write_file

    def wait(*arguments: Any) -> None:
        began.set()
        assert go_on.wait(60)
        original(*arguments)

    monkeypatch.setattr(conversion, "_write_file", wait)
    first = threading.Thread(target=quantize_checkpoint, args=(source, tmp_path / "fp8"), kwargs={"progress": False})
    first.start()
    try:
        assert began.wait(60)
        with pytest.raises(BlockFp8Error, match="another process is writing"):
            quantize_checkpoint(source, tmp_path / "fp8", progress=False, overwrite=True)
    finally:
        go_on.set()
        first.join()
    assert digests(tmp_path / "fp8") == expected
