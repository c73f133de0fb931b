"""The judge finds what it is there to find: readers with a defect each, and the package without one of its defences."""

from __future__ import annotations

import ctypes
import json
import os
import pickle
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from qwen3_fp8_ascend.checkpoints import conversion, strict_json, weight_file
from qwen3_fp8_ascend.checkpoints import folder as folder_module
from qwen3_fp8_ascend.errors import BlockFp8Error
from tests.fuzz import heavy as heavy_module
from tests.fuzz import judge as judge_module
from tests.fuzz.campaign import run
from tests.fuzz.choices import Choices, DrawnChoices, random_choices
from tests.fuzz.damages.folders import link_outside
from tests.fuzz.damages.headers import change_index, repeat_entry
from tests.fuzz.damages.tensors import change_shape, rename_tensor
from tests.fuzz.folders import OUTSIDE, PICKLE, HostileFolder, Link
from tests.fuzz.hostile import STAGES, hostile_folder
from tests.fuzz.judge import Judge, Sandbox
from tests.fuzz.large_attacks import HEAVY
from tests.fuzz.readers import READERS, Reader
from tests.support.checkpoint_folders import one_thread  # noqa: F401
from tests.support.own_time import piece

SMALL = HostileFolder(
    {
        "model.safetensors": b"0123456789",
        "weights.bin": PICKLE,
        "outside.safetensors": Link(f"../{OUTSIDE}.safetensors"),
    }
)


def verdict_of(reader: Callable[[Path], None], *, reads_data: bool = False) -> str | None:
    with Judge(reader, reads_data=reads_data) as judge:
        return judge.judge(SMALL).violation


def key_error(folder: Path) -> None:
    raise KeyError("weight_map")


def recursion(folder: Path) -> None:
    json.loads("[" * 100_000)


def endless(folder: Path) -> None:
    while True:
        time.sleep(0.001)


def slow(folder: Path) -> None:
    for _ in range(60):
        piece(400)  # in little memory


def hungry(folder: Path) -> None:
    bytearray(40 << 20)


def hungry_outside_python(folder: Path) -> None:
    torch.ones(120 << 20)  # 480 MB


def bomb(folder: Path) -> None:
    bytearray(1 << 40)


def leave_by_name(folder: Path) -> None:
    (folder / f"../{OUTSIDE}.json").read_bytes()


def look_around(folder: Path) -> None:
    os.listdir(folder / "..")
    (folder.parent / f"{OUTSIDE}.json").read_bytes()


def copy_what_a_link_leads_to(folder: Path) -> None:
    (folder / "outside.safetensors").read_bytes()


def unpickle(folder: Path) -> None:
    pickle.loads(b"cos.path\njoin\n.")


def open_pickle(folder: Path) -> None:
    (folder / "weights.bin").read_bytes()


def torch_load(folder: Path) -> None:
    torch.load(folder / "model.safetensors")


def run_a_program(folder: Path) -> None:
    subprocess.run(["true"], check=True)


def endless_message(folder: Path) -> None:
    raise BlockFp8Error("x" * 10_000)


def escape_sequence(folder: Path) -> None:
    raise BlockFp8Error("\x1b[2J")


class LocalError(BlockFp8Error):
    def __init__(self) -> None:
        super().__init__("what", where="here")

    def __reduce__(self) -> tuple[type, tuple[str]]:
        return BlockFp8Error, ("something else",)


def changed_on_the_way(folder: Path) -> None:
    raise LocalError


DEFECTS: dict[Callable[[Path], None], str] = {
    key_error: "KeyError instead of BlockFp8Error",
    recursion: "RecursionError instead of BlockFp8Error",
    endless: "hangs",
    slow: "three times more than 0.05 s",
    hungry: "MB of Python memory",
    hungry_outside_python: "MB of resident memory",
    bomb: "MemoryError instead of BlockFp8Error",
    leave_by_name: "left the checkpoint folder",
    look_around: "left the checkpoint folder",
    unpickle: "forbidden: pickle.find_class",
    open_pickle: "a pickle was opened: weights.bin",
    torch_load: "AssertionError",
    run_a_program: "forbidden: subprocess.Popen",
    endless_message: "a message of 10000 characters",
    escape_sequence: "not printable",
    changed_on_the_way: "does not survive",
}


