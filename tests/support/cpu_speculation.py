"""Speculative decoding on a CPU, which vLLM 0.30.0 has the native kernels for and cannot start.

Its CPU runner puts them in place of Triton's by the names of functions in two modules, while calls go through launchers
that have taken hold of those functions before: "Cannot inspect kernel parameters for function". Triton itself would not
help, since no release of it has the backend for CPUs that vLLM asks for. Tests hang the kernels where they are called;
the plugin changes nothing of vLLM.
"""

from __future__ import annotations

import importlib
import types

MODULES = ("vllm.v1.sample.rejection_sampler", "vllm.v1.spec_decode.utils")


def use_native_kernels() -> int:
    """Give each launcher of a missing Triton kernel vLLM's own native one of that name; return how many there were.

    With more than one token at a time, a draft needs a kernel whose native form has an argument of another name
    (`stride`) than its launcher gives, so that one token is what can be tested.
    """
    native = importlib.import_module("vllm.utils.cpu_triton_utils")
    launchers = [value for name in MODULES for value in vars(importlib.import_module(name)).values()]
    count = 0
    for launcher in launchers:
        missing = getattr(launcher, "__dict__", {}).get("kernel")
        if isinstance(missing, types.FunctionType):
            launcher.kernel = getattr(native, missing.__name__)
            count += 1
    return count
