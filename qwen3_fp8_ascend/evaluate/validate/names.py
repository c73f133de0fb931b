"""What `--only` names. No torch here: both the command and the processes that it starts ask."""

from __future__ import annotations

import fnmatch


def may_match(step: str, pattern: str) -> bool:
    """Whether cases of a step can be among those that a pattern of a step or of a case names."""
    parts = pattern.split("/")[: step.count("/") + 1]
    own = step.split("/")[: len(parts)]
    return fnmatch.fnmatchcase("/".join(own), "/".join(parts))


def matches(case: str, pattern: str) -> bool:
    """Whether a case is among them."""
    return fnmatch.fnmatchcase(case, pattern) or fnmatch.fnmatchcase(case, f"{pattern}/*")
