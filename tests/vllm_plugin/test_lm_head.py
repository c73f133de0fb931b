"""The output head in FP8: opt-in, or as the checkpoint has it."""

from collections.abc import Callable

import pytest
import torch
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from qwen3_fp8_ascend.checkpoints.quantize import quantize_weight
from qwen3_fp8_ascend.errors import BlockFp8Error
from qwen3_fp8_ascend.format import Activation, BlockFp8Config, BlockSize
from qwen3_fp8_ascend.testing.judges import Problem, assert_exact, random_problem
from qwen3_fp8_ascend.vllm_plugin.config import BlockFp8AscendConfig
from qwen3_fp8_ascend.vllm_plugin.lm_head import BlockFp8HeadMethod, BlockFp8LmHeadMethod, _quantize_in_pieces


@pytest.fixture
def opted_in(monkeypatch: pytest.MonkeyPatch) -> BlockFp8AscendConfig:
    config = get_current_vllm_config()
    monkeypatch.setattr(config, "additional_config", {"qwen3_fp8_ascend": {"lm_head": "fp8"}})
    return BlockFp8AscendConfig(BlockFp8Config())


def loaded_head(config: BlockFp8AscendConfig, weight: torch.Tensor) -> ParallelLMHead:
    head = ParallelLMHead(*weight.shape, params_dtype=torch.bfloat16, quant_config=config, prefix="lm_head")
    head.weight_loader(head.weight, weight)
    return head


def test_the_head_is_quantized_only_when_asked_for(opted_in: BlockFp8AscendConfig) -> None:
    head = ParallelLMHead(128, 128, quant_config=opted_in, prefix="lm_head")
    assert isinstance(head.quant_method, BlockFp8LmHeadMethod)
    assert not isinstance(VocabParallelEmbedding(128, 128, quant_config=opted_in).quant_method, BlockFp8LmHeadMethod)
    get_current_vllm_config().additional_config = {}
    head = ParallelLMHead(128, 128, quant_config=opted_in, prefix="lm_head")
    assert not isinstance(head.quant_method, BlockFp8LmHeadMethod)


def test_logits_are_exact_for_the_quantized_head(opted_in: BlockFp8AscendConfig) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(320, 200, generator=generator).bfloat16()
    head = loaded_head(opted_in, weight)
    head.quant_method.process_weights_after_loading(head)
    x = torch.randn(5, 200, generator=generator).bfloat16()
    logits = head.quant_method.apply(head, x)
    codes, scale = quantize_weight(weight)
    assert_exact(logits, Problem(x, codes, scale), Activation.W8A16)
    distance = (logits.double() - x.double() @ weight.double().T).norm() / logits.double().norm()
    assert 1e-3 < distance < 0.05
    assert head.packed_weight.nbytes < 1.1 * weight.numel()


def test_a_tied_embedding_stays(opted_in: BlockFp8AscendConfig) -> None:
    embedding = VocabParallelEmbedding(128, 64, params_dtype=torch.bfloat16)
    torch.nn.init.normal_(embedding.weight)
    before = embedding.weight.clone()
    head = ParallelLMHead(128, 64, params_dtype=torch.bfloat16, quant_config=opted_in, prefix="lm_head")
    head = head.tie_weights(embedding)
    head.quant_method.process_weights_after_loading(head)
    assert torch.equal(embedding.weight, before)
    assert head.quant_method.apply(head, torch.ones(1, 64).bfloat16()).shape == (1, 128)


@pytest.mark.parametrize("rows", [1, 127, 4096, 9000])
def test_quantizing_in_pieces_changes_nothing(rows: int) -> None:
    weight = torch.randn(rows, 130, generator=torch.Generator().manual_seed(rows)).bfloat16()
    codes, scale = _quantize_in_pieces(weight, BlockSize())
    want_codes, want_scale = quantize_weight(weight)
    assert torch.equal(codes.view(torch.uint8), want_codes.view(torch.uint8)) and torch.equal(scale, want_scale)


