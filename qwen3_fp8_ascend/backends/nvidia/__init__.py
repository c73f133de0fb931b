"""Kernels for NVIDIA GPUs in Triton (or, with TRITON_INTERPRET=1, on a CPU, for tests).

The weight is what the checkpoint has, byte for byte, and its block scales; only a last block of columns that is not
whole is filled up with zeros. Nothing here waits for the device but the first call on it.
"""

from qwen3_fp8_ascend.backends.nvidia.backend import BACKEND

__all__ = ["BACKEND"]
