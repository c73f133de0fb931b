"""What the other modules stand on: the real torch_npu's schemas and shape functions, and vLLM-Ascend as platform."""

import pytest
import torch

from .conftest import MISSING

pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))


def test_vllm_s_platform_is_vllm_ascend_s() -> None:
    from vllm.platforms import current_platform

    assert type(current_platform).__module__ == "vllm_ascend.platform"
    assert current_platform.device_type == "npu"


def test_block_quantization_and_block_product_on_fake_tensors() -> None:
    import torch_npu
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), torch.device("npu:0"):
        x = torch.empty(3, 256, dtype=torch.bfloat16)
        codes, scale = torch_npu.npu_dynamic_block_quant(
            x, dst_type=torch.float8_e4m3fn, row_block_size=1, col_block_size=128
        )
        assert (codes.dtype, codes.shape, codes.device.type) == (torch.float8_e4m3fn, (3, 256), "npu")
        assert (scale.dtype, scale.shape) == (torch.float32, (3, 2))
        weight = torch.empty(384, 256, dtype=torch.float8_e4m3fn)
        out = torch_npu.npu_quant_matmul(
            codes,
            weight.t(),
            torch.empty(2, 3),
            pertoken_scale=scale,
            output_dtype=torch.bfloat16,
            group_sizes=[1, 128, 128],
        )
        assert (out.dtype, out.shape, out.device.type) == (torch.bfloat16, (3, 384), "npu")


def test_the_grouped_block_product_on_fake_tensors() -> None:
    """As `torch_npu_native_grouped_linear` calls it: transposed views of weights and scales, a cumulative list."""
    import torch_npu
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), torch.device("npu:0"):
        x = torch.empty(5, 256, dtype=torch.bfloat16)
        codes, scale = torch_npu.npu_dynamic_block_quant(
            x, dst_type=torch.float8_e4m3fn, row_block_size=1, col_block_size=128
        )
        weights = torch.empty(4, 384, 256, dtype=torch.float8_e4m3fn)
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            (out,) = torch_npu.npu_grouped_matmul(
                [codes],
                [weights.transpose(1, 2)],
                scale=[torch.empty(4, 3, 2).transpose(1, 2)],
                per_token_scale=[scale],
                group_list=torch.empty(4, dtype=torch.int64),
                split_item=3,
                group_type=0,
                group_list_type=0,
                output_dtype=dtype,
            )
            assert (out.dtype, out.shape, out.device.type) == (dtype, (5, 384), "npu")


def test_there_is_no_npu_here() -> None:
    """If this fails, the labels in the documentation say less than they could."""
    import torch_npu

    assert not torch_npu.npu.is_available()


def test_their_shape_functions_accept_nonsense() -> None:
    """Which is why this package checks the operands itself."""
    import torch_npu
    from torch._subclasses.fake_tensor import FakeTensorMode

    from qwen3_fp8_ascend.backends import operators
    from qwen3_fp8_ascend.backends import torch_npu as _  # noqa: F401
    from qwen3_fp8_ascend.errors import BlockFp8Error

    native = operators.IMPLEMENTATIONS["torch_npu_native_linear"]
    with FakeTensorMode(), torch.device("npu:0"):
        x, codes, scale = torch.empty(3, 256), torch.empty(384, 256, dtype=torch.uint8), torch.empty(3, 2)
        x_codes, x_scale = torch_npu.npu_dynamic_block_quant(
            x, dst_type=torch.float8_e4m3fn, row_block_size=1, col_block_size=128
        )
        for weight, wrong_scale in [(codes, scale), (codes.view(torch.float8_e4m3fn), scale.bfloat16())]:
            out = torch_npu.npu_quant_matmul(
                x_codes,
                weight.t(),
                wrong_scale.t(),
                pertoken_scale=x_scale,
                output_dtype=torch.bfloat16,
                group_sizes=[1, 128, 128],
            )
            assert out.shape == (3, 384)
        with pytest.raises(BlockFp8Error, match="16-bit activations"):
            native(x, codes, scale, None)
        for wrong in [(codes.view(torch.int8), scale), (codes, scale.bfloat16()), (codes[:300], scale)]:
            with pytest.raises(BlockFp8Error, match="not a packed weight's"):
                native(x.bfloat16(), *wrong, None)
