"""What config.json says of a model, or of the language model within it. Its author is not trusted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def setting(config: Mapping[str, Any], *keys: str) -> Any:
    """The first of some settings that config.json has, for the model or for its language model; None if none."""
    for holder in (config, config.get("text_config")):
        if isinstance(holder, Mapping):
            for key in keys:
                if holder.get(key) is not None:
                    return holder[key]
    return None


def positive(config: Mapping[str, Any], *keys: str) -> int | None:
    """The same where it is a positive integer, else None."""
    value = setting(config, *keys)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None
