"""Conversions keep to their folders, say what the disk lacks, and are frugal."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from qwen3_fp8_ascend.checkpoints import conversion, tensors
from qwen3_fp8_ascend.checkpoints.inspect import check_checkpoint
from qwen3_fp8_ascend.checkpoints.quantize import quantize_checkpoint
from qwen3_fp8_ascend.errors import BlockFp8Error
from tests.support.checkpoint_folders import digests, one_thread, write_sparse  # noqa: F401

MIB = 1 << 20


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
    if shutil.which("mount") is None:
        pytest.skip("no program mount: apt-get install mount")
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


def test_output_is_readable_by_others(source: Path, expected: dict[str, str], tmp_path: Path) -> None:
    """safetensors itself makes files private (0600), which surprises whoever serves them under another account."""
    mask = os.umask(0)
    os.umask(mask)
    assert expected
    for path in (tmp_path / "uninterrupted").iterdir():
        assert path.stat().st_mode & 0o777 == 0o644 & ~mask


def test_peak_memory_is_bounded(tmp_path: Path) -> None:
    """A file of 240 MB (sparse zeros) costs what is made of it and one tensor of it; two files cost no more.

    Of the process's own memory: pages of the mapped input are the page cache's, and how many are mapped varies.
    """
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {"model.embed_tokens.weight": ("BF16", (20_000, 3000))}
    for name in ("gate_proj", "up_proj"):
        shapes[f"model.layers.0.mlp.{name}.weight"] = ("BF16", (10_000, 3000))
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    size = write_sparse(source / "a.safetensors", shapes)
    write_sparse(source / "b.safetensors", {f"model.layers.1.copy.{name}": shape for name, shape in shapes.items()})
    code = (
        "import re, sys, threading, time\n"
        "from qwen3_fp8_ascend.checkpoints.quantize import quantize_checkpoint\n"
        "from qwen3_fp8_ascend.checkpoints.dequantize import dequantize_checkpoint\n"
        "def own(): return int(re.search(r'RssAnon:\\s+(\\d+)', open('/proc/self/status').read())[1]) / 1024\n"
        "before = most = own()\n"
        "def watch():\n"
        "    global most\n"
        "    while True: most = max(most, own()); time.sleep(0.001)\n"
        "threading.Thread(target=watch, daemon=True).start()\n"
        "quantize_checkpoint(sys.argv[1], sys.argv[2], progress=False); after = most\n"
        "dequantize_checkpoint(sys.argv[2], sys.argv[3], progress=False); print(before, after, most)"
    )
    paths = [str(source), str(tmp_path / "fp8"), str(tmp_path / "bf16")]
    # The allocator would raise its threshold to 32 MiB, and then keep a freed weight now and then.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
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
