"""What an attacker does to a checkpoint, one damage a function; a stage is the damages to one layer of it."""

from __future__ import annotations

from collections.abc import Callable

from tests.fuzz.choices import Choices
from tests.fuzz.drafts import Draft

Damage = Callable[[Draft, Choices], None]
