"""Shapes times dtypes times activations: the short form tries some shapes with all of them, others with one of each."""

from __future__ import annotations

import itertools
from collections.abc import Collection
from typing import Any

import pytest
import torch

from qwen3_fp8_ascend.format import Activation

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ONE_OF_EACH = tuple(zip(DTYPES, (Activation.W8A8, Activation.W8A8_UE8M0, Activation.W8A16), strict=True))


def with_dtypes_and_activations(
    shapes: Collection[tuple[Any, ...]],
    whole: Collection[tuple[Any, ...]] = (),
    long: Collection[tuple[Any, ...]] = (),
) -> list[Any]:
    """Parameters (*shape, dtype, activation). What the short form leaves out, on shapes not in `whole`, is long.

    Of shapes in `long` it leaves out everything.
    """
    parameters = []
    for shape, dtype, activation in itertools.product(shapes, DTYPES, Activation):
        short = shape in whole or ((dtype, activation) in ONE_OF_EACH and shape not in long)
        sizes = (str(part) for part in shape if not isinstance(part, tuple))
        name = "-".join((*sizes, str(dtype).removeprefix("torch."), activation))
        parameters.append(pytest.param(*shape, dtype, activation, id=name, marks=[] if short else pytest.mark.long))
    return parameters
