"""The output head in block FP8: as the checkpoint has it, or quantized at load from one in bf16, which is opt-in."""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from qwen3_fp8_ascend import ops
from qwen3_fp8_ascend.checkpoints.quantize import quantize_weight
from qwen3_fp8_ascend.errors import BlockFp8Error
from qwen3_fp8_ascend.format import Activation, BlockGrid, BlockSize, ceil_div
from qwen3_fp8_ascend.vllm_plugin.linear import BlockFp8LinearMethod
from qwen3_fp8_ascend.vllm_plugin.loading import ShardScaleParameter, install_packed, note_backend
from qwen3_fp8_ascend.vllm_plugin.partition import Partition


class BlockFp8HeadMethod(BlockFp8LinearMethod):
    """A head whose codes and scales are in the checkpoint: a linear whose rows are the vocabulary.

    Each rank has the tokens that vLLM gives it, cut anywhere. The rows with which vLLM fills up the vocabulary are not
    stored: their logits, which it drops, are zero.
    """

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
        """Register this rank's tokens, as `BlockFp8LinearMethod.create_weights` does.

        Raises:
            BlockFp8Error: the vocabulary has tokens that the checkpoint's head does not know.
        """
        if layer.num_added_embeddings:
            raise BlockFp8Error(
                "tokens are added to a vocabulary whose head is in FP8",
                where=self.prefix,
                expected=layer.org_vocab_size,
                got=layer.num_embeddings,
                fix="leave them out",
            )
        first, end = layer.shard_indices.org_vocab_start_index, layer.shard_indices.org_vocab_end_index
        partition = Partition(self.block, (end - first,), input_size, rows=(first,))

        def load(param: torch.nn.Parameter, loaded_weight: torch.Tensor) -> None:
            rows, start, count = layer.org_vocab_size, first, end - first
            if isinstance(param, ShardScaleParameter):
                (extent,) = partition.scale_rows
                rows, start, count = ceil_div(rows, self.block.n), extent.first, extent.count
            if tuple(loaded_weight.shape) != (rows, param.shape[1]):
                raise ValueError(f"expected the whole vocabulary: {(rows, param.shape[1])}")
            param.data.copy_(loaded_weight.narrow(0, start, count))

        self._register(layer, partition, (layer.org_vocab_size,), load)
        self.padding = sum(output_partition_sizes) - (end - first)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        rows = sum(layer.block_partition.widths)
        logits = super().apply(layer, x, None if bias is None else bias[:rows])
        return torch.nn.functional.pad(logits, (0, self.padding))

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        """config.json says that the head is the embedding: then no framework reads the head that is stored."""
        delattr(layer, self.scale_name)
        layer.quant_method = UnquantizedEmbeddingMethod()
        return layer.quant_method.tie_weights(layer, embed_tokens)


class BlockFp8LmHeadMethod(UnquantizedEmbeddingMethod):
    """Loads the head as the checkpoint has it, then quantizes and packs it; an untied bf16 original is freed.

    At batch 1 a decode step reads every weight once. Qwen3-8B's bf16 head is 1.24 GB of 8.19 GB; at one byte a weight
    it is half that. Activations are not quantized here (W8A16), since the head's input decides the token.
    """

    supports_pre_processed_weights = False

    def __init__(self, block: BlockSize, backend: str | None = None, hf_config: Any = None) -> None:
        self.block = block
        self.backend = backend
        self.hf_config = hf_config

    def process_weights_after_loading(self, layer: Any) -> None:
        codes, scale = _quantize_in_pieces(layer.weight.data, self.block)
        # With tied embeddings the bf16 parameter stays with the embedding.
        grid = BlockGrid((codes.shape[0],), codes.shape[1], self.block)
        packed = ops.pack_weight(codes, scale, grid, self.backend, activation=Activation.W8A16)
        install_packed(layer, packed)
        note_backend(self.hf_config, packed.backend)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return ops.block_linear(x, layer.packed_weight, bias, Activation.W8A16)


def _quantize_in_pieces(weight: torch.Tensor, block: BlockSize) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantize_weight` over a few thousand rows at a time: its fp32 copies of a whole head would be 7 GB.

    On the host, since NPUs before the Ascend 950 cannot cast to FP8; codes go back as bytes.
    """
    rows = 4096 // block.n * block.n or block.n
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    scales = []
    for start in range(0, weight.shape[0], rows):
        piece, scale = quantize_weight(weight[start : start + rows].cpu(), block)
        codes[start : start + rows] = piece.view(torch.uint8).to(weight.device)
        scales.append(scale)
    return codes.view(torch.float8_e4m3fn), torch.cat(scales).to(weight.device)
