"""Serve block-FP8 checkpoints with vLLM on Ascend NPUs and on plain CPUs.

Importing this package imports neither torch nor vllm; everything heavy is imported where it is used.
"""

__version__ = "0.1.0"


def register() -> None:
    """Register the quantization method ``ascend`` with vLLM (entry point ``vllm.general_plugins``).

    vLLM calls this once in every process. It is idempotent and has no effect until a checkpoint or
    ``--quantization ascend`` asks for it.
    """
    from qwen3_fp8_ascend.vllm_plugin import register as register_plugin

    register_plugin()
