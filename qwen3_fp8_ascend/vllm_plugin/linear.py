"""The linear method: declares weight and scale, lets vLLM load the shards, packs them once, multiplies."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from vllm.distributed import get_tp_group, tensor_model_parallel_all_gather
from vllm.model_executor.layers.linear import LinearMethodBase, register_weight_loader_v2_supported_method
from vllm.model_executor.parameter import ModelWeightParameter

from qwen3_fp8_ascend import ops
from qwen3_fp8_ascend.errors import BlockFp8Error
from qwen3_fp8_ascend.format import SCALE_NAME, Activation, BlockSize
from qwen3_fp8_ascend.vllm_plugin.loading import (
    UNWRITTEN_CODE,
    ShardScaleParameter,
    check_served,
    check_serving,
    checked_loader,
    fill_with_small_values,
    install_packed,
    no_scale,
    note_backend,
    packing,
    scale_note,
    shard_numbers,
)
from qwen3_fp8_ascend.vllm_plugin.partition import Partition, divides_groups
from qwen3_fp8_ascend.vllm_plugin.renewal import Renewal, is_packed


@register_weight_loader_v2_supported_method
class BlockFp8LinearMethod(LinearMethodBase):
    """Block-FP8 weights for every linear layer vLLM has, merged and tensor-parallel ones included.

    prefix: the layer's full name. shard_names: the checkpoint's modules that vLLM merged into it.
    scale_name: what the checkpoint calls block scales, and so the parameter.
    dummy: weights are random (``--load-format dummy``), so their values are not checked.
    hf_config: the model's, for `note_backend`.
    """

    def __init__(
        self,
        block: BlockSize,
        *,
        prefix: str,
        shard_names: tuple[str, ...] = (),
        backend: str | None = None,
        activation: Activation = Activation.W8A8,
        dummy: bool = False,
        hf_config: Any = None,
        scale_name: str = SCALE_NAME,
    ) -> None:
        self.scale_name = scale_name
        self.block = block
        self.prefix = prefix
        self.shard_names = shard_names
        self.backend = backend
        self.activation = activation
        self.dummy = dummy
        self.hf_config = hf_config
        self.loaded: dict[str, set[Any]] = {"weight": set(), scale_name: set()}
        """Which shards vLLM has loaded since the last packing."""
        self.renewal: Renewal

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register ``weight`` (n, k) uint8 and its fp32 scales, both filled with "not written yet".

        The codes are bytes from the first moment on: NPUs before the Ascend 950 can neither cast nor copy FP8.
        Raises:
            BlockFp8Error: no backend here serves blocks of that size, or none that was named; or tensor parallelism
                would cut through a block where the ranks cannot agree on its activations.
        """
        widths = tuple(output_partition_sizes)
        partition = self._partition(layer, widths, input_size_per_partition, input_size, output_size)
        whole = self._full_widths(layer, widths, output_size)
        layer.logical_widths = output_partition_sizes
        layer.weight_block_size = list(self.block)
        self._register(layer, partition, whole, extra_weight_attrs["weight_loader"])

    def _register(self, layer: Any, partition: Partition, whole: tuple[int, ...], load: Callable[..., None]) -> None:
        """whole: rows of each shard before ranks divide them."""
        layer.block_partition = partition
        self._declare(layer, partition, whole, load)
        self.renewal = Renewal(
            declare=lambda staged: self._declare(staged, partition, whole, load),
            missing=lambda: self._missing(partition),
            pack=lambda staged: self._pack(
                layer, staged.get_parameter("weight").data, staged.get_parameter(self.scale_name).data
            ),
        )

    def _declare(
        self, layer: torch.nn.Module, partition: Partition, whole: tuple[int, ...], load: Callable[..., None]
    ) -> None:
        codes = torch.full((sum(partition.widths), partition.k), UNWRITTEN_CODE, dtype=torch.uint8)
        check_served(self.backend, codes.device, self.activation, self.block)
        layer.register_parameter(
            "weight",
            ModelWeightParameter(
                data=codes,
                input_dim=1,
                output_dim=0,
                weight_loader=checked_loader(
                    load, f"{self.prefix}.weight", whole, self.block.n, (torch.float8_e4m3fn,), self.loaded["weight"]
                ),
            ),
        )
        layer.register_parameter(
            self.scale_name,
            ShardScaleParameter(
                data=torch.full(partition.scale_shape, torch.nan, dtype=torch.float32),
                partition=partition,
                input_dim=1,
                output_dim=0,
                weight_loader=checked_loader(
                    load,
                    f"{self.prefix}.{self.scale_name}",
                    whole,
                    self.block.n,
                    ops.SCALE_DTYPES,
                    self.loaded[self.scale_name],
                ),
            ),
        )

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check what was loaded, pack it, and drop the originals: one resident copy at one byte a weight.

        When weights are loaded again, vLLM calls this again for each layer; the packed copy is then renewed in place.
        A layer whose new weights were refused serves no more: the others already have their new ones.
        Raises:
            BlockFp8Error: tensors that were not in the checkpoint, NaN codes, or bad scales, by name.
        """
        if is_packed(layer.weight):  # a trainer asks for it after `model.load_weights`, which has packed already
            self.renewal.check_whole(self.prefix)
            return
        codes, scale, partition = layer.weight.data, getattr(layer, self.scale_name).data, layer.block_partition
        random = self.dummy and not any(self.loaded.values())
        if random:
            fill_with_small_values(codes, scale)
        elif hasattr(layer, "packed_weight"):
            self._mark_unwritten(codes, scale, partition)
        self._pack(layer, codes, scale, check_values=not random)

    def _pack(self, layer: Any, codes: torch.Tensor, scale: torch.Tensor, check_values: bool = True) -> None:
        for shards in self.loaded.values():
            shards.clear()
        partition, start = layer.block_partition, time.perf_counter()
        try:
            packed = ops.pack_weight(
                partition.pad_codes(codes).view(torch.float8_e4m3fn),
                scale,
                partition.grid,
                self.backend,
                names=self._names_of(partition),
                scale_name=self.scale_name,
                activation=self.activation,
                check_values=check_values,
            )
        except BlockFp8Error:
            layer.packed_weight = None
            raise
        packing.add(packed.nbytes, time.perf_counter() - start)
        if check_values:
            scale_note.look(scale, self.activation, self.prefix)
        install_packed(layer, packed)
        setattr(layer, self.scale_name, no_scale(scale))
        for parameter in self.loaded:
            self.renewal.offer(layer, parameter)
        note_backend(self.hf_config, packed.backend)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        check_serving(layer, "packed_weight", self.prefix)
        self.renewal.check_whole(self.prefix)
        x = layer.block_partition.pad(x, tensor_model_parallel_all_gather)
        return ops.block_linear(x, layer.packed_weight, bias, self.activation)

    def _partition(self, layer: Any, widths: tuple[int, ...], k: int, input_size: int, output_size: int) -> Partition:
        """This rank's rows and columns; a cut may fall within a block.

        Raises:
            BlockFp8Error: a cut divides groups of activations that are quantized, and the ranks that share the layer
                are not those that vLLM exchanges tensors between; or which rows a rank has is not known here.
        """
        if k != input_size:
            rank, ranks = layer.tp_rank, input_size // k
            if divides_groups(k, ranks, self.block, self.activation) and not is_whole_group(rank, layer.tp_size):
                whole = [r for r in range(1, 65) if r == 1 or input_size % (r * self.block.k) == 0]
                raise BlockFp8Error(
                    f"tensor parallelism would cut through a block of {self.block}",
                    where=self.prefix,
                    expected=f"columns a rank in multiples of {self.block.k}, or all tensor-parallel ranks of vLLM",
                    got=f"{k} a rank (the whole layer has {input_size}), on {ranks} ranks of their own",
                    fix=f"divide this layer by {' or '.join(map(str, whole))}, or set `activation` to w8a16",
                )
            return Partition.of_columns(self.block, widths, k, rank, ranks, self.activation)
        if sum(widths) == output_size:
            return Partition(self.block, widths, k)
        ranks_of_shards = [layer.tp_rank] * len(widths)
        if replicas := getattr(layer, "num_kv_head_replicas", None):  # QKVParallelLinear
            ranks_of_shards[1:] = [layer.tp_rank // replicas] * (len(widths) - 1)
            if len(widths) != 3 and any(width % self.block.n for width in widths):
                raise BlockFp8Error(
                    f"tensor parallelism would cut through a block of {self.block} of a layer of unknown form",
                    where=self.prefix,
                    expected=f"query, key and value, or rows a rank in multiples of {self.block.n}",
                    got=" + ".join(map(str, widths)),
                    fix="use a smaller --tensor-parallel-size",
                )
        rows = tuple(rank * width for rank, width in zip(ranks_of_shards, widths, strict=True))
        return Partition(self.block, widths, k, rows=rows)

    @staticmethod
    def _full_widths(layer: Any, widths: tuple[int, ...], output_size: int) -> tuple[int, ...]:
        """The rows of each shard before ranks divide them."""
        if len(widths) == 3 and hasattr(layer, "total_num_kv_heads"):  # key/value heads may be replicated
            heads = (layer.total_num_heads, layer.total_num_kv_heads, layer.total_num_kv_heads)
            return tuple(count * layer.head_size for count in heads)
        return tuple(width * (output_size // sum(widths)) for width in widths)

    def _names_of_shards(self, partition: Partition) -> tuple[str, ...]:
        """The checkpoint's module of each shard; the layer's own name where vLLM cuts one module into shards."""
        shards = len(partition.widths)
        return self.shard_names if len(self.shard_names) == shards else (self.prefix,) * shards

    def _names_of(self, partition: Partition) -> tuple[str, ...]:
        """The same for each packed shard."""
        names = self._names_of_shards(partition)
        return tuple(name for shard, name in enumerate(names) for _ in partition.parts(shard))

    def _missing(self, partition: Partition) -> Iterator[str]:
        """The checkpoint's tensors that vLLM has not loaded since the last packing."""
        names = self._names_of_shards(partition)
        for tensor, shards in self.loaded.items():
            loaded = shard_numbers(shards, len(names))
            yield from (f"{name}.{tensor}" for number, name in enumerate(names) if number not in loaded)

    def _mark_unwritten(self, codes: torch.Tensor, scale: torch.Tensor, partition: Partition) -> None:
        """Fill what was not loaded with "not written yet": parameters for loading again start as arbitrary memory."""
        targets = (
            (codes, partition.widths, "weight", UNWRITTEN_CODE),
            (scale, [extent.count for extent in partition.scale_rows], self.scale_name, torch.nan),
        )
        for tensor, rows, name, unwritten in targets:
            loaded = shard_numbers(self.loaded[name], len(rows))
            for shard, part in enumerate(tensor.split(list(rows))):
                if shard not in loaded:
                    part.fill_(unwritten)


def is_whole_group(rank: int, ranks: int) -> bool:
    """Whether the ranks that share a layer are those of vLLM's tensor parallelism, in their order."""
    group = get_tp_group()
    return bool((rank, ranks) == (group.rank_in_group, group.world_size))
