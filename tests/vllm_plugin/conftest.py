from collections.abc import Iterator

import pytest

vllm = pytest.importorskip("vllm", reason="vLLM is not installed")


@pytest.fixture(scope="session", autouse=True)
def distributed() -> Iterator[None]:
    """vLLM's layers ask for their place among the ranks, so there must be a (single-rank) group. Plugins are loaded."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import cleanup_dist_env_and_memory, init_distributed_environment, initialize_model_parallel
    from vllm.plugins import load_general_plugins

    from qwen3_fp8_ascend.serving import free_port

    load_general_plugins()
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"tcp://127.0.0.1:{free_port()}", 0, "gloo")
        initialize_model_parallel(1, 1)
        yield
    cleanup_dist_env_and_memory()
