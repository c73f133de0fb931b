"""Lets a torchvision that was built for CUDA be imported beside a torch that was not.

Its Python half works without its compiled half (`_has_ops()` is false then, and what needs it says so), but for two
operators that it expects to exist when it is imported: "operator torchvision::nms does not exist". vLLM's processors of
images, transformers' among them, need the Python half alone. torch calls `declare` when it is imported itself.

Source: torchvision/_meta_registrations.py (`register_fake`), torchvision 0.28.0 and 0.29.1.
"""

import torch

KEPT = []
"""A declaration lasts as long as its library object."""


def declare() -> None:
    """Declare the two operators; calling one says that it has no implementation."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    KEPT.append(library)
