"""Which NVIDIA GPUs torch sees; `soc.py` has the same of NPUs."""

from __future__ import annotations

import torch


def missing_gpu() -> str | None:
    """Why torch cannot use an NVIDIA GPU here, or None."""
    if torch.version.cuda is None or not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no NVIDIA GPU"
    return None


def names() -> list[str]:
    """Each GPU's name, none without one."""
    return [torch.cuda.get_device_name(index) for index in range(0 if missing_gpu() else torch.cuda.device_count())]


def described() -> list[str]:
    """The same with compute capabilities."""
    found = []
    for index, name in enumerate(names()):
        major, minor = torch.cuda.get_device_capability(index)
        found.append(f"{name}, compute capability {major}.{minor}")
    return found
