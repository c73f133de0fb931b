"""Everything here needs the real vLLM-Ascend and torch-npu: `make test-vllm-ascend`."""

import ctypes
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

MISSING = (
    None
    if importlib.util.find_spec("vllm_ascend") and importlib.util.find_spec("torch_npu")
    else "vLLM-Ascend and torch-npu have an environment of their own: `make test-vllm-ascend`"
)

BLOCK_FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
QWEN3_8B = {
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
}

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


@pytest.fixture(scope="session")
def rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process as a worker prepares it: plugins, vLLM-Ascend's layers in place of vLLM's, one rank."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import cleanup_dist_env_and_memory, init_distributed_environment, initialize_model_parallel
    from vllm.plugins import load_general_plugins
    from vllm_ascend.utils import register_ascend_customop

    from qwen3_fp8_ascend.testing.server import free_port

    load_general_plugins()
    for name in ("fla_npu", "fla_npu.ops", "fla_npu.ops.ascendc"):  # a package of CANN operators, for other models
        sys.modules.setdefault(name, MagicMock())
    # Of a mixture of experts, so that vLLM makes the group of ranks that those need as well.
    config = engine_config(write_config(tmp_path_factory.mktemp("any"), **MOE), quantization=None)
    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"tcp://127.0.0.1:{free_port()}", 0, "gloo")
        initialize_model_parallel(1, 1)
        register_ascend_customop(config)
        yield
    cleanup_dist_env_and_memory()


@pytest.fixture(scope="session")
def build(rank: None) -> Callable[[Any], torch.nn.Module]:
    """vLLM's own model of an engine's config, made of FakeTensors on `npu:0`."""
    ctypes.CDLL(os.environ["NPU_DEVICE_GUARD"])
    from torch._subclasses.fake_tensor import FakeTensorMode
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    def make(config: Any) -> torch.nn.Module:
        config.compilation_config.static_forward_context.clear()
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        dtype = set_default_torch_dtype(torch.bfloat16)
        with set_current_vllm_config(config), mode, torch.device("npu:0"), torch.no_grad(), dtype:
            model = initialize_model(config)
        model.fake_mode = mode
        return model

    return make