@pytest.mark.parametrize("reader", DEFECTS, ids=lambda f: f.__name__)
def test_every_kind_of_defect_is_found(reader: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch) -> None:
    if reader is endless:  # not for the slow one: on a busy machine its time by the clock is many times its own
        monkeypatch.setattr(judge_module, "HANG_SECONDS", 1)
    monkeypatch.setattr(judge_module, "SECONDS", 0.05)
    if reader is hungry_outside_python and not judge_module.resident_peak():
        pytest.skip("this kernel does not tell the peak of resident memory")
    violation = verdict_of(reader)
    assert violation is not None
    assert DEFECTS[reader] in violation


def test_a_link_may_be_looked_at_but_not_copied() -> None:
    assert verdict_of(copy_what_a_link_leads_to) is None
    violation = verdict_of(copy_what_a_link_leads_to, reads_data=True)
    assert violation is not None and "left the checkpoint folder" in violation


def test_good_readers_are_not_condemned() -> None:
    def refuse(folder: Path) -> None:
        raise BlockFp8Error("what", where="here", expected=1, got=2, fix="do this")

    assert verdict_of(lambda folder: None) is None
    assert verdict_of(refuse) is None


def test_what_is_condemned_is_kept_and_read_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A parser that trips over one damage: found, counted, written to a file, and the file makes the same input."""

    def read(folder: Path) -> None:
        if not (folder / "config.json").exists():
            raise KeyError("config.json")

    reader = Reader("planted", read, READERS["inspect"].make)
    figures = run(reader, (random_choices(0, i) for i in range(400)), tmp_path)
    assert figures.inputs == 400
    assert figures.violations.total() > 1
    (artefact,) = tmp_path.glob("planted-*.bin")
    assert f"--replay {artefact}" in capsys.readouterr().out
    with Judge(read) as judge:
        assert "KeyError" in str(judge.judge(reader.make(Choices(artefact.read_bytes()))).violation)
    assert (tmp_path / "current.bin").stat().st_size == len(random_choices(0, 399))


# The package without one of its defences: what found the defect finds it again.


def no_memory_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strict_json, "_memory", lambda text: 0)
    monkeypatch.setattr(strict_json, "MAX_ELEMENTS", 1 << 24)


def no_anomaly_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    no_memory_bound(monkeypatch)
    monkeypatch.setattr(folder_module, "collect", list)


def no_bound_on_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_file, "MAX_PARTS", 2000)
    monkeypatch.setattr(weight_file, "MAX_NAME", 2000)


def endless_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    def whole(n: int, k: int, block: object, *, whole_blocks: bool) -> Iterator[object]:
        from qwen3_fp8_ascend.checkpoints.tiles import Tile

        yield Tile(0, n, 0, k)

    for module in ("quantize", "dequantize"):
        monkeypatch.setattr(f"qwen3_fp8_ascend.checkpoints.{module}.tiles", whole)


LARGE = 1 << 24
SLOW, TIMES_SLOWER = 1 << 22, 3
"""So much takes 7 to 9 times longer without a bound on names. What else runs on a core makes its own time at most twice
as long, so that of the least of three and three the ratio stays above 3."""

HEAVY_DEFECTS = {
    no_memory_bound: ("lists in a header", "header", LARGE),
    no_anomaly_bound: ("index of absent tensors", "inspect", LARGE),
    no_bound_on_names: ("dots in a terabyte", "inspect", SLOW),
    endless_tiles: ("one wide FP8 row", "dequantize", LARGE),
}


@pytest.fixture
def memory_left_free() -> Iterator[None]:
    """As after many tests: 320 MB that the allocator kept when they were freed, because a later piece is in use."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    size = 1 << 16  # not mapped on its own
    pieces = [libc.malloc(size) for _ in range((320 << 20) // size)]
    for address in pieces:
        ctypes.memset(address, 1, size)
    for address in pieces[:-1]:
        libc.free(address)
    yield
    libc.free(pieces[-1])


@pytest.mark.parametrize("remove", HEAVY_DEFECTS, ids=lambda f: f.__name__)
@pytest.mark.usefixtures("one_thread", "memory_left_free")
def test_large_attacks_find_a_missing_defence(
    remove: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, reader, size = HEAVY_DEFECTS[remove]
    folder = HEAVY[name](size)
    if size == SLOW:
        usual = min(heavy_module.attack(name, READERS[reader], folder).seconds for _ in range(3))
        monkeypatch.setattr(heavy_module, "SECONDS", TIMES_SLOWER * usual)
        # The bound is of this machine at this moment.
        monkeypatch.setattr(heavy_module, "at_pace", lambda seconds, bound: seconds)
    whole = heavy_module.attack(name, READERS[reader], folder)
    assert whole.violation is None, whole
    remove(monkeypatch)
    broken = heavy_module.attack(name, READERS[reader], folder)
    assert broken.violation is not None, broken


def no_overflow_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_file, "MAX_BITS", 1 << 400)


def no_key_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_file, "_check_keys", lambda *arguments: None)


def no_link_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversion, "leaving_link", lambda path, folder: None)


