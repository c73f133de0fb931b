"""The only place that imports vLLM: a quantization config named ``ascend``, its methods for linears and for experts."""

from __future__ import annotations

import importlib.util
import logging

logger = logging.getLogger(__name__)

_registered = False


class _ToVllm(logging.Handler):
    """Hands records to vLLM's logger, as if they were its own: to its handlers, in its form, from its level on."""

    def emit(self, record: logging.LogRecord) -> None:
        vllm = logging.getLogger("vllm")
        if vllm.isEnabledFor(record.levelno):
            vllm.handle(record)


def _log_through_vllm() -> None:
    """Let this package's log lines reach the server's log.

    vLLM has handlers when it calls plugins (0.30), or only later and then others (0.31 on, `configure_logging`).
    """
    package = logging.getLogger("qwen3_fp8_ascend")
    if not package.handlers:
        package.addHandler(_ToVllm())
        package.setLevel(logging.DEBUG)  # vLLM's level decides
        package.propagate = False


def register() -> None:
    """Register ``ascend`` with vLLM; safe to call more than once.

    Never raises, since vLLM calls plugins unguarded and would start no model at all. Where this vLLM lacks something
    that the plugin is built on, that is logged, and raised to who asks for ``--quantization ascend``; beside
    vLLM-Ascend its own `ascend` is left alone then.
    """
    global _registered
    if _registered:
        return
    _registered = True
    from qwen3_fp8_ascend.vllm_plugin import versions

    _log_through_vllm()
    versions.warn_if_untested()
    try:
        config = _config_class()
    except Exception as error:
        config = _refusing_config(error)
    if config is not None:
        from vllm.model_executor.layers.quantization import register_quantization_config

        register_quantization_config("ascend")(config)


def _refusing_config(error: Exception) -> type | None:
    from qwen3_fp8_ascend.errors import BlockFp8Error
    from qwen3_fp8_ascend.vllm_plugin import versions

    explained = BlockFp8Error(
        "qwen3-fp8-ascend cannot register `--quantization ascend` with this vLLM",
        expected=versions.TESTED_TOGETHER,
        got=f"{versions.described()}: {error or type(error).__name__}",
        fix="install versions that were tested together",
    )
    explained.__cause__ = error
    logger.error("%s", explained, exc_info=error)
    if versions.installed_vllm_ascend() is not None:
        return None
    from qwen3_fp8_ascend.vllm_plugin.unavailable import refusing_config

    return refusing_config(explained)


def _config_class() -> type | None:
    """What ``ascend`` is to mean in this process: beside vLLM-Ascend an extension of its own config, else ours alone.

    None on Atlas 300I (310P), for which vLLM-Ascend registers yet another config and this package has no kernels.
    """
    if not _serves_npus():
        from qwen3_fp8_ascend.vllm_plugin.config import BlockFp8AscendConfig

        return BlockFp8AscendConfig
    from vllm_ascend import _build_info
    from vllm_ascend.utils import adapt_patch

    if "310P" in f"{getattr(_build_info, '__device_type__', '')} {getattr(_build_info, '__soc_version__', '')}".upper():
        logger.warning("qwen3-fp8-ascend: block FP8 is not for Atlas 300I (310P); `ascend` is left as it is")
        return None
    # The order in which vLLM-Ascend's platform does it: its patches of vLLM, then its configs.
    adapt_patch(is_global_patch=True)
    from qwen3_fp8_ascend.vllm_plugin.ascend import AscendConfig

    return AscendConfig


def _serves_npus() -> bool:
    """Whether vLLM-Ascend is this process's platform; it may also be installed and switched off by VLLM_PLUGINS."""
    if importlib.util.find_spec("vllm_ascend") is None:
        return False
    from vllm.platforms import current_platform

    return current_platform.device_type == "npu"
