"""Folders as they come from the internet: index, links, missing files, pickles."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen3_fp8_ascend.checkpoints import folder as folder_module
from qwen3_fp8_ascend.checkpoints.anomaly import MAX_ANOMALIES
from qwen3_fp8_ascend.checkpoints.folder import INDEX, find_quantization, read_checkpoint, survey_checkpoint
from qwen3_fp8_ascend.errors import BlockFp8Error
from tests.support.checkpoint_folders import BLOCK_FP8, write_folder
from tests.support.own_time import within

A, B = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture
def two_files(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "model", {A: {"a": torch.ones(2), "b": torch.ones(3)}, B: {"c": torch.ones(4)}})


def refuse(folder: Path, words: str) -> str:
    with pytest.raises(BlockFp8Error, match=words) as caught:
        read_checkpoint(folder)
    return str(caught.value)


def edit_index(folder: Path, **changes: str | None) -> None:
    index = json.loads((folder / INDEX).read_text())
    for tensor, file in changes.items():
        if file is None:
            index["weight_map"].pop(tensor)
        else:
            index["weight_map"][tensor] = file
    (folder / INDEX).write_text(json.dumps(index))


def test_reads_files_through_the_index(two_files: Path) -> None:
    checkpoint = read_checkpoint(two_files)
    assert {name: entry.file for name, entry in checkpoint.tensors.items()} == {"a": A, "b": A, "c": B}
    assert list(checkpoint.tensors) == sorted(checkpoint.tensors)
    assert checkpoint.has_index


def test_reads_files_without_an_index(two_files: Path) -> None:
    (two_files / INDEX).unlink()
    assert set(read_checkpoint(two_files).tensors) == {"a", "b", "c"}
    (two_files / A).unlink()
    assert "no file 1" in refuse(two_files, "weight files are missing")


def test_a_name_that_claims_99999_files_costs_nothing(two_files: Path) -> None:
    (two_files / INDEX).unlink()
    (two_files / A).rename(two_files / "model-99999-of-99999.safetensors")
    tracemalloc.start()
    message = refuse(two_files, "weight files are missing")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "no file 1, 3, 4, 5, 6, 7, 8, 9, …" in message
    assert peak < 1 << 20


def test_a_single_file_wins_over_leftovers(two_files: Path) -> None:
    (two_files / INDEX).unlink()
    write_folder(two_files, {"model.safetensors": {"z": torch.ones(1)}})
    checkpoint = read_checkpoint(two_files)
    assert set(checkpoint.tensors) == {"z"}
    assert checkpoint.unused == (A, B)


def test_files_beside_the_index_are_unused(two_files: Path) -> None:
    write_folder(two_files, {"consolidated.safetensors": {"z": torch.ones(1)}})
    assert read_checkpoint(two_files).unused == ("consolidated.safetensors",)


@pytest.mark.parametrize(
    "name",
    [
        "../secret.safetensors",
        "/etc/passwd.safetensors",
        "sub/x.safetensors",
        "..\\x.safetensors",
        "weights.bin",
        "..",
        "",
    ],
)
def test_an_index_cannot_leave_the_folder(two_files: Path, name: str) -> None:
    (two_files.parent / "secret.safetensors").write_bytes((two_files / A).read_bytes())
    edit_index(two_files, a=name)
    refuse(two_files, "not a plain")


def test_links_of_a_download_cache_are_followed(two_files: Path) -> None:
    blob = two_files.parent / "blobs" / "0123"
    blob.parent.mkdir()
    (two_files / A).rename(blob)
    (two_files / A).symlink_to(Path("..") / "blobs" / "0123")
    assert set(read_checkpoint(two_files).tensors) == {"a", "b", "c"}
    blob.unlink()
    refuse(two_files, "link leads nowhere")


def test_a_link_that_leaves_the_folder_is_followed_and_said(two_files: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    (two_files / A).rename(elsewhere)
    (two_files / A).symlink_to(elsewhere)
    (anomaly,) = survey_checkpoint(two_files).anomalies
    assert (anomaly.severity, anomaly.file, anomaly.got) == ("warning", A, str(elsewhere))
    assert set(read_checkpoint(two_files).tensors) == {"a", "b", "c"}


def test_a_missing_file_is_named(two_files: Path) -> None:
    (two_files / A).unlink()
    message = refuse(two_files, "file that the index names is missing")
    assert A in message
    assert "2 tensors" in message


def test_index_and_headers_must_agree(two_files: Path) -> None:
    edit_index(two_files, b=B)
    assert f"in {A}" in refuse(two_files, "not where the index says")
    edit_index(two_files, b=A, d=B)
    assert "in no readable file" in refuse(two_files, "not where the index says")


def test_a_tensor_that_the_index_forgets_is_a_warning(two_files: Path) -> None:
    edit_index(two_files, b=None)
    (anomaly,) = survey_checkpoint(two_files).anomalies
    assert (anomaly.severity, anomaly.tensor, anomaly.file) == ("warning", "b", A)
    read_checkpoint(two_files)


def test_a_tensor_in_two_files_is_refused(two_files: Path) -> None:
    write_folder(two_files, {B: {"a": torch.zeros(2), "c": torch.ones(4)}})
    assert B in refuse(two_files, "in two files")


def test_all_faulty_files_are_surveyed(two_files: Path) -> None:
    for file in (A, B):
        content = (two_files / file).read_bytes()
        (two_files / file).write_bytes(content[:-1])
    anomalies = survey_checkpoint(two_files).anomalies
    assert [a.file for a in anomalies if "truncated" in a.what] == [A, B]
    assert "and 1 more" in refuse(two_files, "truncated")


def test_pickles_are_refused_and_not_opened(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch never'\ntR.")
    refuse(folder, "never loaded")


def test_gguf_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "model.gguf").write_bytes(b"GGUF")
    assert "gguf_file=" in refuse(tmp_path / "model", "GGUF")
    refuse(tmp_path / "model" / "model.gguf", "not a checkpoint folder")


def test_what_vllm_saved_of_a_rank_is_no_checkpoint(two_files: Path) -> None:
    (two_files / "model-rank-0-part-0.safetensors").write_bytes((two_files / A).read_bytes())
    assert survey_checkpoint(two_files).unused == ("model-rank-0-part-0.safetensors",)  # its index names others
    (two_files / INDEX).unlink()
    refuse(two_files, "sharded_state")


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    assert "download" in refuse(tmp_path / "absent", "cannot be read")
    refuse(tmp_path / "nul\0byte", "cannot be read")
    refuse(tmp_path, "no config.json")
    (tmp_path / "config.json").write_text("{}")
    refuse(tmp_path, "no weights")


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a":1,"a":2}', "[" * 5000, "\ud800", '{"a":' + "9" * 5000 + "}"])
@pytest.mark.parametrize("file", ["config.json", INDEX])
def test_broken_json_is_named(two_files: Path, file: str, text: str) -> None:
    (two_files / file).write_bytes(text.encode("utf-8", "surrogatepass"))
    assert file in refuse(two_files, "JSON")


@pytest.mark.parametrize(
    "index", [{}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": {"a": 3}}, {"weight_map": {"\x1b[2J": A}}]
)
def test_broken_indexes_are_named(two_files: Path, index: Any) -> None:
    (two_files / INDEX).write_text(json.dumps(index))
    assert INDEX in refuse(two_files, "index|name")


@pytest.mark.parametrize("limit", ["MAX_FILES", "MAX_TENSORS"])
def test_more_than_any_model_has_is_refused(two_files: Path, monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    monkeypatch.setattr(folder_module, limit, 1)
    refuse(two_files, "more .* than any model")


def test_an_index_of_a_thousand_lies_is_counted(two_files: Path) -> None:
    lies = {f"absent{i}": A for i in range(MAX_ANOMALIES + 500)}
    (two_files / INDEX).write_text(json.dumps({"weight_map": {"a": A, "b": A, "c": B} | lies}))
    anomalies = survey_checkpoint(two_files).anomalies
    assert len(anomalies) == MAX_ANOMALIES + 1
    assert anomalies[-1].what == "500 more errors are not listed"


@pytest.mark.parametrize("file", ["config.json", INDEX])
def test_brackets_only_are_not_parsed(two_files: Path, file: str) -> None:
    (two_files / file).write_text('{"weight_map": [' + "[]," * 50_000 + "[]]}")
    assert file in refuse(two_files, "far more memory")


def test_a_config_that_is_a_pipe_does_not_hang(two_files: Path) -> None:
    import os

    (two_files / "config.json").unlink()
    os.mkfifo(two_files / "config.json")
    refuse(two_files, "not a regular file")


def test_an_enormous_config_is_not_read(two_files: Path) -> None:
    with (two_files / "config.json").open("wb") as file:
        file.truncate(1 << 30)
    refuse(two_files, "too large")


@pytest.mark.parametrize(
    ("config", "where"),
    [
        ({"quantization_config": BLOCK_FP8}, "config.json: quantization_config"),
        ({"text_config": {"quantization_config": BLOCK_FP8}}, "config.json: text_config.quantization_config"),
        ({"compression_config": BLOCK_FP8}, "config.json: compression_config"),
    ],
)
def test_finds_the_quantization_config(config: dict[str, Any], where: str) -> None:
    assert find_quantization(config) == (BLOCK_FP8, where)


def test_a_null_quantization_config_is_none() -> None:
    assert find_quantization({"quantization_config": None, "text_config": []}) is None


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-3, 1 << 70), st.floats(), st.text(max_size=5), st.just(A)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(["a", "c", "", A]), inner)),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(index=st.one_of(JSON, st.fixed_dictionaries({"weight_map": JSON})))
def test_any_index_is_read_or_refused(two_files: Path, index: Any) -> None:
    (two_files / INDEX).write_text(json.dumps(index))
    with within(1):
        try:
            survey_checkpoint(two_files)
        except BlockFp8Error as error:
            assert INDEX in str(error) or A in str(error)
