"""The versions of torch that the native kernels are for, stated once: the build, the loader and `doctor` ask here.

The libraries use torch's stable C++ interface of OLDEST (`TORCH_TARGET_VERSION`), so that one built under any of these
runs under all of them. TESTED are compiled against in tests/test_torch_versions.py, and run against each other by
`make test-torch-versions`. A newer torch keeps that interface and is let through, but was not tried.

The package's own dependency on torch has no such bound: pip would replace the torch that an older vLLM needs.
Nothing here imports torch: setup.py asks before anything is built.
"""

from __future__ import annotations

import re

OLDEST = (2, 10)
NEWEST = (2, 15)

TESTED = ("2.10.0", "2.14.1")
"""What tests use: the oldest, and a new one. 2.15.0 was run against 2.10.0 by hand (docs/compatibility.md)."""

DESCRIBED = f"{OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]}"

TARGET_VERSION = f"0x{OLDEST[0]:02x}{OLDEST[1]:02x}{0:012x}"
"""TORCH_TARGET_VERSION: torch's headers hide from C++ what is newer than this."""


def release_of(version: str) -> tuple[int, int]:
    """The first two numbers of a version such as 2.13.0+cpu or 2.10.0a0+git1234.

    Raises:
        ValueError: it does not begin with two numbers.
    """
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None:
        raise ValueError(f"{version!r} is not a version of torch")
    return int(found[1]), int(found[2])


def is_too_old(version: str) -> bool:
    return release_of(version) < OLDEST


def is_untried(version: str) -> bool:
    """Newer than anything this was tried with."""
    return release_of(version) > NEWEST
