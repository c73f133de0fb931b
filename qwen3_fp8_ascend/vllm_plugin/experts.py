"""The method for mixtures of experts: declares the experts' weights, lets vLLM load them, packs them once, multiplies.

vLLM routes: it gives each token's experts and their weights, and adds shared experts and what other ranks computed.
Where its router on a CPU would not choose right, `routing.py` does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from vllm.distributed import tensor_model_parallel_all_gather
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.config import FUSED_MOE_UNQUANTIZED_CONFIG
from vllm.model_executor.utils import set_weight_attrs

from qwen3_fp8_ascend import ops
from qwen3_fp8_ascend.checkpoints.experts import whole_block_ranks
from qwen3_fp8_ascend.errors import BlockFp8Error
from qwen3_fp8_ascend.format import SCALE_NAME, Activation, BlockSize, scale_shape
from qwen3_fp8_ascend.vllm_plugin.expert_layer import check_supported, glu_of, local_experts, projection_names
from qwen3_fp8_ascend.vllm_plugin.linear import is_whole_group
from qwen3_fp8_ascend.vllm_plugin.loading import (
    DAMAGED,
    UNWRITTEN_CODE,
    as_held,
    check_dtype,
    check_served,
    check_serving,
    explain_load_errors,
    fill_with_small_values,
    install_packed,
    no_scale,
    note_backend,
    packing,
    scale_note,
    without_single_axes,
)
from qwen3_fp8_ascend.vllm_plugin.partition import Partition, divides_groups, partitions_of_experts
from qwen3_fp8_ascend.vllm_plugin.renewal import Renewal, is_packed
from qwen3_fp8_ascend.vllm_plugin.routing import own_routing

WEIGHTS = {"w13": ("w1", "w3"), "w2": ("w2",)}
"""vLLM's names: gate and up of all experts merged, and down; which of an expert's tensors each parameter holds."""

CODE_DTYPES = (torch.float8_e4m3fn,)
BLOCK_SCALES = "block"
"""`FusedMoeWeightScaleSupported.BLOCK` by its value: what tells vLLM's loader how scales are cut among ranks."""


