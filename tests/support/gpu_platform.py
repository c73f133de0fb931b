"""vLLM's models on `cuda:0` without a GPU: its own CUDA platform, layers and runner of experts, on FakeTensors.

`python -m tests.support.gpu_platform CAPABILITY GUARD FOLDERS...` prints a JSON object a model; GUARD is a library that
`device_guard` has built for CUDA, where torch is the CPU's build. The platform is chosen once in a process, before most
of vLLM is imported, so this is a process of its own. vLLM is the CPU's or the GPU's build; what the CPU's lacks of CUDA
operators has stand-ins that only have a shape, as Triton's kernels have here.
"""

from __future__ import annotations

import collections
import ctypes
import dataclasses
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

CUDA = torch.device("cuda:0")
ROWS = (1, 64, 2048)
WITHOUT_A_GPU = {
    "VLLM_DISABLE_SHARED_EXPERTS_STREAM": "1",  # a stream would be asked of the driver
    "TORCHDYNAMO_DISABLE": "1",  # vLLM compiles its choice of experts in groups; the compiler asks the driver
    "VLLM_USE_FUSED_MOE_GROUPED_TOPK": "0",  # the CPU's build lacks that operator
}
OPERATORS = (
    "silu_and_mul(Tensor! out, Tensor input) -> ()",
    "rms_norm(Tensor! out, Tensor input, Tensor weight, float epsilon) -> ()",
)
LIBRARY = torch.library.Library("_C", "FRAGMENT")
"""Of vLLM's operators, what the CPU's build lacks."""
EXTENSIONS = ("vllm._C_stable_libtorch", "vllm.vllm_flash_attn._vllm_fa2_C")


def pretend_platform(major: int, minor: int) -> None:
    """Make vLLM's platform that of a GPU of a compute capability, and give the CPU's build what it imports for one."""
    gpu_build = importlib.util.find_spec(EXTENSIONS[0]) is not None
    if not gpu_build:
        for name in EXTENSIONS:
            sys.modules[name] = ModuleType(name)
            sys.modules[name].__spec__ = ModuleSpec(name, None)
    from vllm import platforms
    from vllm.platforms.cuda import NonNvmlCudaPlatform
    from vllm.platforms.interface import DeviceCapability

    class Gpu(NonNvmlCudaPlatform):
        """What vLLM asks of the driver."""

        get_device_capability = classmethod(lambda cls, device_id=0: DeviceCapability(major, minor))
        get_device_name = classmethod(lambda cls, device_id=0: "a GPU")
        get_device_total_memory = classmethod(lambda cls, device_id=0: 80 << 30)
        is_integrated_gpu = classmethod(lambda cls, device_id=0: False)
        num_compute_units = classmethod(lambda cls, device_id=0: 132)

    platforms._current_platform = Gpu()
    from vllm import _custom_ops

    if not gpu_build:
        for name in ("fp8", "block_fp8", "fp4"):
            setattr(_custom_ops, f"cutlass_scaled_mm_supports_{name}", lambda capability: False)
        _custom_ops.cutlass_group_gemm_supported = lambda capability: False
        for schema in OPERATORS:
            name = schema.partition("(")[0]
            if not hasattr(torch.ops._C, name):
                LIBRARY.define(schema)
                LIBRARY._register_fake(name, lambda *operands, **others: None)
        for name in ("topk_softmax", "topk_sigmoid"):  # write into their operands
            setattr(_custom_ops, name, lambda *operands, **others: None)


@dataclasses.dataclass
class Launch:
    """A Triton kernel that is only launched: its tensors are on the GPU."""

    name: str
    count: collections.Counter[str]

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        assert grid and all(isinstance(size, int) and size > 0 for size in grid)

        def launch(*operands: Any, **constants: Any) -> None:
            tensors = [operand for operand in operands if isinstance(operand, torch.Tensor)]
            assert tensors and all(tensor.device == CUDA for tensor in tensors)
            self.count[self.name] += 1

        return launch


LAUNCHED: collections.Counter[str] = collections.Counter()


