"""torch_npu's operators for e4m3 by their documentation, in plain torch."""

import itertools

import torch


class DocumentedOperators:
    """torch_npu's operators for e4m3 as their documentation has them, strict about operands."""

    @staticmethod
    def npu_dynamic_block_quant(
        x: torch.Tensor, *, min_scale: float, dst_type: torch.dtype, row_block_size: int, col_block_size: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert x.dtype in (torch.bfloat16, torch.float16) and x.is_contiguous() and x.shape[1] % col_block_size == 0
        assert (dst_type, row_block_size, col_block_size) == (torch.float8_e4m3fn, 1, 128)
        groups = x.float().unflatten(1, (-1, col_block_size))
        scale = (groups.abs().amax(-1) / 448).clamp_min(min_scale)
        return (groups / scale.unsqueeze(-1)).to(dst_type).flatten(1), scale

    @staticmethod
    def npu_quant_matmul(
        x1: torch.Tensor,
        x2: torch.Tensor,
        scale: torch.Tensor,
        *,
        pertoken_scale: torch.Tensor,
        output_dtype: torch.dtype,
        group_sizes: list[int],
    ) -> torch.Tensor:
        (m, k), n = x1.shape, x2.shape[1]
        assert x1.dtype == x2.dtype == torch.float8_e4m3fn and group_sizes == [1, 128, 128]
        assert x2.shape[0] == k and k % 128 == 0 and n % 128 == 0
        assert scale.shape == (k // 128, n // 128) and pertoken_scale.shape == (m, k // 128)
        assert scale.dtype == pertoken_scale.dtype == torch.float32
        out = torch.zeros(m, n)
        for kb in range(k // 128):
            block = slice(kb * 128, kb * 128 + 128)
            partial = x1[:, block].float() @ x2[block].float()
            out += partial * pertoken_scale[:, kb, None] * scale[kb].repeat_interleave(128)
        return out.to(output_dtype)

    @classmethod
    def npu_grouped_matmul(
        cls,
        x: list[torch.Tensor],
        weight: list[torch.Tensor],
        *,
        scale: list[torch.Tensor],
        per_token_scale: list[torch.Tensor],
        group_list: torch.Tensor,
        split_item: int,
        group_type: int,
        group_list_type: int,
        output_dtype: torch.dtype,
    ) -> list[torch.Tensor]:
        """G-B: one weight of three dimensions, transposed, a cumulative list; rows behind it are not written."""
        ((rows,), (codes,), (w_scale,), (x_scale,)) = x, weight, scale, per_token_scale
        assert (split_item, group_type, group_list_type) == (3, 0, 0)
        assert group_list.dtype == torch.int64 and group_list.shape == codes.shape[:1] and len(group_list) <= 1024
        assert codes.transpose(1, 2).is_contiguous() and w_scale.transpose(1, 2).is_contiguous()
        assert output_dtype in (torch.bfloat16, torch.float16, torch.float32)
        out = torch.full((len(rows), codes.shape[2]), float("nan"), dtype=output_dtype)
        for group, (start, end) in enumerate(itertools.pairwise([0, *group_list.tolist()])):
            assert 0 <= start <= end <= len(rows)
            out[start:end] = cls.npu_quant_matmul(
                rows[start:end],
                codes[group],
                w_scale[group],
                pertoken_scale=x_scale[start:end],
                output_dtype=output_dtype,
                group_sizes=[1, 128, 128],
            )
        return [out]
