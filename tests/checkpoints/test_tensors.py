"""Tensors come out of files as safetensors itself reads them; what cannot be read or written is said."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen3_fp8_ascend.checkpoints import tensors as tensors_module
from qwen3_fp8_ascend.checkpoints.tensors import WeightReader, write_weights
from qwen3_fp8_ascend.checkpoints.weight_file import TensorEntry, read_header
from qwen3_fp8_ascend.errors import BlockFp8Error
from tests.support.checkpoint_folders import raw_file

DTYPES = (torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.int64, torch.uint16)
FILE = "model.safetensors"


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.flatten().view(torch.uint8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_written_is_read(tmp_path: Path, dtype: torch.dtype) -> None:
    made = {
        "b": torch.arange(12).reshape(3, 4).to(dtype),
        "a": torch.ones(()).to(dtype),
        "c": torch.empty(0, 5).to(dtype),
    }
    write_weights(tmp_path / FILE, made, 0o640)
    assert (tmp_path / FILE).stat().st_mode & 0o777 == 0o640
    with WeightReader(tmp_path) as reader:
        for entry in read_header(tmp_path / FILE).tensors:
            found = reader.read(entry)
            assert (found.dtype, found.shape) == (dtype, made[entry.name].shape)
            assert torch.equal(bytes_of(found), bytes_of(made[entry.name]))
    assert load_file(tmp_path / FILE).keys() == made.keys()


def test_the_order_of_tensors_does_not_show(tmp_path: Path) -> None:
    made = {"b": torch.ones(2), "a": torch.zeros(3, dtype=torch.bfloat16), "c": torch.ones(4)}
    write_weights(tmp_path / "one", made, 0o644)
    write_weights(tmp_path / "two", dict(reversed(made.items())), 0o644)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


@pytest.mark.parametrize("dtype", ["F6_E2M3", "F4"])
def test_dtypes_that_torch_does_not_have_are_named(tmp_path: Path, dtype: str) -> None:
    bits = int(dtype[1])
    entry = {"dtype": dtype, "shape": [4, 8], "data_offsets": [0, 4 * bits]}
    (tmp_path / FILE).write_bytes(raw_file({"a": entry}, 4 * bits))
    (tensor,) = read_header(tmp_path / FILE).tensors
    with WeightReader(tmp_path) as reader, pytest.raises(BlockFp8Error, match="a tensor cannot be read") as caught:
        reader.read(tensor)
    assert f"{dtype} [4, 8]" in str(caught.value)


def shrink(path: Path) -> None:
    os.truncate(path, 2000)


def remove(path: Path) -> None:
    path.unlink()


def reshape(path: Path) -> None:
    save_file({"a": torch.ones(50, 20)}, path)


def rename(path: Path) -> None:
    save_file({"b": torch.ones(1000)}, path)


@pytest.mark.parametrize("opened", [False, True])
@pytest.mark.parametrize("change", [shrink, remove, reshape, rename])
def test_a_file_that_changes_is_an_error_and_no_crash(tmp_path: Path, change: object, opened: bool) -> None:
    save_file({"a": torch.ones(1000), "first": torch.ones(1)}, tmp_path / FILE)
    entries = {tensor.name: tensor for tensor in read_header(tmp_path / FILE).tensors}
    with WeightReader(tmp_path) as reader:
        if opened:
            reader.read(entries["first"])
        change(tmp_path / FILE)  # type: ignore[operator]
        if opened and change is not shrink:  # the old file is still open
            assert torch.equal(reader.read(entries["a"]), torch.ones(1000))
            return
        with pytest.raises(BlockFp8Error, match=r"shrank or was changed|cannot be read"):
            reader.read(entries["a"])


def test_a_tensor_larger_than_memory_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*arguments: object, **options: object) -> None:
        raise MemoryError

    monkeypatch.setattr(tensors_module, "open_file", no_memory)
    with WeightReader(tmp_path) as reader, pytest.raises(BlockFp8Error, match="does not fit into memory"):
        reader.read(TensorEntry("a", "U8", (1 << 50,), FILE))


def test_a_folder_that_is_not_there_is_the_systems_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        write_weights(tmp_path / "absent" / FILE, {"a": torch.ones(1)}, 0o644)