def pretend_kernels(major: int, minor: int) -> None:
    """The backend `nvidia` without Triton and a GPU: everything but the kernels is real."""
    from qwen3_fp8_ascend.backends import registry
    from qwen3_fp8_ascend.backends.nvidia import backend, device, launch
    from qwen3_fp8_ascend.triton_kernels.nvidia import shapes
    from qwen3_fp8_ascend.vllm_plugin import experts, linear

    launched = {name: Launch(name, LAUNCHED) for name in ("quantize", "dequantize", "linear", "grouped_linear")}
    pretended: dict[str, Callable[..., Any]] = {
        "kernels": lambda: SimpleNamespace(types=collections.defaultdict(object), **launched),
        "chip_of": lambda place: shapes.chip(10 * major + minor),
        "cores_of": lambda place: 132,
        "counters": lambda count, place: torch.zeros(count, dtype=torch.int32, device=place),
        "fill_with_small_values": lambda codes, scale: None,  # FakeTensors have none
    }
    for module in (backend, device, launch, linear, experts):
        for name in pretended.keys() & vars(module).keys():
            setattr(module, name, pretended[name])
    torch.cuda.current_device = lambda: 0
    usable = dataclasses.replace(registry.load_backend("nvidia"), unusable=lambda: None, detail=None)
    registry.LOADED["nvidia"] = usable


def storages(tensors: Iterator[torch.Tensor]) -> int:
    """Bytes that tensors keep alive, each storage once."""
    return sum({id(t.untyped_storage()): t.untyped_storage().nbytes() for t in tensors}.values())


def look_at(folder: Path) -> dict[str, Any]:
    """Build a model, do what vLLM does after loading, and call each of its layers for a few numbers of tokens."""
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.forward_context import set_forward_context
    from vllm.model_executor.layers.fused_moe.runner import moe_runner
    from vllm.model_executor.model_loader.utils import initialize_model, process_weights_after_loading
    from vllm.utils.torch_utils import set_default_torch_dtype

    from qwen3_fp8_ascend.backends.registry import PackedWeight
    from tests.support.npu_graph import Capture

    config = EngineArgs(
        model=str(folder),
        quantization="ascend",
        skip_tokenizer_init=True,
        load_format="dummy",
        max_model_len=128,
        enforce_eager=True,
    ).create_engine_config()
    found: dict[str, Any] = {
        "worker": config.parallel_config.worker_cls,
        "config": type(config.quant_config).__name__,
        "methods": collections.Counter(),
        "backends": collections.Counter(),
        "results": [],
    }
    dtype = set_default_torch_dtype(torch.bfloat16)
    with FakeTensorMode(allow_non_fake_inputs=True), set_current_vllm_config(config), dtype, CUDA, torch.no_grad():
        model = initialize_model(config)
        process_weights_after_loading(model, config.model_config, CUDA)
        packed: dict[str, PackedWeight] = {}
        for name, module in model.named_modules():
            if method := getattr(module, "quant_method", None):
                found["methods"][type(method).__name__] += 1
            packed |= {f"{name}.{key}": w for key, w in vars(module).items() if isinstance(w, PackedWeight)}
            if hasattr(module, "_forward_entry"):  # the Python that the custom operator calls, which is opaque here
                alone = module.shared_experts is None
                module._forward_entry = moe_runner._moe_forward if alone else moe_runner._moe_forward_shared
        found["backends"].update(weight.backend for weight in packed.values())
        found["bytes"] = storages(t for weight in packed.values() for t in weight.tensors)
        found["weights"] = sum(weight.groups * weight.n * weight.k for weight in packed.values())
        with set_forward_context(None, config):
            for name, module in model.named_modules():
                weight = packed.get(f"{name}.packed_weight")
                whole = name.endswith(".mlp")
                if weight is None and not whole:
                    continue
                for rows in ROWS:
                    columns = config.model_config.get_hidden_size() if weight is None else weight.k
                    x = torch.empty(rows, columns, dtype=torch.bfloat16)
                    LAUNCHED.clear()
                    with Capture():
                        out = module(x) if weight is None else module.quant_method.apply(module, x)
                    found["results"].append(
                        {
                            "layer": name,
                            "rows": rows,
                            "out": [list(out.shape), str(out.dtype), str(out.device)],
                            "launched": dict(LAUNCHED),
                        }
                    )
    return found


def main() -> None:
    os.environ.update(WITHOUT_A_GPU)
    capability, guard, *folders = sys.argv[1:]
    major, minor = (int(number) for number in capability.split("."))
    if torch.version.cuda is None:
        ctypes.CDLL(guard)
    pretend_platform(major, minor)
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.plugins import load_general_plugins

    from qwen3_fp8_ascend.serving import free_port

    load_general_plugins()
    pretend_kernels(major, minor)
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"tcp://127.0.0.1:{free_port()}", 0, "gloo")
        initialize_model_parallel(1, 1)
    for folder in folders:
        print(json.dumps(look_at(Path(folder))), flush=True)
    assert not torch.cuda.is_initialized()


if __name__ == "__main__":
    main()
