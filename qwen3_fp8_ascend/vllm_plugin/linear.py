"""The linear method: declares weight and scale, lets vLLM load the shards, packs them once, multiplies."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from vllm.model_executor.layers.linear import LinearMethodBase, register_weight_loader_v2_supported_method
from vllm.model_executor.parameter import ModelWeightParameter

from qwen3_fp8_ascend import ops
from qwen3_fp8_ascend.errors import BlockFp8Error
from qwen3_fp8_ascend.format import Activation, BlockGrid, BlockSize
from qwen3_fp8_ascend.vllm_plugin.loading import (
    UNWRITTEN_CODE,
    ShardScaleParameter,
    check_serving,
    checked_loader,
    fill_with_small_values,
    install_packed,
    note_backend,
    packing,
    scale_note,
    shard_numbers,
)
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
        scale_name: str = "weight_scale_inv",
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
            BlockFp8Error: tensor parallelism would cut through a block.
        """
        grid = BlockGrid(tuple(output_partition_sizes), input_size_per_partition, self.block)
        self._check_partition(layer, grid, input_size, output_size)
        layer.block_grid = grid
        layer.logical_widths = output_partition_sizes
        layer.weight_block_size = list(self.block)
        self._declare(layer, grid, extra_weight_attrs["weight_loader"])
        self.renewal = Renewal(
            declare=lambda staged: self._declare(staged, grid, extra_weight_attrs["weight_loader"]),
            missing=lambda: self._missing(grid),
            pack=lambda staged: self._pack(
                layer, staged.get_parameter("weight").data, staged.get_parameter(self.scale_name).data
            ),
        )

    def _declare(self, layer: torch.nn.Module, grid: BlockGrid, load: Callable[..., None]) -> None:
        codes = torch.full((grid.n, grid.k), UNWRITTEN_CODE, dtype=torch.uint8)
        layer.register_parameter(
            "weight",
            ModelWeightParameter(
                data=codes,
                input_dim=1,
                output_dim=0,
                weight_loader=checked_loader(
                    load, f"{self.prefix}.weight", grid, (torch.float8_e4m3fn,), self.loaded["weight"]
                ),
            ),
        )
        layer.register_parameter(
            self.scale_name,
            ShardScaleParameter(
                data=torch.full(grid.scale_shape, torch.nan, dtype=torch.float32),
                grid=grid,
                input_dim=1,
                output_dim=0,
                weight_loader=checked_loader(
                    load,
                    f"{self.prefix}.{self.scale_name}",
                    grid,
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
        codes, scale, grid = layer.weight.data, getattr(layer, self.scale_name).data, layer.block_grid
        random = self.dummy and not any(self.loaded.values())
        if random:
            fill_with_small_values(codes, scale)
        elif hasattr(layer, "packed_weight"):
            self._mark_unwritten(codes, scale, grid)
        self._pack(layer, codes, scale, check_values=not random)

    def _pack(self, layer: Any, codes: torch.Tensor, scale: torch.Tensor, check_values: bool = True) -> None:
        for shards in self.loaded.values():
            shards.clear()
        grid, start = layer.block_grid, time.perf_counter()
        try:
            packed = ops.pack_weight(
                codes.view(torch.float8_e4m3fn),
                scale,
                grid,
                self.backend,
                names=self._names_of(grid),
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
        setattr(layer, self.scale_name, torch.nn.Parameter(scale.new_empty(0), requires_grad=False))
        for parameter in self.loaded:
            self.renewal.offer(layer, parameter)
        note_backend(self.hf_config, packed.backend)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        check_serving(layer, "packed_weight", self.prefix)
        self.renewal.check_whole(self.prefix)
        return ops.block_linear(x, layer.packed_weight, bias, self.activation)

    def _check_partition(self, layer: Any, grid: BlockGrid, input_size: int, output_size: int) -> None:
        """Refuse a tensor-parallel split that would leave a rank with part of a block."""
        if grid.k != input_size:
            side, size, mine, full = "columns", grid.block.k, [grid.k], [input_size]
        elif grid.n != output_size:
            side, size, mine = "rows", grid.block.n, list(grid.widths)
            full = self._full_widths(layer, grid, output_size)
        else:
            return
        cut = [width for width in mine if width % size]
        if not cut:
            return
        working = [ranks for ranks in range(1, 65) if ranks == 1 or all(w % (ranks * size) == 0 for w in full)]
        raise BlockFp8Error(
            f"tensor parallelism would cut through a block of {grid.block}",
            where=self.prefix,
            expected=f"{side} a rank in multiples of {size}",
            got=f"{cut[0]} a rank (the whole layer has {' + '.join(map(str, full))})",
            fix=f"use --tensor-parallel-size {' or '.join(map(str, working))} (as far as this layer is concerned)",
        )

    @staticmethod
    def _full_widths(layer: Any, grid: BlockGrid, output_size: int) -> list[int]:
        if hasattr(layer, "total_num_kv_heads"):  # QKVParallelLinear: key/value heads may be replicated
            heads = (layer.total_num_heads, layer.total_num_kv_heads, layer.total_num_kv_heads)
            return [count * layer.head_size for count in heads]
        return [width * (output_size // grid.n) for width in grid.widths]

    def _names_of(self, grid: BlockGrid) -> tuple[str, ...]:
        """The checkpoint's module of each shard; the layer's own name where vLLM cuts one module into shards."""
        shards = len(grid.widths)
        return self.shard_names if len(self.shard_names) == shards else (self.prefix,) * shards

    def _missing(self, grid: BlockGrid) -> Iterator[str]:
        """The checkpoint's tensors that vLLM has not loaded since the last packing."""
        names = self._names_of(grid)
        for tensor, shards in self.loaded.items():
            loaded = shard_numbers(shards, len(names))
            yield from (f"{name}.{tensor}" for number, name in enumerate(names) if number not in loaded)

    def _mark_unwritten(self, codes: torch.Tensor, scale: torch.Tensor, grid: BlockGrid) -> None:
        """Fill what was not loaded with "not written yet": parameters for loading again start as arbitrary memory."""
        targets = (
            (codes, grid.widths, "weight", UNWRITTEN_CODE),
            (scale, grid.scale_rows, self.scale_name, torch.nan),
        )
        for tensor, rows, name, unwritten in targets:
            loaded = shard_numbers(self.loaded[name], len(rows))
            for shard, part in enumerate(tensor.split(list(rows))):
                if shard not in loaded:
                    part.fill_(unwritten)
