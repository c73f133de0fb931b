"""A reader with a defect that only guidance finds: five choices among sixteen, one after the other."""

from __future__ import annotations

from pathlib import Path

from tests.fuzz.choices import Choices
from tests.fuzz.folders import HostileFolder
from tests.fuzz.readers import Reader


def read(folder: Path) -> None:
    """Raises KeyError for one content in 1,048,576."""
    content = (folder / "model.safetensors").read_bytes()
    if content[0] != 5:
        return
    if content[1] != 11:
        return
    if content[2] != 2:
        return
    if content[3] != 14:
        return
    if content[4] != 7:
        return
    raise KeyError("planted")


def make(choices: Choices) -> HostileFolder:
    return HostileFolder({"model.safetensors": bytes(choices.below(16) for _ in range(5))}, ["bytes"])


PLANTED = Reader("planted", read, make)
