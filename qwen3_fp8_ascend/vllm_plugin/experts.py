"""The method for mixtures of experts: declares the experts' weights, lets vLLM load them, packs them once, multiplies.

vLLM routes: it gives each token's experts and their weights, and adds shared experts and what other ranks computed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.config import FUSED_MOE_UNQUANTIZED_CONFIG
from vllm.model_executor.utils import set_weight_attrs

from qwen3_fp8_ascend import ops
from qwen3_fp8_ascend.checkpoints.experts import whole_block_ranks
from qwen3_fp8_ascend.errors import BlockFp8Error
from qwen3_fp8_ascend.format import Activation, BlockGrid, BlockSize, scale_shape
from qwen3_fp8_ascend.vllm_plugin.loading import (
    DAMAGED,
    UNWRITTEN_CODE,
    check_dtype,
    check_serving,
    explain_load_errors,
    fill_with_small_values,
    install_packed,
    note_backend,
    packing,
)

WEIGHTS = {"w13": ("w1", "w3"), "w2": ("w2",)}
"""vLLM's names: gate and up of all experts merged, and down; which of an expert's tensors each parameter holds."""

CODE_DTYPES = (torch.float8_e4m3fn,)
SCALE_DTYPES = (torch.float32, torch.bfloat16)
BLOCK_SCALES = "block"
"""`FusedMoeWeightScaleSupported.BLOCK` by its value: what tells vLLM's loader how scales are cut among ranks."""


