"""What tests that execute compiled kernels share: the forms that run, each made once, and operands for them."""

import itertools

import pytest
import torch

from qwen3_fp8_ascend.triton_kernels.group_quantize import group_values_specification
from qwen3_fp8_ascend.triton_kernels.lanes import pack_lanes
from tests.support.triton_ascend.compiler import IR_VERSIONS, compile_to_hivm, lower_to_linalg
from tests.support.triton_ascend.hivm_executor import HivmKernel
from tests.support.triton_ascend.linalg_executor import LinalgKernel

CHIP = "Ascend910B3"
CORES = 3
FORMS = ("linalg", *(f"hivm-{version}" for version in IR_VERSIONS))


def with_forms(cases):
    """Parameters (*case, form): the first case in all forms, each further one by one of the two compilers.

    The rest is long. That every variant compiles by both is test_compile.py's.
    """
    parameters = []
    for (index, case), form in itertools.product(enumerate(cases), FORMS):
        # 1, 1, 0, 0, 1, ...: whatever alternates or changes once within the cases meets both.
        short = index == 0 or form == FORMS[1 + (index + index // 2) % 2]
        name = "-".join(map(str, (*case, form)))
        parameters.append(pytest.param(*case, form, id=name, marks=[] if short else pytest.mark.long))
    return parameters


TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


_compiled: dict[tuple[str, str, str], str] = {}


def hivm_text(case, version):
    key = (case.name, repr(case.constants), version)
    if key not in _compiled:
        _compiled[key] = compile_to_hivm(lower_to_linalg(case, CHIP), CHIP, version)
    return _compiled[key]


_executables: dict[tuple[str, str, str], LinalgKernel | HivmKernel] = {}


def executable(case, form):
    """Made once, however many tests run it."""
    key = (case.name, repr(case.constants), form)
    if key not in _executables:
        if form == "linalg":
            _executables[key] = LinalgKernel(lower_to_linalg(case, CHIP))
        else:
            _executables[key] = HivmKernel(hivm_text(case, form.removeprefix("hivm-")))
    return _executables[key]


def wide_range(m, k, dtype):
    x = torch.randn(m, k) * torch.exp2(torch.randint(-14, 3, (m, k)).float())
    return (x * torch.logspace(-5, 3, m)[:, None]).to(dtype)


def finite_codes(n, k):
    codes = torch.randint(0, 256, (n, k), dtype=torch.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0x80
    return codes.view(torch.int8)


def linear_operands(m, n, k_blocks):
    """Quantized activations with real scales; a scale per weight row, as merged shards have."""
    values, a_scale = group_values_specification(torch.randn(m, k_blocks * 128), m, k_blocks, 0)
    return values, a_scale, pack_lanes(finite_codes(n, k_blocks * 128)), torch.rand(k_blocks, n) * 0.01 + 1e-4


def relative(out, expected):
    return float((out.double() - expected).norm() / expected.norm())


def grouped_operands(groups, m_padded, n, k_blocks):
    values, a_scale, _, _ = linear_operands(m_padded, 256, k_blocks)
    layer = [linear_operands(1, n, k_blocks)[2:] for _ in range(groups)]
    return values, a_scale, torch.stack([lanes for lanes, _ in layer]), torch.stack([scale for _, scale in layer])