def no_name_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_file, "is_tensor_name", lambda name: True)


def no_file_name_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_module, "_is_plain_file_name", lambda name: True)

    def believe(names: set[str], weight_map: dict[str, str] | None) -> list[str]:
        return sorted(set((weight_map or {"": "model.safetensors"}).values()))

    monkeypatch.setattr(folder_module, "_weight_files", believe)


SMALL_DEFECTS = {
    no_overflow_check: ("header", change_shape, "RuntimeError"),
    no_key_check: ("header", repeat_entry, "a key stands twice"),
    no_link_check: ("quantize", link_outside, "left the checkpoint folder"),
    no_file_name_check: ("inspect", change_index, "left the checkpoint folder"),
    no_name_check: ("inspect", rename_tensor, "not safe for a ter"),
}


@pytest.mark.parametrize("remove", SMALL_DEFECTS, ids=lambda f: f.__name__)
@pytest.mark.usefixtures("one_thread")
def test_small_attacks_find_a_missing_defence(
    remove: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One kind of damage, so that a few hundred inputs are enough to meet it."""
    name, damage, words = SMALL_DEFECTS[remove]

    def make(choices: Choices) -> HostileFolder:
        return hostile_folder(choices, quantized=name != "quantize", stages=((damage,),))

    reader = Reader(name, READERS[name].read, make, READERS[name].reads_data)
    inputs = [random_choices(5, number) for number in range(800)]
    assert not run(reader, inputs, tmp_path).violations
    remove(monkeypatch)
    figures = run(reader, inputs, tmp_path)
    assert any(words in kind for kind in figures.violations), figures.violations


def test_a_process_that_dies_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def die(folder: Path) -> None:
        if (folder / "config.json").stat().st_size != len(sound["config.json"]):
            ctypes.string_at(0)

    sound = READERS["inspect"].make(Choices(b"")).files
    reader = Reader("planted", die, READERS["inspect"].make)
    outcome = heavy_module.attack("x", reader, HostileFolder(sound | {"config.json": b"{}"}))
    assert outcome.violation is not None and "process died" in outcome.violation


def test_a_bomb_is_stopped_by_the_address_space() -> None:
    def explode(folder: Path) -> None:
        if len(os.listdir(folder)) == 1:
            bytearray(1 << 30)

    reader = Reader("planted", explode, READERS["inspect"].make)
    outcome = heavy_module.attack("x", reader, HostileFolder({"config.json": b"{}"}))
    assert outcome.violation is not None and "MemoryError" in outcome.violation


# The generator.


def test_every_damage_is_done_and_every_choice_can_be_repeated() -> None:
    seen = set()
    for number in range(3000):
        data = random_choices(1, number)
        folder = hostile_folder(Choices(data))
        seen.update(folder.damages)
        if number % 100 == 0:
            assert hostile_folder(Choices(data)).files == folder.files
    assert seen == {damage.__name__ for stage in STAGES for damage in stage}


def test_drawn_choices_are_kept_as_bytes() -> None:
    for number in range(50):
        source = Choices(random_choices(2, number))
        drawn = DrawnChoices(source.below)
        folder = hostile_folder(drawn)
        assert hostile_folder(Choices(drawn.data)).files == folder.files


@pytest.mark.parametrize("name", ["header", "config", "inspect", "render", "quantize", "dequantize"])
def test_without_choices_the_checkpoint_is_sound(name: str) -> None:
    reader = READERS[name]
    with Sandbox() as sandbox:
        folder = reader.make(Choices(b""))
        assert folder.damages == []
        reader.read(sandbox.fill(folder))
