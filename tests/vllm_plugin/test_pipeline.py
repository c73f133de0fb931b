from types import SimpleNamespace

import pytest
from vllm.config import CompilationMode

from qwen3_fp8_ascend.errors import BlockFp8Error
from qwen3_fp8_ascend.vllm_plugin.config import check_pipeline


def vllm_config(stages: int, mode: CompilationMode) -> SimpleNamespace:
    return SimpleNamespace(
        parallel_config=SimpleNamespace(pipeline_parallel_size=stages), compilation_config=SimpleNamespace(mode=mode)
    )


def test_eager_pipeline_stages_are_refused() -> None:
    with pytest.raises(BlockFp8Error, match="leave --enforce-eager"):
        check_pipeline(vllm_config(2, CompilationMode.NONE))


@pytest.mark.parametrize(("stages", "mode"), [(1, CompilationMode.NONE), (2, CompilationMode.VLLM_COMPILE)])
def test_one_stage_and_compiled_stages_are_served(stages: int, mode: CompilationMode) -> None:
    check_pipeline(vllm_config(stages, mode))
