"""Conversions are atomic, resumable, byte-identical however often they are killed, and frugal."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from qwen3_fp8_ascend.checkpoints import conversion, output, tensors
from qwen3_fp8_ascend.checkpoints.inspect import check_checkpoint, inspect_checkpoint
from qwen3_fp8_ascend.checkpoints.quantize import quantize_checkpoint
from qwen3_fp8_ascend.errors import BlockFp8Error
from tests.support.checkpoint_folders import (  # noqa: F401
    digests,
    in_files,
    one_thread,
    random_model,
    write_folder,
    write_sparse,
)

FILES = 3
MIB = 1 << 20

KILLED_EVERYWHERE = """
import os, pathlib, shutil, signal, sys
import rich.console, rich.progress, torch  # once, for all children
from qwen3_fp8_ascend.checkpoints import tensors
from qwen3_fp8_ascend.checkpoints.quantize import quantize_checkpoint

source, scratch = map(pathlib.Path, sys.argv[1:3])
old = pathlib.Path(sys.argv[3]) if len(sys.argv) > 3 else None
torch.set_num_threads(1)  # the children inherit no thread pool
CALLS = ("fsync", "fchmod", "replace", "rename", "unlink", "rmdir", "mkdir")

def child(destination, kill_at):
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1]
    seen = 0
    def deadly(original):
        def call(*arguments, **options):
            nonlocal seen
            seen += 1
            if seen == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **options)
        return call
    for name in CALLS:
        setattr(os, name, deadly(getattr(os, name)))
    tensors.save_file = deadly(tensors.save_file)
    try:
        quantize_checkpoint(source, destination, progress=False, overwrite=old is not None)
    except BaseException as error:
        print("ERROR", kill_at, error, flush=True)
        os._exit(1)
    os._exit(0)

kill_at, finished = 0, False
while not finished:
    kill_at += 1
    destination = scratch / str(kill_at)
    if old:
        shutil.copytree(old, destination)
    status = child(destination, kill_at)
    finished = status == 0
    assert finished or os.WIFSIGNALED(status), status
    if not finished and (old or not destination.exists()):
        assert child(destination, 0) == 0, kill_at
print("points", kill_at - 1)
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = write_folder(tmp_path / "source", in_files(random_model(1, hidden=64, inner=72, kv=24), FILES))
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture
def expected(source: Path, tmp_path: Path) -> dict[str, str]:
    quantize_checkpoint(source, tmp_path / "uninterrupted", progress=False)
    return digests(tmp_path / "uninterrupted")


@pytest.mark.parametrize("overwrite", [False, True])
def test_killed_anywhere_it_completes_byte_for_byte(
    source: Path, expected: dict[str, str], tmp_path: Path, overwrite: bool
) -> None:
    """SIGKILL before every call that changes the disk, then the same command again."""
    scratch = tmp_path / "killed"
    scratch.mkdir()
    command = [sys.executable, "-c", KILLED_EVERYWHERE, str(source), str(scratch)]
    if overwrite:
        command.append(str(write_folder(tmp_path / "old", {"old.safetensors": {"old": torch.ones(1)}})))
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ERROR" not in done.stdout
    match = re.search(r"points (\d+)", done.stdout)
    assert match
    print(f"killed before each of {match[1]} calls")
    assert int(match[1]) > 35  # writes are the library's: the next test kills there
    finished = [path for path in scratch.iterdir() if not path.name.endswith(".incomplete")]
    assert len(finished) == int(match[1]) + 1
    for path in finished:
        assert digests(path) == expected, path.name
    if overwrite:
        assert not list(scratch.glob("*.incomplete"))


KILLED_WHILE_WRITING = """
import os, pathlib, resource, signal, sys
import rich.console, rich.progress, torch
from qwen3_fp8_ascend.checkpoints.quantize import quantize_checkpoint

source, scratch, largest = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(1)
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)

def child(destination, limit):
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    quantize_checkpoint(source, destination, progress=False)
    os._exit(0)

killed = litter = 0
for limit in range(0, largest, max(1, largest // 40)):
    destination = scratch / str(limit)
    status = child(destination, limit)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXFSZ, (limit, status)
    assert not destination.exists()
    killed += 1
    litter += len(list(scratch.glob(f"{limit}.incomplete/.tmp*")))
    assert child(destination, resource.RLIM_INFINITY) == 0, limit
print("killed", killed, "litter", litter)
"""


