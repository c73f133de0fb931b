"""Everything here needs the real vLLM-Ascend and torch-npu: `make test-vllm-ascend`."""

import contextlib
import ctypes
import dataclasses
import importlib
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, patch

import pytest
import torch
from packaging.version import Version

from tests.support import preloaded
from tests.support.forked_spawn import fork_what_is_spawned

MISSING = (
    None
    if importlib.util.find_spec("vllm_ascend") and importlib.util.find_spec("torch_npu")
    else "vLLM-Ascend and torch-npu have an environment of their own: `make test-vllm-ascend`"
)

BLOCK_FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
MOE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}


RELEASE = None if MISSING else importlib.metadata.version("vllm-ascend")
BEFORE_SCHEMES = RELEASE is not None and Version(RELEASE) < Version("0.30.0rc2")
"""Whether it is a vLLM-Ascend whose methods for experts route tokens themselves: 0.23.0."""
ONE_RELEASE = "0.30.0rc2"
once = pytest.mark.skipif(
    RELEASE not in (None, ONE_RELEASE),
    reason=f"torch-npu and this package alone, whatever the release: run beside vLLM-Ascend {ONE_RELEASE}",
)
"""For what has nothing of vLLM-Ascend in it: beside one of the releases that `make test-vllm-ascend` goes through."""

FIGURES: list[str] = []
"""Lines that tests have to show, printed at the end whether output is captured or not."""


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if FIGURES:
        terminalreporter.section("figures")
        terminalreporter.write("\n".join(FIGURES) + "\n")


def pytest_unconfigure() -> None:
    preloaded.end_shared()


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    # These modules import vllm_ascend at the top; test_environment.py alone says why it is not here.
    if MISSING and collection_path.suffix == ".py" and collection_path.name != "test_environment.py":
        return True
    return None


def write_config(folder: Path, **config: Any) -> Path:
    """A folder that is a Qwen3 model to vLLM, without weights."""
    from qwen3_fp8_ascend.testing.models import qwen3_config

    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(qwen3_config(**config)))
    return folder


def engine_config(folder: Path, quantization: str | None = "ascend", **changes: Any) -> Any:
    """What `vllm serve FOLDER --quantization ascend` makes of its arguments, before any process is started."""
    from vllm.engine.arg_utils import EngineArgs

    arguments = {"skip_tokenizer_init": True, "load_format": "dummy", "max_model_len": 128, "enforce_eager": True}
    return EngineArgs(model=str(folder), quantization=quantization, **arguments | changes).create_engine_config()


def run_in_a_fork(look: Callable[[], Any]) -> Any:
    """As vLLM's `_run_in_subprocess`, which imports vLLM and its plugins anew to look at a model's class."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(look, sender))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    finally:
        process.join()


def _send(look: Callable[[], Any], sender: Any) -> None:
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    sender.send(look())


@pytest.fixture(scope="session", autouse=True)
def classes_are_inspected_in_forks() -> Iterator[None]:
    from vllm.model_executor.models import registry

    with patch.object(registry, "_run_in_subprocess", run_in_a_fork):
        yield


@pytest.fixture(scope="session", autouse=True)
def spawned_processes_are_forks() -> Iterator[None]:
    """Of this process before the first test: it has imported all that they need, and registered nothing."""
    from vllm import plugins

    assert not plugins.plugins_loaded
    with fork_what_is_spawned():
        yield


@contextlib.contextmanager
def prepare_rank(config: Any, rank: int = 0, ranks: int = 1, port: int = 0) -> Iterator[None]:
    """A process as a worker prepares it: plugins, vLLM-Ascend's layers in place of vLLM's, its place in the ranks."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import cleanup_dist_env_and_memory, init_distributed_environment, initialize_model_parallel
    from vllm.plugins import load_general_plugins
    from vllm_ascend.utils import register_ascend_customop

    from qwen3_fp8_ascend.serving import free_port

    load_general_plugins()
    for name in ("fla_npu", "fla_npu.ops", "fla_npu.ops.ascendc"):  # a package of CANN operators, for other models
        sys.modules.setdefault(name, MagicMock())
    with set_current_vllm_config(config):
        init_distributed_environment(ranks, rank, f"tcp://127.0.0.1:{port or free_port()}", rank, "gloo")
        initialize_model_parallel(ranks, 1)
        register_ascend_customop(config)
        yield
    cleanup_dist_env_and_memory()


@pytest.fixture(scope="session")
def rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """This process as the only rank."""
    # Of a mixture of experts, so that vLLM makes the group of ranks that those need as well.
    with prepare_rank(engine_config(write_config(tmp_path_factory.mktemp("any"), **MOE), quantization=None)):
        yield


