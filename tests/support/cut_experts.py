"""A layer of experts whose intermediate channels are cut among ranks: what each has of the checkpoint."""

from __future__ import annotations

import dataclasses

import torch

from qwen3_fp8_ascend import ops
from qwen3_fp8_ascend.format import Activation
from qwen3_fp8_ascend.testing.experts import ExpertsProblem
from qwen3_fp8_ascend.vllm_plugin.partition import Partition, partitions_of_experts


@dataclasses.dataclass(frozen=True)
class Part:
    """A rank's part of a layer: what it has of the checkpoint, as it loads it."""

    gate_up: Partition
    down: Partition
    w13: torch.Tensor
    w13_scale: torch.Tensor
    w2: torch.Tensor
    w2_scale: torch.Tensor

    def packed(self, backend: str) -> tuple[ops.PackedWeight, ops.PackedWeight]:
        codes = self.down.pad_codes(self.w2.view(torch.uint8)).view(torch.float8_e4m3fn)
        return (
            ops.pack_experts(self.w13, self.w13_scale, self.gate_up.grid, backend),
            ops.pack_experts(codes, self.w2_scale, self.down.grid, backend),
        )


def cut(p: ExpertsProblem, ranks: int, activation: Activation) -> list[Part]:
    inner, hidden = p.intermediate // ranks, p.x.shape[1]
    halves = p.w13.view(torch.uint8).chunk(2, 1), p.w13_scale.chunk(2, 1)
    parts = []
    for rank in range(ranks):
        gate_up, down = partitions_of_experts(p.block, hidden, inner, rank, ranks, activation)
        row, column, rows, columns = gate_up.rows[0], down.column, gate_up.scale_rows[0], down.scale_columns
        codes = torch.cat([half[:, row : row + inner] for half in halves[0]], 1)
        scale = torch.cat([half[:, rows.first : rows.first + rows.count] for half in halves[1]], 1)
        w2 = p.w2.view(torch.uint8)[:, :, column : column + inner].contiguous()
        w2_scale = p.w2_scale[:, :, columns.first : columns.first + columns.count].contiguous()
        assert scale.shape[1:] == gate_up.scale_shape and w2_scale.shape[1:] == down.scale_shape
        fp8 = torch.float8_e4m3fn
        parts.append(Part(gate_up, down, codes.view(fp8), scale, w2.view(fp8), w2_scale))
    return parts