def test_killed_within_a_file_it_completes_byte_for_byte(
    source: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    """The kernel kills it at a byte of the file that the safetensors library is writing; its part of a file goes."""
    scratch = tmp_path / "killed"
    scratch.mkdir()
    largest = max(path.stat().st_size for path in (tmp_path / "uninterrupted").iterdir())
    command = [sys.executable, "-c", KILLED_WHILE_WRITING, str(source), str(scratch), str(largest)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    match = re.search(r"killed (\d+) litter (\d+)", done.stdout)
    assert match and int(match[1]) >= 40 and int(match[2]) > 0, done.stdout
    assert not list(scratch.glob("*.incomplete"))
    for path in scratch.iterdir():
        assert digests(path) == expected, path.name


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


@pytest.mark.parametrize("inside", ["source", "source/fp8", "", "source/../source"])
def test_source_and_destination_lie_apart(source: Path, tmp_path: Path, inside: str) -> None:
    before = digests(source)
    with pytest.raises(BlockFp8Error, match="within each other"):
        quantize_checkpoint(source, tmp_path / inside, progress=False, overwrite=True)
    assert digests(source) == before


def test_missing_parents_are_made_and_strings_are_paths(source: Path, expected: dict[str, str], tmp_path: Path) -> None:
    quantize_checkpoint(str(source), f"{tmp_path}/deep/down/fp8/", progress=False)
    assert digests(tmp_path / "deep/down/fp8") == expected


def test_too_little_space_is_found_before_the_work(source: Path, tmp_path: Path, monkeypatch: Any) -> None:
    usage = shutil_usage(free=1000)
    monkeypatch.setattr(conversion.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(BlockFp8Error, match="too little disk space") as caught:
        quantize_checkpoint(source, tmp_path / "fp8", progress=False)
    assert "1.0 kB free" in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def shutil_usage(free: int) -> Any:
    import shutil

    return shutil._ntuple_diskusage(1 << 40, (1 << 40) - free, free)  # type: ignore[attr-defined]


@pytest.mark.parametrize("call", ["save_file", "fsync", "replace"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_disk_that_fails_midway_loses_nothing(
    source: Path, expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    destination = tmp_path / "fp8"
    holder: Any = tensors if call == "save_file" else os
    original, calls = getattr(holder, call), 0

    def failing(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > (1 if call == "save_file" else 4):
            if call == "save_file":
                raise SafetensorError(f"Error while serializing: I/O error: {os.strerror(code)} (os error {code})")
            raise OSError(code, os.strerror(code))
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(holder, call, failing)
        with pytest.raises(BlockFp8Error, match="run the same command again"):
            quantize_checkpoint(source, destination, progress=False)
    assert not destination.exists()
    assert not list(tmp_path.glob("fp8.incomplete/*tmp*")), "no half file is left"
    quantize_checkpoint(source, destination, progress=False)
    assert digests(destination) == expected


def test_a_real_full_disk_loses_nothing(source: Path, expected: dict[str, str], tmp_path: Path) -> None:
    """The same on a real file system of 64 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system here: {mounted.stderr.strip()}")
    try:
        with pytest.MonkeyPatch.context() as patch:
            # Pretend there is room, as when another process fills the disk later.
            patch.setattr(conversion.shutil, "disk_usage", lambda path: shutil_usage(free=1 << 30))
            with pytest.raises(BlockFp8Error, match="no space left"):
                quantize_checkpoint(source, disk / "fp8", progress=False)
        assert not (disk / "fp8").exists()
        subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
        quantize_checkpoint(source, disk / "fp8", progress=False)
        assert digests(disk / "fp8") == expected
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_destination_that_cannot_be_written(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(BlockFp8Error, match="cannot read or write"):
        quantize_checkpoint(source, tmp_path / "file" / "fp8", progress=False)


def test_a_source_that_shrinks_is_an_error_not_a_crash(source: Path, tmp_path: Path, monkeypatch: Any) -> None:
    original = conversion._write_file

    def truncate_first(*arguments: Any) -> None:
        for file in source.glob("*.safetensors"):
            os.truncate(file, 2000)
        original(*arguments)

    monkeypatch.setattr(conversion, "_write_file", truncate_first)
    with pytest.raises(BlockFp8Error, match="shrank"):
        quantize_checkpoint(source, tmp_path / "fp8", progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


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


def test_output_is_readable_by_others(source: Path, expected: dict[str, str], tmp_path: Path) -> None:
    """safetensors itself makes files private (0600), which surprises whoever serves them under another account."""
    mask = os.umask(0)
    os.umask(mask)
    assert expected
    for path in (tmp_path / "uninterrupted").iterdir():
        assert path.stat().st_mode & 0o777 == 0o644 & ~mask


def test_peak_memory_is_bounded(tmp_path: Path) -> None:
    """A file of 240 MB (sparse zeros) costs what is made of it and one tensor of it; two files cost no more."""
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {"model.embed_tokens.weight": ("BF16", (20_000, 3000))}
    for name in ("gate_proj", "up_proj"):
        shapes[f"model.layers.0.mlp.{name}.weight"] = ("BF16", (10_000, 3000))
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    size = write_sparse(source / "a.safetensors", shapes)
    write_sparse(source / "b.safetensors", {f"model.layers.1.copy.{name}": shape for name, shape in shapes.items()})
    code = (
        "import re, sys\n"
        "from qwen3_fp8_ascend.checkpoints.quantize import quantize_checkpoint\n"
        "from qwen3_fp8_ascend.checkpoints.dequantize import dequantize_checkpoint\n"
        "def peak(): return int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) / 1024\n"
        "before = peak(); quantize_checkpoint(sys.argv[1], sys.argv[2], progress=False); after = peak()\n"
        "dequantize_checkpoint(sys.argv[2], sys.argv[3], progress=False); print(before, after, peak())"
    )
    paths = [str(source), str(tmp_path / "fp8"), str(tmp_path / "bf16")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    before, after, after_dequantize = map(float, done.stdout.split())
    print(
        f"two files of {size / 1e6:.0f} MB: "
        f"quantize {after - before:+.0f} MiB, dequantize {after_dequantize - before:+.0f} MiB"
    )
    kept, weight = 2 * 20_000 * 3000, 10_000 * 3000  # in bytes; a weight of one byte an element
    most = kept + 2 * weight + 2 * weight, kept + 2 * 2 * weight + weight
    allowance = 40  # MiB: tiles, what is imported and used for the first time
    assert after - before < most[0] / MIB + allowance
    assert after_dequantize - before < most[1] / MIB + allowance
    check_checkpoint(tmp_path / "fp8")
