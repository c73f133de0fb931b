"""The threads of a table and the layout that it prints."""

from pathlib import Path

import pytest

from benchmarks.processors import numa_layout, thread_counts


def test_numbers_of_threads() -> None:
    assert thread_counts(["1,2", "half", "all"], 16) == [1, 2, 8, 16]
    assert thread_counts(["half,all"], 1) == [1]


@pytest.mark.parametrize("wanted", ["0", "17", "-1", "many", "", "1,,2"])
def test_other_words_are_refused(wanted: str) -> None:
    with pytest.raises(ValueError, match="--threads"):
        thread_counts([wanted], 16)


def test_nodes_in_their_order(tmp_path: Path) -> None:
    for number, processors in ((10, "4-7"), (2, "0-3"), (3, "")):  # a node may have memory only
        (tmp_path / f"node{number}").mkdir()
        (tmp_path / f"node{number}" / "cpulist").write_text(f"{processors}\n")
    assert numa_layout(tmp_path).startswith("node 2: processors 0-3; node 10: processors 4-7; ")
    assert numa_layout(tmp_path / "none").startswith("NUMA nodes unknown; ")
