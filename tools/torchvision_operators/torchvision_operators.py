"""Lets a torchvision that was built for CUDA be imported beside a torch that was not.

Its Python half works without its compiled half (`_has_ops()` is false then, and what needs it says so), but for two
operators that it expects to exist when it is imported: "operator torchvision::nms does not exist". vLLM's processors of
images, transformers' among them, need the Python half alone. Every Python of the environment loads this module when it
starts (`torchvision_operators.pth`); it loads nothing itself until torchvision is imported.

Source: torchvision/_meta_registrations.py (`register_fake`), torchvision 0.28.0 and 0.29.1.
"""

import sys

KEPT = []
"""A declaration lasts as long as its library object."""


class Declaring:
    """Finds nothing; declares the operators just before torchvision is found, once.

    A finder needs no base class, and to import that of the library would take each Python 15 ms to start.
    """

    def find_spec(self, fullname, path=None, target=None):
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            declare()
        return None


def declare():
    """Declare the two operators; calling one says that it has no implementation."""
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    KEPT.append(library)


if not any(isinstance(finder, Declaring) for finder in sys.meta_path):
    sys.meta_path.insert(0, Declaring())