def initialize(config: Any, place: torch.device) -> torch.nn.Module:
    """vLLM's own model of an engine's config on a device."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    config.compilation_config.static_forward_context.clear()
    dtype = set_default_torch_dtype(torch.bfloat16)
    with set_current_vllm_config(config), place, torch.no_grad(), dtype, pytest.MonkeyPatch.context() as driver:
        # torch_npu's own would ask the driver for a device first.
        driver.setattr(torch.Tensor, "npu", lambda tensor: tensor.to(place))
        return initialize_model(config)


@pytest.fixture(scope="session")
def build(rank: None) -> Callable[[Any], torch.nn.Module]:
    """vLLM's own model of an engine's config, made of FakeTensors on `npu:0`."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    def make(config: Any) -> torch.nn.Module:
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        with mode:
            model = initialize(config, NPU)
        model.fake_mode = mode
        return model

    return make


if MISSING is None:
    importlib.import_module("torch_npu")  # which makes `npu` a kind of device
    ctypes.CDLL(os.environ["NPU_DEVICE_GUARD"])
    NPU = torch.device("npu:0")

CHIPS = {
    "A2": ("Ascend910B3", ("ascendc", "triton", "torch_npu")),
    "A3": ("Ascend910_9392", ("ascendc", "triton", "torch_npu")),
    "A5": ("Ascend950PR_9589", ("torch_npu", "triton")),
}
"""A chip of each generation, and the backends that serve it."""

PAIRS = [(generation, backend) for generation, (_, backends) in CHIPS.items() for backend in backends]


@dataclasses.dataclass(frozen=True)
class Chip:
    """An NPU that a test pretends to have, and the backend that serves it."""

    generation: str
    backend: str

    @property
    def native(self) -> bool:
        return (self.generation, self.backend) == ("A5", "torch_npu")


@pytest.fixture(params=PAIRS, ids="-".join)
def chip(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Chip]:
    """As if an NPU of that generation were here and the backend were built."""
    from qwen3_fp8_ascend.backends import registry, soc

    generation, name = request.param
    chosen = next(g for g in soc.GENERATIONS if g.name == generation)
    monkeypatch.setattr(soc, "current_generation", lambda: chosen)
    if name == "triton":
        pretend_triton(CHIPS[generation][0], monkeypatch)
    backend = dataclasses.replace(registry.load_backend(name), unusable=lambda: None)
    monkeypatch.setitem(registry.LOADED, name, backend)
    monkeypatch.setenv(registry.ENVIRONMENT_VARIABLE, name)
    registry.select_backend.cache_clear()
    yield Chip(generation, name)
    registry.select_backend.cache_clear()


@pytest.fixture(scope="session")
def schemas() -> None:
    """csrc/ascend/host/torch_schema.cpp, compiled against this torch."""
    from tests.ascendc.test_backend import build_schemas

    torch.ops.load_library(build_schemas())


@pytest.fixture
def any_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing is computed, since there is no NPU; which backend a chip gets is tests/backends/test_soc.py's."""
    from qwen3_fp8_ascend.vllm_plugin import loading

    monkeypatch.setattr(loading, "select_backend", lambda *of: None)


class Launch:
    """A Triton kernel that is only launched: its operands are tensors on the device, none of them FP8."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        assert grid and all(isinstance(size, int) and size > 0 for size in grid)

        def launch(*operands: Any, **constants: Any) -> None:
            tensors = [operand for operand in operands if isinstance(operand, torch.Tensor)]
            assert tensors and all(t.device == NPU and t.dtype != torch.float8_e4m3fn for t in tensors)
            assert all(isinstance(o, int) for o in operands if not isinstance(o, torch.Tensor))

        return launch


def pretend_triton(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Triton backend without Triton, which has an environment of its own: everything but the kernels is real."""
    from qwen3_fp8_ascend.backends import triton_host
    from qwen3_fp8_ascend.backends.triton import backend, device, launch
    from qwen3_fp8_ascend.triton_kernels.configuration import architecture

    language = ModuleType("triton.language")
    language.constexpr = lambda value: value  # type: ignore[attr-defined]
    stand_in = ModuleType("triton")
    stand_in.jit, stand_in.language = (lambda function: function), language  # type: ignore[attr-defined]
    with monkeypatch.context() as imports:
        imports.setitem(sys.modules, "triton", stand_in)
        imports.setitem(sys.modules, "triton.language", language)
        pack_lanes = importlib.import_module("qwen3_fp8_ascend.triton_kernels.lanes").pack_lanes
        imports.delitem(sys.modules, "qwen3_fp8_ascend.triton_kernels.lanes")
    launched = ("quantize", "values", "dequantize", "packed_dequantize", "linear", "grouped_linear")
    kernels: dict[str, Any] = dict.fromkeys(launched, Launch())
    kernels |= {"pack_lanes": pack_lanes, "dot_type": None}
    pretended = {
        "kernels": lambda: SimpleNamespace(**kernels),
        "chip_of": lambda device_type: architecture(name),
        "cores_of": lambda device_type, index: (20, 40),
        "device_module": lambda device_type: SimpleNamespace(current_device=lambda: 0),
        "keeps_subnormals": lambda device_type, index: True,
    }
    for module in (triton_host, device, launch, backend):
        for function in pretended.keys() & vars(module).keys():
            monkeypatch.setattr(module, function, pretended[function])
