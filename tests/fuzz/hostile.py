"""Checkpoint folders that mean harm: one generator for hypothesis, for a coverage-guided fuzzer and for runs in bulk.

`hostile_folder` begins with a small sound checkpoint and damages it in a few places, from the inside (a tensor, a
header's entry, a key of config.json) to the outside (bytes, links, pickles), so that the deep checks are reached as
well as the first ones. Every decision comes from `Choices`. Small attacks made large are in `large_attacks`. Nothing
here imports torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tests.fuzz.choices import Choices
from tests.fuzz.damages import Damage
from tests.fuzz.damages.configs import CONFIGS
from tests.fuzz.damages.files import BYTES
from tests.fuzz.damages.folders import FOLDERS
from tests.fuzz.damages.headers import HEADERS
from tests.fuzz.damages.tensors import TENSORS
from tests.fuzz.drafts import EXPERT_FORMS, FORMS, sound_checkpoint
from tests.fuzz.folders import HostileFolder

STAGES = (TENSORS, HEADERS, CONFIGS, BYTES, FOLDERS)


def hostile_folder(
    choices: Choices,
    *,
    quantized: bool | None = None,
    stages: Sequence[Sequence[Damage]] = STAGES,
    only: Callable[[str], bool] | None = None,
) -> HostileFolder:
    """A checkpoint folder with up to three damages of the given stages; none once in a while.

    `quantized` fixes what the sound checkpoint is; `only` keeps the files that a reader of single files needs.
    """
    is_quantized = not choices.one_in(4) if quantized is None else quantized
    draft = sound_checkpoint(
        quantized=is_quantized,
        files=1 + choices.below(2),
        experts=choices.pick(EXPERT_FORMS),
        form=choices.pick(FORMS),
    )
    wanted = [choices.pick(choices.pick(stages)) for _ in range(choices.pick((0, 1, 1, 2, 3, 1, 2, 1)))]
    damages: list[str] = []

    def apply(*stage: Sequence[Damage]) -> None:
        for damage in wanted:
            if any(damage in kind for kind in stage):
                damage(draft, choices)
                damages.append(damage.__name__)

    apply(TENSORS)
    draft.lay_out()
    apply(HEADERS, CONFIGS)
    draft.render()
    if only is not None:
        draft.files = {name: content for name, content in draft.files.items() if only(name)}
    apply(BYTES)
    apply(FOLDERS)
    return HostileFolder(draft.files, damages)
