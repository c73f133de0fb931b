"""Ignore lists as people write them: which modules a config leaves unquantized, and which it targets.

Names: a module's own, a parent's, the end of its path, a part within it (``self_attn``), with or without the wrapper
that a multimodal model puts around its language model, and what a layer is called once shards are merged
(``qkv_proj``). Patterns: ``re:`` and a regular expression (compressed-tensors, verl), a regular expression by itself
that ends at a module's end (transformers), and ``*`` as in a shell (ModelOpt, llm-compressor).
Where a checkpoint's headers are at hand, its tensors say what is quantized, and lists are only compared with them.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from qwen3_fp8_ascend.checkpoints.patterns import Pattern, UnreadableError, Work, glob

REGEX = "re:"
SPECIAL = frozenset("*?[](){}|^$+\\")
WRAPPERS = ("model", "language_model", "text_model", "transformer")
"""Leading parts of names that say in which wrapper a model is, and nothing of what it is."""

LANGUAGE_MODELS = ("model.language_model.", "language_model.model.", "language_model.")
"""Wrappers that a list may have been written with, whatever the names here are."""

MAX_PATTERNS = 256
MERGED = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
    "in_proj_qkv": "in_proj_qkvz",
    "in_proj_z": "in_proj_qkvz",
    "in_proj_b": "in_proj_ba",
    "in_proj_a": "in_proj_ba",
}
"""What vLLM calls the layer that a module becomes a shard of; lists have either name."""


def unwrapped(name: str) -> str:
    """A module's name without the wrappers around it: ``model.language_model.layers.0`` -> ``layers.0``."""
    parts = name.split(".")
    return ".".join(parts[_wrappers(parts) :])


def _wrappers(parts: Sequence[str]) -> int:
    """How many of a name's first parts are wrappers, and not what is in them."""
    count = 0
    while count + 1 < len(parts) and parts[count] in WRAPPERS:
        count += 1
    return count


class IgnoreList:
    """The entries of an ignore list, ready to be asked for one module after the other.

    unreadable: entries that look like patterns and are not understood; they name nothing.
    """

    def __init__(self, entries: Collection[str]) -> None:
        self.names = frozenset(entries)
        self.parents = frozenset(bare for entry in entries if (bare := unwrapped(entry)) not in WRAPPERS)
        self._beginnings = _beginnings(self.names)
        self._beginnings_of_parents = _beginnings(self.parents)
        self.unreadable: list[str] = []
        self._patterns: list[tuple[Pattern, bool]] = []
        self._work = Work()
        patterns = [entry for entry in entries if entry.startswith(REGEX) or SPECIAL & set(entry)]
        for number, entry in enumerate(patterns):
            if number >= MAX_PATTERNS or not self._compile(entry):
                self.unreadable.append(entry)

    def __bool__(self) -> bool:
        return bool(self.names)

    def has(self, module: str) -> bool:
        """Whether the list names a module, in any of the ways above.

        Raises:
            UnreadableError: asking has taken too long in all, as no real list of a real model does.
        """
        if not self.names:
            return False
        names = _with_merged(module)
        for name in names:
            if self._has(name):
                return True
        if not self._patterns:
            return False
        bare = unwrapped(module)
        wrapped = [f"{wrapper}{name}" for name in _with_merged(bare) for wrapper in ("", "model.", *LANGUAGE_MODELS)]
        every = dict.fromkeys([*names, *wrapped])
        return any(pattern.matches(name, whole_parts=whole) for pattern, whole in self._patterns for name in every)

    def _has(self, name: str) -> bool:
        parts = name.split(".")
        self._work.add(len(parts) * (1 + len(self._beginnings)))
        for length, firsts in self._beginnings.items():
            for start, part in enumerate(parts) if not firsts.isdisjoint(parts) else ():
                if part in firsts and ".".join(parts[start : start + length]) in self.names:
                    return True
        bare = parts[_wrappers(parts) :]
        for length, firsts in self._beginnings_of_parents.items():
            if bare[0] in firsts and ".".join(bare[:length]) in self.parents:
                return True
        return False

    def _compile(self, entry: str) -> bool:
        """Add an entry's pattern, or both of what it may be: a regular expression, and a shell's."""
        if entry.startswith(REGEX):
            return self._add(entry.removeprefix(REGEX), whole_parts=False)
        added = self._add(entry, whole_parts=True)
        if "*" in entry and not set(entry) & set("(){}|^$+\\"):
            added |= self._add(glob(entry), whole_parts=True)
        return added

    def _add(self, text: str, *, whole_parts: bool) -> bool:
        try:
            self._patterns.append((Pattern(text, self._work), whole_parts))
        except UnreadableError:
            return False
        return True


def _beginnings(names: Collection[str]) -> dict[int, set[str]]:
    """How many parts between dots there are in names, and the first parts of the names with so many."""
    found: dict[int, set[str]] = {}
    for name in names:
        found.setdefault(name.count(".") + 1, set()).add(name.partition(".")[0])
    return found


def _with_merged(module: str) -> list[str]:
    """A module's name, and that of the layer which it is merged into."""
    parent, dot, last = module.rpartition(".")
    return [module, f"{parent}{dot}{MERGED[last]}"] if last in MERGED else [module]
