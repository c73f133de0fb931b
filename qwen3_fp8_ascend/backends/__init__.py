"""Implementations of the block-FP8 operations; one file is one backend."""

from qwen3_fp8_ascend.backends.registry import (
    Backend,
    BackendStatus,
    PackedWeight,
    available_backends,
    load_backend,
    select_backend,
)

__all__ = ["Backend", "BackendStatus", "PackedWeight", "available_backends", "load_backend", "select_backend"]
