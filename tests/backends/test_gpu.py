"""Which GPUs torch sees, and which of them a server here would use, on machines that may have none."""

import pytest
import torch

from qwen3_fp8_ascend import provenance
from qwen3_fp8_ascend.backends import gpu
from qwen3_fp8_ascend.vllm_plugin import versions


@pytest.mark.parametrize(
    ("cuda", "available", "there"), [("13.0", True, True), ("13.0", False, False), (None, True, False)]
)
def test_missing_gpu(monkeypatch: pytest.MonkeyPatch, cuda: str | None, available: bool, there: bool) -> None:
    """A torch for AMD's GPUs has no CUDA, and calls them `cuda`."""
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    assert gpu.missing_gpu() == (None if there else f"torch {torch.__version__} sees no NVIDIA GPU")
    if not there:
        assert gpu.names() == gpu.described() == []


@pytest.mark.parametrize(
    ("driver", "cpu_build", "expected"), [(True, False, "NVIDIA H100"), (True, True, None), (False, False, None)]
)
def test_the_gpu_of_a_server(
    monkeypatch: pytest.MonkeyPatch, driver: bool, cpu_build: bool, expected: str | None
) -> None:
    """Results of a server are filed under it; a vLLM for CPUs leaves it alone."""
    monkeypatch.setattr(provenance.glob, "glob", lambda pattern: ["/dev/nvidia0"] if driver else [])
    monkeypatch.setattr(versions, "is_cpu_build", lambda: cpu_build)
    monkeypatch.setattr(gpu, "names", lambda: ["NVIDIA H100", "another"])
    monkeypatch.setattr(provenance, "npu_name", lambda: None)
    assert provenance.gpu_name() == expected
    facts = provenance.provenance()
    assert facts.get("gpu") == provenance.server_device(facts) == expected


def test_an_npu_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "npu_name", lambda: "Ascend910B3")
    monkeypatch.setattr(provenance, "gpu_name", lambda: "NVIDIA H100")
    assert provenance.server_device(provenance.provenance()) == "Ascend910B3"
