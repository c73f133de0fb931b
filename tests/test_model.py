"""A whole real model (SmolLM2-135M) with our linears in transformers: no server, full control of the arithmetic."""

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from qwen3_fp8_ascend import ops, reference
from qwen3_fp8_ascend.evaluate.precision.prompts import all_prompts
from qwen3_fp8_ascend.format import Activation
from qwen3_fp8_ascend.testing.judges import FP32_REL_L2, Problem, assert_exact
from tests.support.noise import FALSE_ALARMS, rank_sum_probability

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

DRAWS = 3
LENGTH = 24
"""Tokens of a text, at most: all texts go through the model together, and padding takes as long as tokens do."""

Linear = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def cpu(activation: Activation) -> Linear:
    packed: dict[int, ops.PackedWeight] = {}

    def run(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        if id(weight) not in packed:
            packed[id(weight)] = ops.pack_weight(weight, scale, backend="cpu")
        return ops.block_linear(x, packed[id(weight)], None, activation)

    return run


def specified(
    activation: Activation, compute_dtype: torch.dtype = torch.float32, noise: torch.Generator | None = None
) -> Linear:
    """The specification; with `noise`, each result is off by random FP32_REL_L2, as far as an exact backend may be."""
    converted: dict[int, torch.Tensor] = {}

    def run(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        if id(weight) not in converted:
            converted[id(weight)] = weight.to(compute_dtype)
        codes = converted[id(weight)]
        out = reference.block_linear(x, codes, scale, activation=activation, compute_dtype=compute_dtype)
        if noise is not None:
            out = out * (1 + FP32_REL_L2 * torch.randn(out.shape, generator=noise))
        return out.to(x.dtype)

    return run


class Model:
    """SmolLM2 in fp32 whose decoder linears are computed by a function of ours."""

    def __init__(self, folder: Path) -> None:
        bf16 = folder.with_name(folder.name.removesuffix("-FP8"))
        self.model = transformers.AutoModelForCausalLM.from_pretrained(bf16, dtype=torch.float32)
        tokenizer = transformers.AutoTokenizer.from_pretrained(bf16)
        self.texts = [tokenizer(text, return_tensors="pt").input_ids[0, :LENGTH] for text in all_prompts()]
        self.fp8 = load_file(folder / "model.safetensors")
        self.layers = {
            name: module for name, module in self.model.named_modules() if f"{name}.weight_scale_inv" in self.fp8
        }
        assert len(self.layers) == 210
        self.originals = {name: module.forward for name, module in self.layers.items()}

    @torch.inference_mode()
    def logprobs(self, linear: Linear | None) -> list[torch.Tensor]:
        """Log-probability of every token but the first, text by text; None is the original model.

        Texts are padded at their end, where no token of theirs looks, and rows of a linear do not depend on each other.
        """
        for name, module in self.layers.items():
            weight, scale = self.fp8[f"{name}.weight"], self.fp8[f"{name}.weight_scale_inv"]
            module.forward = (
                self.originals[name] if linear is None else lambda x, w=weight, s=scale: linear(x, w, s)  # type: ignore[misc]
            )
        padded = torch.nn.utils.rnn.pad_sequence(self.texts, batch_first=True)
        all_tokens = self.model(padded).logits.log_softmax(-1)[:, :-1]
        of_tokens = all_tokens.gather(2, padded[:, 1:, None])[:, :, 0]
        return [row[: len(ids) - 1] for row, ids in zip(of_tokens, self.texts, strict=True)]

    @functools.cached_property
    def original(self) -> list[torch.Tensor]:
        """The same of the original model."""
        return self.logprobs(None)


@pytest.fixture(scope="module")
def model(smollm2: Path) -> Model:
    return Model(smollm2)


def distances(a: list[torch.Tensor], b: list[torch.Tensor]) -> np.ndarray:
    """Mean absolute difference of each text's log-probabilities, in nats a token. Shapes: -> (texts,)."""
    return np.array([float((one - other).abs().mean()) for one, other in zip(a, b, strict=True)])


def test_every_linear_is_exact_on_real_activations(model: Model) -> None:
    """The same input to both, layer by layer, so that nothing is amplified: all 210 linears by the oracle."""
    layers, judged = cpu(Activation.W8A8), 0

    def judge(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        nonlocal judged
        out = layers(x, weight, scale)
        assert_exact(out.flatten(0, -2), Problem(x.flatten(0, -2), weight, scale))
        judged += 1
        return out

    model.texts, texts = model.texts[:1], model.texts
    model.logprobs(judge)
    model.texts = texts
    assert judged == 210


def test_log_probabilities_without_activation_quantization(model: Model) -> None:
    spec, ours = (model.logprobs(f) for f in (specified(Activation.W8A16), cpu(Activation.W8A16)))
    fp8, ours_off = distances(spec, model.original).mean(), distances(ours, spec).mean()
    print(f"\nW8A16, nats a token: FP8 against the original {fp8:.4f}, cpu against the specification {ours_off:.7f}")
    assert 0.01 < fp8 < 0.3
    assert ours_off < fp8 / 1000


def test_log_probabilities_at_the_noise_floor(model: Model) -> None:
    """W8A8: the specification against itself with other roundings is the floor below which nobody can get.

    A difference of one fp32 rounding flips a few codes in a layer; each flip is 6 % of an activation, which flips
    more in the next layer. After a few layers two exact implementations are as far apart as the codes are coarse, and
    only something gross is told from rounding: that each linear alone is exact is what shows that they are right.
    """
    wide, ours = (model.logprobs(f) for f in (specified(Activation.W8A8, torch.float64), cpu(Activation.W8A8)))
    generator = torch.Generator().manual_seed(0)
    noisy = [model.logprobs(specified(Activation.W8A8, noise=generator)) for _ in range(DRAWS)]
    noise, ours_off = np.stack([distances(run, wide) for run in noisy], axis=1), distances(ours, wide)
    fp8 = distances(wide, model.original).mean()
    print(f"\nW8A8, nats a token: FP8 against the original {fp8:.4f}, cpu {ours_off.mean():.4f};")
    print(f"  noise floor: the specification, each linear off by {FP32_REL_L2}: {noise.mean(0)}")
    assert noise.mean() < fp8
    assert rank_sum_probability(ours_off, noise) > FALSE_ALARMS
    assert rank_sum_probability(distances(model.logprobs(wrong_scales), wide), noise) < FALSE_ALARMS


def wrong_scales(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The negative control: the specification with every block's scale taken from the next row of blocks."""
    return specified(Activation.W8A8)(x, weight, scale.roll(1, 0))