class BlockFp8ExpertsMethod(FusedMoEMethodBase):
    """Block-FP8 weights for the routed experts of a layer.

    Any division of whole experts among ranks, and tensor parallelism anywhere, through blocks too (`partition.py`). The
    arguments are those of `BlockFp8LinearMethod`; layer: vLLM's `RoutedExperts`.
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
        scale_name: str = SCALE_NAME,
    ) -> None:
        check_supported(layer, prefix)
        FusedMoEMethodBase.__init__(self, layer.moe_config)
        self.scale_ending = scale_name.removeprefix("weight")
        self.block = block
        self.prefix = prefix
        self.backend = backend
        self.activation = activation
        self.dummy = dummy
        self.hf_config = hf_config
        self.projections = projection_names(layer)
        self.routing = own_routing(layer)
        self.glu = glu_of(layer, prefix)
        self.partitions: dict[str, Partition] = {}
        """What this rank holds of gate and up, and of down."""
        self.renewal: Renewal
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

        Shapes: w13_weight (E, 2I, H), w2_weight (E, H, I), each with its scales (E, blocks of n, blocks of k): those of
            all blocks that this rank has part of.
        Raises:
            BlockFp8Error: no backend here serves experts in blocks of that size, or none that was named; or tensor
                parallelism would cut through a block where the ranks cannot agree on its activations.
        """
        self.partitions = self._partitions(hidden_size, intermediate_size_per_partition)
        load = extra_weight_attrs["weight_loader"]
        self._declare(layer, num_experts, load)
        self.renewal = Renewal(
            declare=lambda staged: self._declare(staged, num_experts, load),
            missing=lambda: self._missing(layer),
            pack=lambda staged: self._pack_all(layer, staged),
        )

    def _declare(self, layer: torch.nn.Module, experts: int, load: Callable[..., bool | None]) -> None:
        hidden = self.partitions["w13"].k
        for name, partition in self.partitions.items():
            codes = torch.full((experts, sum(partition.widths), partition.k), UNWRITTEN_CODE, dtype=torch.uint8)
            scale = torch.full((experts, *partition.scale_shape), torch.nan, dtype=torch.float32)
            check_served(self.backend, codes.device, self.activation, self.block, experts=True)
            for parameter, tensor, dtypes in (
                (f"{name}_weight", codes, CODE_DTYPES),
                (self._scale_of(name), scale, ops.SCALE_DTYPES),
            ):
                layer.register_parameter(parameter, torch.nn.Parameter(tensor, requires_grad=False))
                loader = self._checked_loader(load, parameter, hidden, dtypes)
                set_weight_attrs(getattr(layer, parameter), {"weight_loader": loader})
            set_weight_attrs(getattr(layer, self._scale_of(name)), {"quant_method": BLOCK_SCALES})

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check what was loaded, pack it, and drop the originals, w13's before w2 is packed.

        As with linears, weights that are loaded again renew the packed ones in place, and a layer whose new weights
        were refused serves no more.
        Raises:
            BlockFp8Error: tensors that were not in the checkpoint, NaN codes, or bad scales, by expert.
        """
        if is_packed(layer.w13_weight):  # a trainer asks for it after `model.load_weights`, which has packed already
            self.renewal.check_whole(self.prefix)
            return
        random = self.dummy and not self.loaded
        if random:
            for name in WEIGHTS:
                codes, scale = getattr(layer, f"{name}_weight"), getattr(layer, self._scale_of(name))
                fill_with_small_values(codes.data, scale.data)
        elif self.loaded or hasattr(layer, "packed_w13_weight"):
            with self._serving_no_more(layer):
                self._check_complete(layer)
        self._pack_all(layer, layer, check_values=not random)

    def _pack_all(self, layer: Any, source: Any, check_values: bool = True) -> None:
        """Pack the tensors that `source` has under vLLM's names, and take them from it one by one."""
        self.loaded.clear()
        with self._serving_no_more(layer):
            for name in WEIGHTS:
                self._pack(layer, source, name, check_values)
        note_backend(self.hf_config, layer.packed_w13_weight.backend)

    @contextmanager
    def _serving_no_more(self, layer: Any) -> Iterator[None]:
        """Leave a layer without weights if its new ones are refused."""
        try:
            yield
        except BlockFp8Error:
            self.loaded.clear()
            layer.packed_w13_weight = layer.packed_w2_weight = None
            raise

    def _pack(self, layer: Any, source: Any, name: str, check_values: bool) -> None:
        codes, scale = getattr(source, f"{name}_weight").data, getattr(source, self._scale_of(name)).data
        partition, start = self.partitions[name], time.perf_counter()
        packed = ops.pack_experts(
            (partition.pad_codes(expert).view(torch.float8_e4m3fn) for expert in codes),
            scale,
            partition.grid,
            self.backend,
            names=tuple(self._names(layer, name)),
            scale_name=f"weight{self.scale_ending}",
            activation=self.activation,
            check_values=check_values,
        )
        packing.add(packed.nbytes, time.perf_counter() - start)
        if check_values:
            scale_note.look(scale, self.activation, self.prefix)
        del codes
        delattr(source, f"{name}_weight")
        delattr(source, self._scale_of(name))
        install_packed(layer, packed, f"{name}_weight")
        setattr(layer, self._scale_of(name), no_scale(scale))
        local = frozenset(local_experts(layer))
        for parameter in (f"{name}_weight", self._scale_of(name)):
            self.renewal.offer(layer, parameter, self._loader_when_packed(local, parameter))

    def get_fused_moe_quant_config(self, layer: Any) -> Any:
        """What vLLM's modular kernels would ask for; there are none here, and None would be asked for at each step."""
        return FUSED_MOE_UNQUANTIZED_CONFIG

    @property
    def is_monolithic(self) -> bool:
        """Whether vLLM hands over its router's logits instead of experts: where its router would not choose right."""
        return self.routing is not None

    def apply_monolithic(
        self, layer: Any, x: torch.Tensor, router_logits: torch.Tensor, input_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        """As `apply`, with experts chosen here. Shapes: x (m, H), router_logits (m, experts in the model) -> (m, H)."""
        assert self.routing is not None  # is_monolithic
        weights, ids = self.routing.choose(router_logits)
        return self.apply(layer, x, weights, ids, None, None)

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
        self.renewal.check_whole(self.prefix)
        if layer.apply_router_weight_on_input:  # of one expert a token: Llama 4
            x, topk_weights = x * topk_weights.to(x.dtype), torch.ones_like(topk_weights)
        if layer.expert_map is not None:
            topk_ids = layer.expert_map[topk_ids.long()]  # -1: on another rank
        w13, w2 = layer.packed_w13_weight, layer.packed_w2_weight
        between = self.pad_activation if self.partitions["w2"].pads else None
        return ops.block_experts(x, w13, w2, topk_weights, topk_ids, self.activation, self.glu, between=between)

    def pad_activation(self, a: torch.Tensor) -> torch.Tensor:
        """What this rank's part of the down projection takes; all ranks call it for the same rows in the same order.

        Shapes: a (rows, I) -> (rows, k of the packed w2).
        """
        return self.partitions["w2"].pad(a, tensor_model_parallel_all_gather)

    def _partitions(self, hidden: int, inner: int) -> dict[str, Partition]:
        """This rank's rows of gate and up and columns of down; a cut may fall within a block.

        Raises:
            BlockFp8Error: a cut divides groups of activations that are quantized, and the ranks that share the layer
                are not those that vLLM exchanges tensors between.
        """
        parallel = self.moe.moe_parallel_config
        rank, ranks = parallel.tp_rank, parallel.tp_size
        if divides_groups(inner, ranks, self.block, self.activation) and not is_whole_group(rank, ranks):
            working = whole_block_ranks(self.moe.intermediate_size, self.block)
            raise BlockFp8Error(
                f"tensor parallelism would cut through a block of {self.block} of the experts",
                where=self.prefix,
                expected=f"channels a rank in multiples of {self.block.k}, or all tensor-parallel ranks of vLLM",
                got=f"{inner} a rank (an expert has {self.moe.intermediate_size}), on {ranks} ranks, those of data "
                "parallelism included",
                fix=f"divide the experts by {' or '.join(map(str, working))}, set `activation` to w8a16, or use "
                "--enable-expert-parallel, which gives each rank whole experts",
            )
        w13, w2 = partitions_of_experts(self.block, hidden, inner, rank, ranks, self.activation)
        return {"w13": w13, "w2": w2}

    def _checked_loader(
        self, load: Callable[..., bool | None], parameter: str, hidden: int, dtypes: tuple[torch.dtype, ...]
    ) -> Callable[..., bool | None]:
        """Wrap the layer's weight loader so that what does not fit is refused with the tensor's name.

        vLLM's own takes any smaller tensor for one of a padded parameter, and copies with an implicit cast. It cuts
        scales among ranks by whole rows: those of ranks that start within a block are loaded here (`_load_scales`).
        Tensors are handed on as parameters hold them (`as_held`).
        """
        scales = parameter.endswith(f"_weight{self.scale_ending}")
        whole = self.moe.intermediate_size

        def load_checked(
            param: torch.nn.Parameter,
            loaded_weight: torch.Tensor,
            weight_name: str,
            shard_id: str,
            expert_id: int,
            return_success: bool = False,
        ) -> bool | None:
            where = self._tensor_name(expert_id, shard_id) + (self.scale_ending if scales else "")
            loaded_weight = without_single_axes(loaded_weight)
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
            if shard_id != "w2" and whole % self.block.n and _is_half_of_fused(loaded_weight):
                raise BlockFp8Error(
                    "gate and up projections of experts are in one tensor and are not whole blocks",
                    where=where,
                    expected=f"an intermediate size that is a multiple of {self.block.n}",
                    got=whole,
                    fix="store the projections of each expert as tensors of their own, each with its own scales",
                )
            loaded_weight = as_held(loaded_weight)
            with explain_load_errors(where, param, loaded_weight):
                success: bool | None
                if scales and self._cut:
                    success = self._load_scales(param, loaded_weight, shard_id, expert_id)
                else:
                    success = load(param, loaded_weight, weight_name, shard_id, expert_id, return_success=True)
            if success and not param.is_meta:
                self.loaded.add((parameter, shard_id, expert_id))
            return success if return_success else None

        load_checked.supports_moe_loading = True  # type: ignore[attr-defined]  # Llama 4 asks
        return load_checked

    @property
    def _cut(self) -> bool:
        """Whether ranks start or end within blocks. Each has all experts then: vLLM divides experts or channels."""
        inner = self.partitions["w2"].k
        return inner != self.moe.intermediate_size and any(inner % size for size in self.block)

    def _load_scales(self, param: torch.nn.Parameter, loaded: torch.Tensor, shard_id: str, expert: int) -> bool:
        """Take the scales of the blocks that this rank has part of."""
        target = param.data[expert]
        if shard_id == "w2":
            columns = self.partitions["w2"].scale_columns
            part = loaded.narrow(1, columns.first, columns.count)
        else:
            shard = WEIGHTS["w13"].index(shard_id)
            rows = self.partitions["w13"].scale_rows[shard]
            target = target.narrow(0, shard * rows.count, rows.count)
            part = loaded.narrow(0, rows.first, rows.count)
        target.copy_(part)
        return True

    def _loader_when_packed(self, local: Collection[int], parameter: str) -> Callable[..., bool | None]:
        """Take new tensors of this rank's experts, and leave those of others alone as vLLM's loader does."""

        def load(
            param: torch.nn.Parameter,
            loaded_weight: torch.Tensor,
            weight_name: str,
            shard_id: str,
            expert_id: int,
            return_success: bool = False,
        ) -> bool | None:
            if expert_id not in local:
                return False if return_success else None
            taken: bool | None = self.renewal.take(
                parameter, loaded_weight, weight_name, shard_id, expert_id, return_success=return_success
            )
            return taken

        return load

    def _check_complete(self, layer: Any) -> None:
        """Raise for the first tensor of this rank's experts that vLLM has not loaded."""
        for name in self._missing(layer):
            raise BlockFp8Error("an expert's tensor is missing from the checkpoint", where=name, fix=DAMAGED)

    def _missing(self, layer: Any) -> Iterator[str]:
        """The tensors of this rank's experts that vLLM has not loaded since the last packing."""
        shards = [(name, shard) for name, parts in WEIGHTS.items() for shard in parts]
        experts = local_experts(layer)
        if len(self.loaded) == 2 * len(shards) * len(experts):  # asked after each of thousands of tensors
            return
        for expert in experts:
            for name, shard in shards:
                for suffix in ("_weight", f"_weight{self.scale_ending}"):
                    if (name + suffix, shard, expert) not in self.loaded:
                        yield self._tensor_name(expert, shard) + suffix.removeprefix("_weight")

    def _names(self, layer: Any, name: str) -> Iterator[str]:
        """The modules whose tensors a packed weight holds, expert by expert: one for each shard of its grid."""
        partition = self.partitions[name]
        for expert in local_experts(layer):
            for number, shard in enumerate(WEIGHTS[name]):
                for _ in partition.parts(number):
                    yield self._tensor_name(expert, shard).removesuffix(".weight")

    def _scale_of(self, name: str) -> str:
        """The parameter of the scales of w13 or w2; vLLM makes the name out of the checkpoint's own."""
        return f"{name}_weight{self.scale_ending}"

    def _tensor_name(self, expert: int, shard: str) -> str:
        return f"{self.prefix}.{expert}.{self.projections[shard]}.weight"


def _is_half_of_fused(tensor: torch.Tensor) -> bool:
    """Whether vLLM took a tensor out of gate and up of all experts: (experts, 2n, k) cut in halves and taken apart."""
    base = tensor._base
    return base is not None and base.dim() == 3 and tuple(base.shape[1:]) != tuple(tensor.shape)
