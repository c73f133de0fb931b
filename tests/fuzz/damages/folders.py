"""Damage to the folder: links, pipes, pickles, lost files."""

from __future__ import annotations

from qwen3_fp8_ascend.checkpoints.folder import INDEX, MODELOPT_CONFIG
from tests.fuzz.choices import Choices
from tests.fuzz.damages import Damage
from tests.fuzz.drafts import Draft
from tests.fuzz.folders import OUTSIDE, PICKLE, Folder, Link, Pipe


def _any_file(draft: Draft, choices: Choices) -> str:
    return choices.pick(sorted(draft.files))


LINKS = (
    f"../{OUTSIDE}.safetensors",
    f"../{OUTSIDE}.json",
    "/dev/zero",
    "/etc/passwd",
    "/proc/self/environ",
    "nowhere",
    ".",
    "..",
    "loop-a",
    "../../blobs/0123",
)


def link_outside(draft: Draft, choices: Choices) -> None:
    """A file that is a link: to a secret, a device, itself, or nowhere."""
    name = _any_file(draft, choices)
    target = choices.pick(LINKS)
    draft.files[name] = Link(name if target == "." and choices.below(2) else target)


def link_beside(draft: Draft, choices: Choices) -> None:
    """A link among the files that conversions carry over."""
    name = choices.pick(
        ("tokenizer.json", "sub/deep/vocab.txt", "LICENSE", "chat_template.jinja", "generation_config.json")
    )
    draft.files[name] = Link(choices.pick(LINKS))
    draft.files["loop-a"], draft.files["loop-b"] = Link("loop-b"), Link("loop-a")


def special_file(draft: Draft, choices: Choices) -> None:
    draft.files[_any_file(draft, choices)] = Pipe() if choices.below(2) else Folder()


def remove_file(draft: Draft, choices: Choices) -> None:
    if len(draft.files) > 1:
        draft.files.pop(_any_file(draft, choices))


def add_file(draft: Draft, choices: Choices) -> None:
    name = choices.pick(
        (
            "pytorch_model.bin",
            "consolidated.pth",
            "training_args.bin",
            "optimizer.pt",
            "model.safetensors.PKL",
            "tokenizer.json",
            "extra.safetensors",
            "model-00007-of-00099.safetensors",
            "model-99999-of-99999.safetensors",
            "journal.json",
            "a\nb\x1b[2J.txt",
            "\udcff\udcfe.txt",
            "\udcff.safetensors",
            ".git/config",
            "sub/" * 40 + "x",
            "model.gguf",
            "a" * 255,
        )
    )
    draft.files[name] = PICKLE if choices.below(2) else choices.take(40)


def pickles_only(draft: Draft, choices: Choices) -> None:
    """The weights as pickles, which must never be loaded."""
    for name in [name for name in draft.files if name.endswith(".safetensors") or name == INDEX]:
        draft.files.pop(name)
    draft.files[choices.pick(("pytorch_model.bin", "model.pt", "weights.pkl", "a.ckpt", "model.pth"))] = PICKLE
    if choices.below(2):
        draft.files["pytorch_model.bin.index.json"] = b'{"weight_map": {"a": "pytorch_model.bin"}}'


def weights_are_pickles(draft: Draft, choices: Choices) -> None:
    """A pickle under the name of a safetensors file."""
    names = [name for name in draft.files if name.endswith(".safetensors")]
    if names:
        draft.files[choices.pick(names)] = PICKLE


def states_of_ranks(draft: Draft, choices: Choices) -> None:
    """The weights as vLLM saves those of its ranks."""
    names = [name for name in draft.files if name.endswith(".safetensors")]
    for part, name in enumerate(names):
        draft.files[f"model-rank-0-part-{part}.safetensors"] = draft.files.pop(name)
    if choices.below(4):
        draft.files.pop(INDEX, None)


def quantized_elsewhere(draft: Draft, choices: Choices) -> None:
    """A ModelOpt config beside config.json, or what takes its name."""
    draft.files[MODELOPT_CONFIG] = choices.pick(
        (
            b'{"quantization": {"quant_algo": "FP8_PB_WO", "exclude_modules": ["lm_head"]}}',
            b'{"quantization": []}',
            b"{}",
            PICKLE,
        )
    )


FOLDERS: tuple[Damage, ...] = (
    link_outside,
    link_beside,
    special_file,
    remove_file,
    add_file,
    pickles_only,
    weights_are_pickles,
    states_of_ranks,
    quantized_elsewhere,
)