class BlockFp8ExpertsMethod(FusedMoEMethodBase):
    """Block-FP8 weights for the routed experts of a layer.

    Any division of whole experts among ranks, and tensor parallelism that leaves blocks whole. The arguments are those
    of `BlockFp8LinearMethod`; layer: vLLM's `RoutedExperts`.
    Raises:
        BlockFp8Error: what vLLM asks of the experts is something that these do not compute.
    """

    def __init__(
        self,
        layer: Any,
        block: BlockSize,
        *,
        prefix: str,
        backend: str | None = None,
        activation: Activation = Activation.W8A8,
        dummy: bool = False,
        hf_config: Any = None,
    ) -> None:
        check_supported(layer, prefix)
        FusedMoEMethodBase.__init__(self, layer.moe_config)
        self.block = block
        self.prefix = prefix
        self.backend = backend
        self.activation = activation
        self.dummy = dummy
        self.hf_config = hf_config
        self.projections = projection_names(layer)
        self.grids: dict[str, BlockGrid] = {}
        self.loaded: set[tuple[str, str, int]] = set()
        """(parameter, shard, number of the expert in the model): what vLLM has loaded since the last packing."""

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register codes as bytes and scales as fp32 of this rank's experts, all filled with "not written yet".

        Shapes: w13_weight (E, 2I, H), w2_weight (E, H, I), each with a *_scale_inv (E, blocks of n, blocks of k).
        Raises:
            BlockFp8Error: tensor parallelism would cut through a block.
        """
        self._check_partition()
        inner = intermediate_size_per_partition
        self.grids = {
            "w13": BlockGrid((inner, inner), hidden_size, self.block),
            "w2": BlockGrid((hidden_size,), inner, self.block),
        }
        load = extra_weight_attrs["weight_loader"]
        for name, grid in self.grids.items():
            codes = torch.full((num_experts, grid.n, grid.k), UNWRITTEN_CODE, dtype=torch.uint8)
            scale = torch.full((num_experts, *grid.scale_shape), torch.nan, dtype=torch.float32)
            for parameter, tensor, dtypes in (
                (f"{name}_weight", codes, CODE_DTYPES),
                (f"{name}_weight_scale_inv", scale, SCALE_DTYPES),
            ):
                layer.register_parameter(parameter, torch.nn.Parameter(tensor, requires_grad=False))
                loader = self._checked_loader(load, parameter, hidden_size, dtypes)
                set_weight_attrs(getattr(layer, parameter), {"weight_loader": loader})
            set_weight_attrs(getattr(layer, f"{name}_weight_scale_inv"), {"quant_method": BLOCK_SCALES})

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check what was loaded, pack it, and drop the originals, w13's before w2 is packed.

        As with linears, weights that are loaded again renew the packed ones in place, and a layer whose new weights
        were refused serves no more.
        Raises:
            BlockFp8Error: tensors that were not in the checkpoint, NaN codes, or bad scales, by expert.
        """
        renewed = hasattr(layer, "packed_w13_weight")
        try:
            if self.dummy:
                for name in WEIGHTS:
                    fill_with_small_values(
                        getattr(layer, f"{name}_weight").data, getattr(layer, f"{name}_weight_scale_inv").data
                    )
            elif self.loaded or renewed:
                self._check_complete(layer)
            self.loaded.clear()
            for name in WEIGHTS:
                self._pack(layer, name)
        except BlockFp8Error:
            self.loaded.clear()
            layer.packed_w13_weight = layer.packed_w2_weight = None
            raise
        note_backend(self.hf_config, layer.packed_w13_weight.backend)

    def _pack(self, layer: Any, name: str) -> None:
        codes, scale = getattr(layer, f"{name}_weight").data, getattr(layer, f"{name}_weight_scale_inv").data
        start = time.perf_counter()
        packed = ops.pack_experts(
            codes.view(torch.float8_e4m3fn),
            scale,
            self.grids[name],
            self.backend,
            names=tuple(self._names(layer, name)),
            activation=self.activation,
            check_values=not self.dummy,
        )
        packing.add(packed.nbytes, time.perf_counter() - start)
        delattr(layer, f"{name}_weight")
        delattr(layer, f"{name}_weight_scale_inv")
        install_packed(layer, packed, f"{name}_weight")
        # A rank that has all its experts is packed while vLLM still goes through those of other ranks (on a reload).
        setattr(layer, f"{name}_weight_scale_inv", torch.nn.Parameter(scale.new_empty(0), requires_grad=False))
        for suffix in ("", "_scale_inv"):
            parameter = getattr(layer, f"{name}_weight{suffix}")
            set_weight_attrs(parameter, {"weight_loader": self._loader_when_packed(set(_local_experts(layer)), suffix)})

    def get_fused_moe_quant_config(self, layer: Any) -> Any:
        """What vLLM's modular kernels would ask for; there are none here, and None would be asked for at each step."""
        return FUSED_MOE_UNQUANTIZED_CONFIG

    def apply(
        self,
        layer: Any,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any,
        shared_experts_input: torch.Tensor | None,
    ) -> torch.Tensor:
        """The weighted sum of each token's experts that are on this rank, not summed over ranks.

        Shapes: x (m, H), topk_weights (m, top_k), topk_ids (m, top_k) numbers of experts in the model -> (m, H).
        """
        check_serving(layer, "packed_w2_weight", self.prefix)
        if layer.expert_map is not None:
            topk_ids = layer.expert_map[topk_ids.long()]  # -1: on another rank
        w13, w2 = layer.packed_w13_weight, layer.packed_w2_weight
        return ops.block_experts(x, w13, w2, topk_weights, topk_ids, self.activation)

    def _check_partition(self) -> None:
        """Refuse a tensor-parallel split that would leave a rank with part of a block."""
        size, ranks = self.moe.intermediate_size, self.moe.moe_parallel_config.tp_size
        working = whole_block_ranks(size, self.block)
        if ranks == 1 or ranks in working:
            return
        raise BlockFp8Error(
            f"tensor parallelism would cut through a block of {self.block} of the experts",
            where=self.prefix,
            expected=f"intermediate channels a rank in multiples of {max(self.block)}",
            got=f"{size / ranks:g} a rank (an expert has {size})",
            fix=f"use --tensor-parallel-size {' or '.join(map(str, working))} (as far as this layer is concerned), or "
            "--enable-expert-parallel, which gives each rank whole experts",
        )

    def _checked_loader(
        self, load: Callable[..., bool | None], parameter: str, hidden: int, dtypes: tuple[torch.dtype, ...]
    ) -> Callable[..., bool | None]:
        """Wrap the layer's weight loader so that what does not fit is refused with the tensor's name.

        vLLM's own takes any smaller tensor for one of a padded parameter, copies with an implicit cast, and cuts scales
        among ranks by whole rows. FP8 is handed on as bytes, which is how parameters hold it.
        """
        scales = parameter.endswith("_scale_inv")
        whole = self.moe.intermediate_size

        def load_checked(
            param: torch.nn.Parameter,
            loaded_weight: torch.Tensor,
            weight_name: str,
            shard_id: str,
            expert_id: int,
            return_success: bool = False,
        ) -> bool | None:
            where = self._tensor_name(expert_id, shard_id) + ("_scale_inv" if scales else "")
            check_dtype(loaded_weight, dtypes, where)
            n, k = (hidden, whole) if shard_id == "w2" else (whole, hidden)
            expected = scale_shape(n, k, self.block) if scales else (n, k)
            if tuple(loaded_weight.shape) != expected:
                raise BlockFp8Error(
                    "the checkpoint's tensor does not fit the experts",
                    where=where,
                    expected=expected,
                    got=tuple(loaded_weight.shape),
                    fix=DAMAGED,
                )
            if shard_id != "w2" and whole % self.block.n and _is_part_of_fused(loaded_weight):
                raise BlockFp8Error(
                    "gate and up projections of experts are in one tensor and are not whole blocks",
                    where=where,
                    expected=f"an intermediate size that is a multiple of {self.block.n}",
                    got=whole,
                    fix="store the projections of each expert as tensors of their own, each with its own scales",
                )
            if loaded_weight.dtype == torch.float8_e4m3fn:
                loaded_weight = loaded_weight.view(torch.uint8)
            with explain_load_errors(where, param, loaded_weight):
                success = load(param, loaded_weight, weight_name, shard_id, expert_id, return_success=True)
            if success and not param.is_meta:
                self.loaded.add((parameter, shard_id, expert_id))
            return success if return_success else None

        load_checked.supports_moe_loading = True  # type: ignore[attr-defined]  # Llama 4 asks
        return load_checked

    def _loader_when_packed(self, local: set[int], suffix: str) -> Callable[..., bool | None]:
        """Take no more tensors of this rank's experts, and leave those of others alone as vLLM's loader does."""

        def refuse_local(
            param: torch.nn.Parameter,
            loaded_weight: torch.Tensor,
            weight_name: str,
            shard_id: str,
            expert_id: int,
            return_success: bool = False,
        ) -> bool | None:
            if expert_id in local:
                raise BlockFp8Error(
                    "an expert's tensor came after all of its layer's had come",
                    where=self._tensor_name(expert_id, shard_id) + suffix,
                    fix="load each tensor once, and new weights through vLLM's reload_weights",
                )
            return False if return_success else None

        return refuse_local

    def _check_complete(self, layer: Any) -> None:
        """Raise for the first tensor of this rank's experts that vLLM has not loaded."""
        for expert in _local_experts(layer):
            for name, shards in WEIGHTS.items():
                for shard in shards:
                    for suffix in ("_weight", "_weight_scale_inv"):
                        if (name + suffix, shard, expert) not in self.loaded:
                            raise BlockFp8Error(
                                "an expert's tensor is missing from the checkpoint",
                                where=self._tensor_name(expert, shard) + suffix.removeprefix("_weight"),
                                fix=DAMAGED,
                            )

    def _names(self, layer: Any, name: str) -> Iterator[str]:
        """The modules whose tensors a parameter holds, expert by expert."""
        for expert in _local_experts(layer):
            for shard in WEIGHTS[name]:
                yield self._tensor_name(expert, shard).removesuffix(".weight")

    def _tensor_name(self, expert: int, shard: str) -> str:
        return f"{self.prefix}.{expert}.{self.projections[shard]}.weight"


