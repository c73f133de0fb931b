"""What ``ascend`` is where this plugin could not be registered: an error, but only for who asks for it."""

from __future__ import annotations

from typing import Any, NoReturn

from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from qwen3_fp8_ascend.errors import BlockFp8Error


def refusing_config(error: BlockFp8Error) -> type[QuantizationConfig]:
    """A quantization config that raises `error` when ``--quantization ascend`` is given, and is inert otherwise."""

    class RefusingConfig(QuantizationConfig):
        @classmethod
        def get_name(cls) -> str:
            return "ascend"

        @classmethod
        def get_supported_act_dtypes(cls) -> list[Any]:
            return []

        @classmethod
        def get_min_capability(cls) -> int:
            return 0

        @staticmethod
        def get_config_filenames() -> list[str]:
            return []

        @classmethod
        def override_quantization_method(cls, hf_quant_cfg: Any, user_quant: Any, *args: Any, **kwargs: Any) -> None:
            if user_quant == "ascend":
                raise error

        @classmethod
        def from_config(cls, config: dict[str, Any]) -> NoReturn:
            raise error

        def get_quant_method(self, layer: Any, prefix: str) -> NoReturn:
            raise error

    return RefusingConfig
