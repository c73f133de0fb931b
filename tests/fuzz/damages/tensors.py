"""Damage to tensors: the file stays consistent, what it says is wrong."""

from __future__ import annotations

import struct

from qwen3_fp8_ascend.checkpoints.weight_file import DTYPE_BITS
from qwen3_fp8_ascend.containers import SCALE_ENDINGS
from qwen3_fp8_ascend.format import scale_shape
from tests.fuzz.choices import Choices
from tests.fuzz.damages import Damage
from tests.fuzz.drafts import BLOCK, CODES, Draft, Tensor
from tests.fuzz.values import NAMES, SCALE_BITS, odd_shape


def _file(draft: Draft, choices: Choices) -> str:
    return choices.pick(sorted(draft.tensors))


def _tensor(draft: Draft, choices: Choices) -> Tensor:
    tensors = draft.tensors[_file(draft, choices)]
    if not tensors:
        tensors.append(Tensor("a", "U8", (1,), b"\0"))
    return choices.pick(tensors)


SCALES = tuple(set(SCALE_ENDINGS.values()))


def _tensor_with(draft: Draft, choices: Choices, *suffixes: str) -> Tensor:
    found = [t for tensors in draft.tensors.values() for t in tensors if t.name.endswith(suffixes)]
    return choices.pick(found) if found else _tensor(draft, choices)


def change_dtype(draft: Draft, choices: Choices) -> None:
    tensor = _tensor(draft, choices)
    tensor.dtype = choices.pick(sorted(DTYPE_BITS))
    tensor.resize()


def change_shape(draft: Draft, choices: Choices) -> None:
    tensor = _tensor(draft, choices)
    tensor.shape = odd_shape(choices)
    tensor.resize()


def transpose(draft: Draft, choices: Choices) -> None:
    tensor = _tensor_with(draft, choices, *choices.pick(((".weight",), SCALES)))
    tensor.shape = tensor.shape[::-1]


def rename_tensor(draft: Draft, choices: Choices) -> None:
    _tensor(draft, choices).name = choices.pick(NAMES)


def rename_to_sibling(draft: Draft, choices: Choices) -> None:
    _tensor(draft, choices).name = _tensor(draft, choices).name


def drop_tensor(draft: Draft, choices: Choices) -> None:
    tensors = draft.tensors[_file(draft, choices)]
    if tensors:
        tensors.pop(choices.below(len(tensors)))


def drop_all_tensors(draft: Draft, choices: Choices) -> None:
    draft.tensors[_file(draft, choices)].clear()


def add_tensor(draft: Draft, choices: Choices) -> None:
    tensor = Tensor(choices.pick(NAMES), choices.pick(sorted(DTYPE_BITS)), odd_shape(choices), CODES[:8])
    tensor.resize()
    draft.tensors[_file(draft, choices)].append(tensor)


def add_empty_pair(draft: Draft, choices: Choices) -> None:
    """A weight without any element and scales that fit it, both as long as one likes."""
    n, k = choices.pick(((0, 1 << 62), (1 << 62, 0), (1 << 40, 0), (0, 0), (0, 1 << 31)))
    scale = scale_shape(n, k, BLOCK)
    module = f"model.layers.{choices.below(3)}.mlp.fc1"
    tensors = draft.tensors[_file(draft, choices)]
    tensors.append(Tensor(f"{module}.weight", "F8_E4M3" if draft.quantized else "BF16", (n, k), b""))
    if draft.quantized:
        tensors.append(Tensor(f"{module}.weight_scale_inv", "F32", scale, b""))


def copy_between_files(draft: Draft, choices: Choices) -> None:
    draft.tensors[_file(draft, choices)].append(_tensor(draft, choices))


def poison_scales(draft: Draft, choices: Choices) -> None:
    tensor = _tensor_with(draft, choices, *SCALES)
    position = 4 * choices.below(max(1, len(tensor.data) // 4))
    bits = struct.pack("<I", choices.pick(SCALE_BITS))
    tensor.data = (tensor.data[:position] + bits + tensor.data[position + 4 :])[: len(tensor.data)]


def poison_weights(draft: Draft, choices: Choices) -> None:
    """NaN codes in FP8, NaN or infinity in bf16."""
    tensor = _tensor_with(draft, choices, ".weight")
    position = 2 * choices.below(max(1, len(tensor.data) // 2))
    bits = choices.pick((b"\x7f\x7f", b"\xff\xff", b"\x80\x7f", b"\x80\xff", b"\x01\x7f"))
    tensor.data = (tensor.data[:position] + bits + tensor.data[position + 2 :])[: len(tensor.data)]


def damage_experts(draft: Draft, choices: Choices) -> None:
    """One tensor of an expert, or of all of them: lost, of another shape or dtype, or one too many."""
    places = [(tensors, t) for tensors in draft.tensors.values() for t in tensors if _of_experts(t.name)]
    if not places:
        return
    tensors, tensor = choices.pick(places)
    kind = choices.below(6)
    if kind == 0:
        tensors.remove(tensor)
    elif kind == 1:
        tensor.shape = (*tensor.shape[:-2], *tensor.shape[:-3:-1])
    elif kind == 2:
        tensor.dtype = choices.pick(("BF16", "F8_E4M3", "F32"))
        tensor.resize()
    elif kind == 3:
        tensors.append(Tensor(f"{tensor.name.removesuffix('.weight')}.bias", "BF16", (1,), CODES[:2]))
    elif kind == 4:
        number = choices.pick((0, 1, 2, 9, 999_999))
        tensor.name = tensor.name.replace("experts.0.", f"experts.{number}.")
    else:  # all of one expert, of one projection, or of all
        parts = (".experts.", ".experts.0.", "down_proj", "gate_up_proj", "gate_proj.weight")
        part = choices.pick(parts)
        for held in draft.tensors.values():
            held[:] = [t for t in held if not _of_experts(t.name) or part not in t.name]


def _of_experts(name: str) -> bool:
    return ".experts." in name or (".moe." in name and ".gate." not in name)


TENSORS: tuple[Damage, ...] = (
    change_dtype,
    change_shape,
    transpose,
    rename_tensor,
    rename_to_sibling,
    drop_tensor,
    drop_all_tensors,
    add_tensor,
    add_empty_pair,
    copy_between_files,
    poison_scales,
    poison_weights,
    damage_experts,
)
