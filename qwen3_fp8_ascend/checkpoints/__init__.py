"""Checkpoint folders: inspect them, quantize them to block FP8, dequantize them again.

`inspect` and what it stands on (`anomaly`, `header`, `folder`, `layers`) import neither torch nor vllm, so that a
preflight costs milliseconds. `quantize` and `dequantize` import torch.
"""
