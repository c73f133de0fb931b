"""The only place that imports vLLM: a quantization config named ``ascend`` and its linear method."""

from __future__ import annotations

import importlib.util
import logging

logger = logging.getLogger(__name__)

_registered = False


def _log_through_vllm() -> None:
    """Send this package's log lines to vLLM's handlers, so that they reach the server's log in vLLM's form."""
    package, vllm = logging.getLogger("qwen3_fp8_ascend"), logging.getLogger("vllm")
    if vllm.handlers and not package.handlers:
        package.handlers = list(vllm.handlers)
        package.setLevel(vllm.level)
        package.propagate = False


def register() -> None:
    """Register ``ascend`` with vLLM; safe to call more than once.

    Raises:
        BlockFp8Error: this vLLM lacks something that the plugin is built on. vLLM logs the exception.
    """
    global _registered
    if _registered:
        return
    from qwen3_fp8_ascend.errors import BlockFp8Error
    from qwen3_fp8_ascend.vllm_plugin import versions

    _log_through_vllm()
    versions.warn_if_untested()
    if importlib.util.find_spec("vllm_ascend") is not None:
        logger.warning(
            "qwen3-fp8-ascend: vllm-ascend is installed; this release does not extend its `ascend` method yet "
            "and leaves it as it is"
        )
        _registered = True
        return
    try:
        from vllm.model_executor.layers.quantization import register_quantization_config

        from qwen3_fp8_ascend.vllm_plugin.config import BlockFp8AscendConfig
    except ImportError as error:
        raise BlockFp8Error(
            "qwen3-fp8-ascend cannot register `--quantization ascend` with this vLLM",
            expected=f"vLLM {versions.TESTED}",
            got=f"vLLM {versions.installed()}: {error}",
            fix="install a vLLM of the tested range",
        ) from error
    register_quantization_config("ascend")(BlockFp8AscendConfig)
    _registered = True
