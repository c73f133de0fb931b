"""Opt-in: the output head in block FP8, which the checkpoint leaves in bf16.

At batch 1 a decode step reads every weight once. Qwen3-8B's bf16 head is 1.24 GB of 8.19 GB; at one byte a weight
it is half that. Activations are not quantized here (W8A16), since the head's input decides the token.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from qwen3_fp8_ascend import ops
from qwen3_fp8_ascend.checkpoints.quantize import quantize_weight
from qwen3_fp8_ascend.format import Activation, BlockGrid, BlockSize
from qwen3_fp8_ascend.vllm_plugin.loading import install_packed, note_backend


class BlockFp8LmHeadMethod(UnquantizedEmbeddingMethod):
    """Loads the head as the checkpoint has it, then quantizes and packs it; an untied bf16 original is freed."""

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