def projection_names(layer: Any) -> dict[str, str]:
    """What the checkpoint calls vLLM's w1, w3 and w2 of an expert."""
    return {
        "w1": getattr(layer, "ckpt_gate_proj_name", "gate_proj"),
        "w3": getattr(layer, "ckpt_up_proj_name", "up_proj"),
        "w2": getattr(layer, "ckpt_down_proj_name", "down_proj"),
    }


def check_supported(layer: Any, prefix: str) -> None:
    """Refuse experts that compute something else than silu(gate) * up, down, and a weighted sum.

    Raises:
        BlockFp8Error: names what.
    """
    moe = layer.moe_config
    activation = getattr(layer.activation, "value", layer.activation)
    limits = {name: getattr(layer, name, None) for name in ("swiglu_limit", "swiglu_alpha", "swiglu_beta")}
    refused = {
        "biases": moe.has_bias,
        f"the activation {activation}": activation != "silu",
        "a clamped or scaled activation (swiglu_limit)": any(value is not None for value in limits.values()),
        "router weights on their input (apply_router_weight_on_input)": layer.apply_router_weight_on_input,
    }
    for what, asked in refused.items():
        if asked:
            raise BlockFp8Error(
                f"block-FP8 experts with {what} are not served",
                where=prefix,
                expected="silu(gate) * up, and weights on the output",
                fix="serve the bf16 model",
            )
    if moe.is_lora_enabled:
        raise BlockFp8Error(
            "LoRA adapters are not served beside block-FP8 experts", where=prefix, fix="leave --enable-lora out"
        )
    if moe.moe_parallel_config.enable_eplb:
        raise BlockFp8Error("block-FP8 experts cannot move between ranks", where=prefix, fix="leave --enable-eplb out")


def _local_experts(layer: Any) -> list[int]:
    """Numbers in the model of the experts on this rank, in the order of the parameters."""
    if layer.expert_map is None:
        return list(range(layer.local_num_experts))
    pairs = enumerate(layer.expert_map.tolist())
    return [expert for _, expert in sorted((local, expert) for expert, local in pairs if local >= 0)]


def _is_part_of_fused(tensor: torch.Tensor) -> bool:
    """Whether vLLM took a tensor out of one of all experts: (experts, n, k) cut in halves and taken apart."""
    return tensor._base is not None and tensor._base.dim() == 3
