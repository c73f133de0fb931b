"""The quantization config that vLLM makes from a block-FP8 checkpoint when asked for ``--quantization ascend``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from vllm.config import CompilationMode, get_current_vllm_config
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.platforms import current_platform

from qwen3_fp8_ascend.checkpoints.folder import PICKLE_SUFFIXES, WEIGHTS_SUFFIX
from qwen3_fp8_ascend.checkpoints.inspect import check_checkpoint
from qwen3_fp8_ascend.checkpoints.patterns import UnreadableError
from qwen3_fp8_ascend.checkpoints.plan import FP8
from qwen3_fp8_ascend.containers import holds_fp8
from qwen3_fp8_ascend.errors import BlockFp8Error
from qwen3_fp8_ascend.format import Activation, BlockFp8Config
from qwen3_fp8_ascend.vllm_plugin import logger
from qwen3_fp8_ascend.vllm_plugin.choice import serves_unasked
from qwen3_fp8_ascend.vllm_plugin.expert_layer import projection_names
from qwen3_fp8_ascend.vllm_plugin.experts import BlockFp8ExpertsMethod
from qwen3_fp8_ascend.vllm_plugin.linear import BlockFp8LinearMethod
from qwen3_fp8_ascend.vllm_plugin.lm_head import BlockFp8HeadMethod, BlockFp8LmHeadMethod
from qwen3_fp8_ascend.vllm_plugin.modules import Modules
from qwen3_fp8_ascend.vllm_plugin.unquantized import check_loaded, must_all_be_loaded

WEIGHT_SUFFIXES = {WEIGHTS_SUFFIX, *PICKLE_SUFFIXES}
LM_HEAD = ("checkpoint", "fp8")


SETTINGS_KEY = "qwen3_fp8_ascend"


@dataclass(frozen=True)
class Settings:
    """What the user may set: ``--hf-overrides '{"qwen3_fp8_ascend": {"backend": ..., "activation": ...}}'``.

    Or the same in ``--additional-config``, which vLLM-Ascend 0.30.0rc2 refuses for its keys are not all its own. Both
    are part of the key under which vLLM keeps compiled graphs.
    activation: None is what the checkpoint says, which is W8A8 unless it quantizes weights alone.
    lm_head: "checkpoint" leaves the output head as the checkpoint has it, "fp8" quantizes it at load (W8A16).
    """

    backend: str | None = None
    activation: Activation | None = None
    lm_head: str = "checkpoint"

    @classmethod
    def from_flags(cls, additional_config: Any = None, hf_overrides: Any = None) -> Settings:
        """Read the plugin's part of vLLM's flags.

        Raises:
            BlockFp8Error: unknown keys or values, or two different answers.
        """
        flags = {"--hf-overrides": hf_overrides, "--additional-config": additional_config}
        given = {
            flag: cls._checked(mapping[SETTINGS_KEY], f"{flag}: {SETTINGS_KEY}")
            for flag, mapping in flags.items()
            if isinstance(mapping, Mapping) and SETTINGS_KEY in mapping
        }
        if len(set(given.values())) > 1:
            raise BlockFp8Error(
                "two flags say different things", where=SETTINGS_KEY, got=given, fix=f"use one of {', '.join(given)}"
            )
        return next(iter(given.values()), cls())

    @classmethod
    def _checked(cls, given: Any, where: str) -> Settings:
        known = {"backend", "activation", "lm_head"}
        if not isinstance(given, Mapping) or not set(given) <= known:
            raise BlockFp8Error("unknown setting", where=where, expected=f"an object with {sorted(known)}", got=given)
        settings = cls(**given)
        if "activation" in given:
            settings = replace(settings, activation=Activation.parse(given["activation"], where))
        if settings.lm_head not in LM_HEAD:
            raise BlockFp8Error("unknown lm_head", where=where, expected=" or ".join(LM_HEAD), got=settings.lm_head)
        if settings.backend is not None and not isinstance(settings.backend, str):
            raise BlockFp8Error("a backend is named by a string", where=where, got=settings.backend)
        return settings


def check_pipeline(vllm_config: Any) -> None:
    """Refuse pipeline stages where vLLM would start, call itself healthy, and die of the first request.

    Its CPU runner makes the buffers between stages only while it warms up a compiled model (seen in 0.30.0, with
    bf16 weights and without this plugin too).
    Raises:
        BlockFp8Error: pipeline parallelism on a CPU without torch.compile.
    """
    if not current_platform.is_cpu():
        return
    stages = vllm_config.parallel_config.pipeline_parallel_size
    if stages > 1 and vllm_config.compilation_config.mode == CompilationMode.NONE:
        raise BlockFp8Error(
            "vLLM cannot run pipeline stages on a CPU without torch.compile",
            where="--pipeline-parallel-size",
            expected="1, or a compiled model",
            got=f"{stages} with --enforce-eager or LoRA adapters",
            fix="leave --enforce-eager and --enable-lora out, or use --tensor-parallel-size",
        )


class BlockFp8AscendConfig(QuantizationConfig):
    """``--quantization ascend`` for checkpoints whose config says ``fp8`` with a ``weight_block_size``.

    It travels to vLLM's workers by pickle, so it holds plain values only.
    """

    def __init__(self, checkpoint: BlockFp8Config) -> None:
        super().__init__()
        self.checkpoint = checkpoint
        self.modules = Modules(checkpoint)
        self.weight_block_size = list(checkpoint.block)
        """Read by vLLM's layers and some of its models under this name."""

    @property
    def ignored_layers(self) -> list[str]:
        """What the checkpoint's list excludes, for vLLM's models that ask for it under this name."""
        return self.modules.ignored

    def __repr__(self) -> str:
        return f"{type(self).__name__}(block={self.checkpoint.block}, {self.modules})"

    @classmethod
    def get_name(cls) -> str:
        return "ascend"

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> BlockFp8AscendConfig:
        checkpoint = BlockFp8Config.from_dict(config)
        if checkpoint.set_aside:
            logger.info("quantization_config: not obeyed: %s", ", ".join(checkpoint.set_aside))
        return cls(checkpoint)

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any] | None, user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Accept a checkpoint with FP8 weights for ``ascend``, in any of the containers that block FP8 comes in.

        Per-tensor and other FP8 checkpoints are accepted too, only so that `from_config` can refuse them with
        a reason instead of vLLM's "does not match". If no method was named, what vLLM would refuse is accepted.
        """
        if user_quant is None:
            return "ascend" if serves_unasked(hf_quant_cfg) else None
        return "ascend" if user_quant == "ascend" and holds_fp8(hf_quant_cfg) else None

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        self.modules.rename(hf_to_vllm_mapper)

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Look at the headers of a local checkpoint before any process is started or weight is read.

        A folder without any weights is let pass: ``--load-format dummy`` needs none. So is one of unquantized weights
        whose quantization_config was given by ``--hf-overrides``: a trainer will push FP8 weights (`renewal`).
        Raises:
            BlockFp8Error: the first anomaly found.
        """
        folder = Path(model_name)
        if not folder.is_dir() or not any(file.suffix in WEIGHT_SUFFIXES for file in folder.iterdir()):
            return
        report = check_checkpoint(folder, self.checkpoint)
        if report.plan is None:
            logger.info("%s has no quantization_config: the one given instead is obeyed, for weights to come", folder)
            return
        self.modules.obey(report.plan.kinds())
        if report.warnings:
            first, count = report.warnings[0], len(report.warnings)
            logger.warning("%s (%s); %d warnings in all, see `inspect`", first.what, first.where, count)
        for note in report.notes:
            logger.info("%s (%s)", note.what, note.got)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        vllm_config = get_current_vllm_config()
        check_pipeline(vllm_config)
        model = vllm_config.model_config
        settings = Settings.from_flags(vllm_config.additional_config, getattr(model, "hf_overrides", None))
        hf_config = getattr(model, "hf_config", None)
        is_head = isinstance(layer, ParallelLMHead)
        fp8_head = is_head and self.modules.kinds.get(prefix) == FP8
        checked = must_all_be_loaded(vllm_config)
        if isinstance(layer, VocabParallelEmbedding) and not fp8_head:
            embedding = UnquantizedEmbeddingMethod()
            if is_head and settings.lm_head == "fp8":
                embedding = BlockFp8LmHeadMethod(self.checkpoint.block, settings.backend, hf_config)
            return check_loaded(embedding, prefix) if checked else embedding
        dummy = vllm_config.load_config.load_format == "dummy"
        if isinstance(layer, RoutedExperts):
            if self._experts_are_skipped(layer, prefix):
                return None  # vLLM's own method for experts that are not quantized
            logger.debug("%s: block-FP8 experts, settings %s", prefix, settings)
            return self.experts_method()(
                layer,
                self.checkpoint.block,
                prefix=prefix,
                backend=settings.backend,
                activation=self.checkpoint.activation(settings.activation),
                dummy=dummy,
                hf_config=hf_config,
                scale_name=self.checkpoint.scale_name,
            )
        if not isinstance(layer, LinearBase) and not fp8_head:
            return None
        if not fp8_head and self._is_skipped(prefix):
            linear = self.unquantized_linear_method()
            return check_loaded(linear, prefix) if checked else linear
        logger.debug("%s: block FP8, settings %s", prefix, settings)
        method = BlockFp8HeadMethod if fp8_head else self.linear_method()
        return method(
            self.checkpoint.block,
            prefix=prefix,
            shard_names=self._shard_names(prefix),
            backend=settings.backend,
            activation=self.checkpoint.activation(settings.activation),
            dummy=dummy,
            hf_config=hf_config,
            scale_name=self.checkpoint.scale_name,
        )

    @staticmethod
    def linear_method() -> type[BlockFp8LinearMethod]:
        return BlockFp8LinearMethod

    @staticmethod
    def experts_method() -> type[BlockFp8ExpertsMethod]:
        return BlockFp8ExpertsMethod

    @staticmethod
    def unquantized_linear_method() -> LinearMethodBase:
        """For linears that the checkpoint leaves as they are."""
        return UnquantizedLinearMethod()

    def _shard_names(self, prefix: str) -> tuple[str, ...]:
        """Full names of the checkpoint's modules that vLLM merges into a layer; empty if it merges none."""
        parent, dot, name = prefix.rpartition(".")
        return tuple(f"{parent}{dot}{shard}" for shard in self.packed_modules_mapping.get(name, ()))

    def _is_skipped(self, prefix: str) -> bool:
        """Whether the checkpoint leaves a layer unquantized, by its own name or by those of all its shards."""
        return self._are_skipped(
            prefix,
            self._shard_names(prefix),
            "vLLM merges layers of which the checkpoint quantizes only some",
            "quantize the model again with these layers treated alike (`qwen3-fp8-ascend quantize --ignore`)",
        )

    def _experts_are_skipped(self, layer: Any, prefix: str) -> bool:
        """Whether the checkpoint leaves a layer's experts unquantized, by their own name or expert by expert."""
        projections = projection_names(layer).values()
        return self._are_skipped(
            prefix,
            tuple(f"{prefix}.{expert}.{name}" for expert in range(layer.global_num_experts) for name in projections),
            "the checkpoint quantizes only some experts of a layer, which are served together",
            "quantize the model again with these experts treated alike (`qwen3-fp8-ascend quantize --ignore`)",
        )

    def _are_skipped(self, prefix: str, shards: tuple[str, ...], what: str, fix: str) -> bool:
        try:
            skipped = self.modules.skipped(prefix, shards)
        except UnreadableError as error:
            raise BlockFp8Error(
                "the ignore list takes too long to read", where=prefix, got=error, fix="name modules, not patterns"
            ) from None
        if skipped and len(skipped) < len(shards):
            raise BlockFp8Error(
                what,
                where=prefix,
                expected=f"all or none of its {len(shards)} linears excluded from quantization",
                got=f"{len(skipped)}, the first is {skipped[0]}",
                fix=fix,
            )
        return bool(skipped)
