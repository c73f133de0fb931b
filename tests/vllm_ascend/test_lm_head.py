"""An output head in FP8 inside vLLM-Ascend's own parallel head, in each way in which that divides the vocabulary."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from .conftest import BEFORE_SCHEMES

if BEFORE_SCHEMES:
    pytest.skip("vLLM-Ascend 0.23.0 divides a head otherwise: test_npu_model.py has it", allow_module_level=True)

from torch._subclasses.fake_tensor import FakeTensorMode
from vllm.config import set_current_vllm_config
from vllm_ascend.ops import vocab_parallel_embedding as theirs

from qwen3_fp8_ascend import ops
from qwen3_fp8_ascend.checkpoints.quantize import quantize_weight
from qwen3_fp8_ascend.format import Activation, BlockFp8Config
from qwen3_fp8_ascend.testing.judges import Problem, assert_exact, random_problem
from qwen3_fp8_ascend.vllm_plugin import linear
from qwen3_fp8_ascend.vllm_plugin.ascend import BlockFp8NpuConfig
from qwen3_fp8_ascend.vllm_plugin.lm_head import BlockFp8HeadMethod, BlockFp8LmHeadMethod

from .conftest import NPU, Chip, engine_config, write_config

VOCABULARY, HIDDEN = 1000, 256
MODES = tuple(theirs.VocabParallelMode)


@pytest.fixture
def make_head(rank: None, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., theirs.AscendParallelLMHead]:
    """A head of a rank, as a model of vLLM-Ascend's makes it."""

    def make(
        mode: theirs.VocabParallelMode, shard: int, shards: int, stored: bool = True, backend: str | None = "reference"
    ) -> theirs.AscendParallelLMHead:
        plan = theirs.VocabParallelPlan(mode, shard, shards)
        monkeypatch.setattr(theirs, "_resolve_vocab_parallel_plan", lambda **of: plan)
        settings = {"lm_head": "checkpoint" if stored else "fp8"} | ({"backend": backend} if backend else {})
        config = engine_config(
            write_config(tmp_path / "head"), quantization=None, hf_overrides={"qwen3_fp8_ascend": settings}
        )
        quantization = BlockFp8NpuConfig(BlockFp8Config())
        if stored:
            quantization.modules.obey({"lm_head": "fp8"})
        with set_current_vllm_config(config), torch.no_grad():
            return theirs.AscendParallelLMHead(
                VOCABULARY, HIDDEN, params_dtype=torch.bfloat16, quant_config=quantization, prefix="lm_head"
            )

    return make


def load(head: theirs.AscendParallelLMHead, problem: Problem) -> None:
    assert type(head.quant_method) is BlockFp8HeadMethod
    head.weight.weight_loader(head.weight, problem.weight)
    head.weight_scale_inv.weight_loader(head.weight_scale_inv, problem.scale)
    head.quant_method.process_weights_after_loading(head)


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
def test_shards_of_a_stored_head_are_the_whole_vocabulary(make_head: Any, mode: theirs.VocabParallelMode) -> None:
    """Cut inside blocks: four shards of 256 tokens, the last with 232; all are as wide, as their exchange wants it."""
    shards = 1 if mode is theirs.VocabParallelMode.REPLICATED else 4
    problem, logits = random_problem(5, (VOCABULARY,), HIDDEN), []
    for shard in range(shards):
        head = make_head(mode, shard, shards)
        load(head, problem)
        logits.append(head.quant_method.apply(head, problem.x))
    assert {part.shape[1] for part in logits} == {1024 // shards}
    together = torch.cat(logits, 1)
    assert_exact(together[:, :VOCABULARY], problem)
    assert not together[:, VOCABULARY:].any()


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
def test_a_head_that_is_quantized_at_load(make_head: Any, mode: theirs.VocabParallelMode) -> None:
    shards = 1 if mode is theirs.VocabParallelMode.REPLICATED else 4
    weight = torch.randn(VOCABULARY, HIDDEN, generator=torch.Generator().manual_seed(0)).bfloat16()
    x = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(1)).bfloat16()
    for shard in range(shards):
        head = make_head(mode, shard, shards, stored=False)
        assert type(head.quant_method) is BlockFp8LmHeadMethod
        head.weight.data.zero_()
        head.weight_loader(head.weight, weight)
        rows = head.weight.data.clone()
        head.quant_method.process_weights_after_loading(head)
        codes, scale = quantize_weight(rows)
        assert_exact(head.quant_method.apply(head, x), Problem(x, codes, scale), Activation.W8A16)


def test_their_logits_processor_takes_its_logits(make_head: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """`lmhead_tensor_parallel_size`: tokens of two ranks to every shard of the vocabulary, and their logits back."""
    problem = random_problem(4, (VOCABULARY,), HIDDEN)
    heads = [make_head(theirs.VocabParallelMode.FINE_GRAINED, shard, 2) for shard in range(2)]
    for head in heads:
        load(head, problem)
    processor = theirs.AscendLogitsProcessor(VOCABULARY)
    both = problem.x.view(2, 2, HIDDEN)  # each rank's tokens
    group = SimpleNamespace(world_size=2, all_gather=lambda tensor, dim: both.flatten(0, 1))
    monkeypatch.setattr(theirs, "get_lmhead_tp_group", lambda: group)
    exchanged: list[torch.Tensor] = []
    monkeypatch.setattr(theirs, "lmhead_all_to_all", lambda logits, of: exchanged.append(logits) or logits)
    for number, head in enumerate(heads):
        processor._get_logits(both[number], head)
    # What lmhead_all_to_all says of itself: [N, V / P] on each rank to [N / P, V].
    for number in range(2):
        mine = torch.cat([logits.chunk(2)[number] for logits in exchanged], 1)[:, :VOCABULARY]
        rows = Problem(both[number], problem.weight, problem.scale)
        assert_exact(mine, rows)


def test_shards_on_every_chip(make_head: Any, chip: Chip, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes and devices on FakeTensors, with weights that nothing was loaded into: all three backends compute W8A8."""
    monkeypatch.setattr(ops, "count_nan_codes", lambda weight: 0)  # FakeTensors have no values to check
    monkeypatch.setattr(ops, "check_scale_values", lambda *scale, **limit: None)
    monkeypatch.setattr(linear, "fill_with_small_values", lambda *tensors: None)
    with FakeTensorMode(allow_non_fake_inputs=True), NPU, torch.no_grad():
        head = make_head(theirs.VocabParallelMode.FINE_GRAINED, 1, 2, backend=chip.backend)
        assert type(head.quant_method) is BlockFp8HeadMethod
        head.quant_method.process_weights_after_loading(head)
        logits = head.quant_method.apply(head, torch.empty(3, HIDDEN, dtype=torch.bfloat16))
    assert (logits.shape, logits.dtype, logits.device) == ((3, 512), torch.bfloat16, NPU)