# A head that is FP8 in the checkpoint.


def config_with_fp8_head() -> BlockFp8AscendConfig:
    config = BlockFp8AscendConfig(BlockFp8Config())
    config.modules.obey({"lm_head": "fp8"})
    return config


def stored_head(problem: Problem) -> ParallelLMHead:
    config = config_with_fp8_head()
    vocabulary, hidden = problem.weight.shape
    head = ParallelLMHead(vocabulary, hidden, params_dtype=torch.bfloat16, quant_config=config, prefix="lm_head")
    head.weight.weight_loader(head.weight, problem.weight)
    head.weight_scale_inv.weight_loader(head.weight_scale_inv, problem.scale)
    head.quant_method.process_weights_after_loading(head)
    return head


@pytest.mark.parametrize("vocabulary", [264, 320, 1000])
def test_a_stored_head_is_a_linear_over_the_vocabulary(vocabulary: int) -> None:
    """The rows that vLLM adds, up to a multiple of 64, are zero."""
    problem = random_problem(5, (vocabulary,), 200, bias=True)
    head = stored_head(problem)
    assert isinstance(head.quant_method, BlockFp8HeadMethod)
    logits = head.quant_method.apply(head, problem.x, problem.bias)
    assert logits.shape == (5, head.num_embeddings_padded)
    assert_exact(logits[:, :vocabulary], problem)
    assert not logits[:, vocabulary:].any()


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Pretend to be rank `rank` of `size`, for heads made afterwards."""

    def pretend(rank: int, size: int) -> None:
        path = "vllm.model_executor.layers.vocab_parallel_embedding.get_tensor_model_parallel"
        monkeypatch.setattr(f"{path}_rank", lambda: rank)
        monkeypatch.setattr(f"{path}_world_size", lambda: size)

    return pretend


@pytest.mark.parametrize(("vocabulary", "count"), [(264, 2), (1000, 4), (130, 8)])
def test_ranks_have_the_tokens_that_vllm_gives_them(
    ranks: Callable[[int, int], None], vocabulary: int, count: int
) -> None:
    """Cut within blocks; the last of many ranks may have nothing but padding."""
    problem, parts = random_problem(5, (vocabulary,), 200), []
    for rank in range(count):
        ranks(rank, count)
        head = stored_head(problem)
        parts.append(head.quant_method.apply(head, problem.x))
    assert_exact(torch.cat(parts, 1)[:, :vocabulary], problem)


def test_a_stored_head_of_another_vocabulary_is_refused() -> None:
    problem = random_problem(1, (320,), 200)
    head = ParallelLMHead(300, 200, params_dtype=torch.bfloat16, quant_config=config_with_fp8_head(), prefix="lm_head")
    with pytest.raises(BlockFp8Error, match=r"does not fit(?s:.)*lm_head\.weight"):
        head.weight.weight_loader(head.weight, problem.weight)
    with pytest.raises(BlockFp8Error, match=r"does not fit(?s:.)*lm_head\.weight_scale_inv"):
        head.weight_scale_inv.weight_loader(head.weight_scale_inv, problem.scale[:2])
    with pytest.raises(BlockFp8Error, match="tokens are added"):
        ParallelLMHead(328, 200, org_num_embeddings=320, quant_config=config_with_fp8_head(), prefix="lm_head")


def test_a_stored_head_that_is_tied_is_the_embedding() -> None:
    embedding = VocabParallelEmbedding(128, 64, params_dtype=torch.bfloat16)
    torch.nn.init.normal_(embedding.weight)
    head = ParallelLMHead(128, 64, params_dtype=torch.bfloat16, quant_config=config_with_fp8_head(), prefix="lm_head")
    head = head.tie_weights(embedding)
    head.quant_method.process_weights_after_loading(head)
    x = torch.randn(2, 64).bfloat16()
    torch.testing.assert_close(head.quant_method.apply(head, x), torch.nn.functional.linear(x, embedding.weight))
