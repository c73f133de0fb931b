import dataclasses
from collections.abc import Iterator

import pytest

from qwen3_fp8_ascend.backends import prefill, registry, soc, torch_npu
from tests.support.documented_npu import DocumentedOperators


@pytest.fixture(params=["A2", "A5"])
def chip(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The backend on a CPU, as if that were a chip of the generation."""
    generation = next(g for g in soc.GENERATIONS if g.name == request.param)
    monkeypatch.setattr(soc, "current_generation", lambda: generation)
    monkeypatch.setattr(torch_npu, "_operators", lambda: DocumentedOperators)
    monkeypatch.setattr(prefill, "stock_product", lambda x, w: (x.float() @ w.float().T).to(x.dtype))
    backend = dataclasses.replace(torch_npu.BACKEND, device_types=frozenset({"cpu"}), unusable=lambda: None)
    monkeypatch.setitem(registry.LOADED, "torch_npu", backend)
    registry.select_backend.cache_clear()
    yield request.param
    registry.select_backend.cache_clear()
