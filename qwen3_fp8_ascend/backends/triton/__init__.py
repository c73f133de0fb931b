"""The Triton kernels on an Ascend NPU or an NVIDIA GPU (or, with TRITON_INTERPRET=1, on a CPU, for tests).

Weights stay at one byte, as lanes of two codes, plus one fp32 scale per row and K block. FP8 tensors are seen as
int8 the moment they arrive: A2 and A3 can neither cast nor copy them. `pack` waits for the device, nothing else does.
"""

from qwen3_fp8_ascend.backends.triton.backend import BACKEND

__all__ = ["BACKEND"]
