"""Damage to headers and the index: lies about the file."""

from __future__ import annotations

from typing import Any

from qwen3_fp8_ascend.checkpoints.weight_file import DTYPE_BITS, METADATA
from tests.fuzz.choices import Choices
from tests.fuzz.damages import Damage
from tests.fuzz.drafts import Draft, Pairs
from tests.fuzz.values import FILE_NAMES, HUGE, NAMES, NUMBERS, odd_value


def _header_entry(draft: Draft, choices: Choices) -> tuple[Pairs, int]:
    header = draft.headers[choices.pick(sorted(draft.tensors))]
    return header, choices.below(len(header.items))


def _lie(draft: Draft, choices: Choices, key: str, value: Any) -> None:
    header, at = _header_entry(draft, choices)
    name, entry = header.items[at]
    if isinstance(entry, dict):
        header.items[at] = (name, entry | {key: value})


def lie_about_dtype(draft: Draft, choices: Choices) -> None:
    dtypes = (*sorted(DTYPE_BITS), "F8_E4M4", "f32", "F8_E4M3FN")
    _lie(draft, choices, "dtype", odd_value(choices) if choices.one_in(3) else choices.pick(dtypes))


def lie_about_shape(draft: Draft, choices: Choices) -> None:
    value = odd_value(choices) if choices.one_in(3) else [choices.pick(NUMBERS + HUGE) for _ in range(choices.below(4))]
    _lie(draft, choices, "shape", value)


def lie_about_offsets(draft: Draft, choices: Choices) -> None:
    value = odd_value(choices) if choices.one_in(3) else [choices.pick(NUMBERS + HUGE) for _ in range(2)]
    _lie(draft, choices, "data_offsets", value)


def shift_offsets(draft: Draft, choices: Choices) -> None:
    header, at = _header_entry(draft, choices)
    entry = header.items[at][1]
    if isinstance(entry, dict) and isinstance(entry.get("data_offsets"), list):
        by = choices.pick((1, -1, 4, -4, 1 << 40, -(1 << 40)))
        entry["data_offsets"] = [offset + by if isinstance(offset, int) else offset for offset in entry["data_offsets"]]


def overlap(draft: Draft, choices: Choices) -> None:
    """A tensor that takes another's bytes."""
    header, at = _header_entry(draft, choices)
    other = choices.pick(header.items)[1]
    if isinstance(other, dict) and isinstance(header.items[at][1], dict) and "data_offsets" in other:
        header.items[at][1]["data_offsets"] = other["data_offsets"]


def extra_key(draft: Draft, choices: Choices) -> None:
    _lie(draft, choices, choices.pick(("x", "", "stride", "Dtype")), odd_value(choices))


def lost_key(draft: Draft, choices: Choices) -> None:
    header, at = _header_entry(draft, choices)
    entry = header.items[at][1]
    if isinstance(entry, dict) and entry:
        entry.pop(choices.pick(sorted(entry)))


def replace_entry(draft: Draft, choices: Choices) -> None:
    header, at = _header_entry(draft, choices)
    header.items[at] = (header.items[at][0], odd_value(choices))


def repeat_entry(draft: Draft, choices: Choices) -> None:
    header, at = _header_entry(draft, choices)
    header.items.append(header.items[at])


def change_metadata(draft: Draft, choices: Choices) -> None:
    header = draft.headers[choices.pick(sorted(draft.tensors))]
    header.items[0] = (METADATA, odd_value(choices) if choices.below(2) else {choices.pick(NAMES): odd_value(choices)})


def change_index(draft: Draft, choices: Choices) -> None:
    if not isinstance(draft.index, dict):
        draft.index = {"weight_map": {t.name: file for file, tensors in draft.tensors.items() for t in tensors}}
    weight_map = draft.index.get("weight_map")
    if not isinstance(weight_map, dict) or choices.one_in(6):
        draft.index = draft.index | {"weight_map": odd_value(choices)} if choices.below(4) else odd_value(choices)
        return
    name = choices.pick(sorted(weight_map)) if weight_map and choices.below(2) else choices.pick(NAMES)
    action = choices.below(4)
    if action == 0:
        weight_map[name] = choices.pick(FILE_NAMES)
    elif action == 1:
        weight_map.pop(name, None)
    elif action == 2:
        weight_map[name] = odd_value(choices)
    else:
        draft.index["weight_map"] = Pairs([*weight_map.items(), (name, choices.pick(FILE_NAMES))])


HEADERS: tuple[Damage, ...] = (
    lie_about_dtype,
    lie_about_shape,
    lie_about_offsets,
    shift_offsets,
    overlap,
    extra_key,
    lost_key,
    replace_entry,
    repeat_entry,
    change_metadata,
    change_index,
)
