"""A conversion that is killed anywhere and started again gives the same bytes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.checkpoint_folders import digests, write_folder

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
        if hasattr(pathlib, "_NormalAccessor"):  # Python 3.10: Path keeps what os had
            setattr(pathlib._NormalAccessor, name, staticmethod(getattr(os, name)))
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
