"""Kernels for NVIDIA GPUs: the checkpoint's own bytes, row after row, converted by the hardware and multiplied exactly.

Beside the kernels for Ascend in the folder above, whose lanes and persistent grids are made for other machines.
"""
