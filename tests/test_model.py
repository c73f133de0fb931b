"""A whole real model (SmolLM2-135M) with our linears in transformers: no server, full control of the arithmetic."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qwen3_fp8_ascend import ops, reference
from qwen3_fp8_ascend.testing.judges import Problem, assert_exact
from qwen3_fp8_ascend.testing.logprobs import TEXTS

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

Linear = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def cpu(activation: str) -> Linear:
    packed: dict[int, ops.PackedWeight] = {}

    def run(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        if id(weight) not in packed:
            packed[id(weight)] = ops.pack_weight(weight, scale, "cpu")
        return ops.block_linear(x, packed[id(weight)], None, activation)

    return run


def specified(activation: str, compute_dtype: torch.dtype = torch.float32) -> Linear:
    def run(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        out = reference.block_linear(x, weight, scale, activation=activation, compute_dtype=compute_dtype)
        return out.to(x.dtype)

    return run


class Model:
    """SmolLM2 in fp32 whose decoder linears are computed by a function of ours."""

    def __init__(self, folder: Path) -> None:
        bf16 = folder.with_name(folder.name.removesuffix("-FP8"))
        self.model = transformers.AutoModelForCausalLM.from_pretrained(bf16, dtype=torch.float32)
        self.texts = [transformers.AutoTokenizer.from_pretrained(bf16)(t, return_tensors="pt").input_ids for t in TEXTS]
        self.fp8 = load_file(folder / "model.safetensors")
        self.layers = {
            name: module for name, module in self.model.named_modules() if f"{name}.weight_scale_inv" in self.fp8
        }
        assert len(self.layers) == 210
        self.originals = {name: module.forward for name, module in self.layers.items()}

    @torch.inference_mode()
    def logprobs(self, linear: Linear | None) -> torch.Tensor:
        """Log-probability of every token but the first of each text; None is the original model."""
        for name, module in self.layers.items():
            weight, scale = self.fp8[f"{name}.weight"], self.fp8[f"{name}.weight_scale_inv"]
            module.forward = (
                self.originals[name] if linear is None else lambda x, w=weight, s=scale: linear(x, w, s)  # type: ignore[misc]
            )
        out = []
        for ids in self.texts:
            all_tokens = self.model(ids).logits.log_softmax(-1)[0, :-1]
            out.append(all_tokens.gather(1, ids[0, 1:, None])[:, 0])
        return torch.cat(out)


@pytest.fixture(scope="module")
def model(smollm2: Path) -> Model:
    return Model(smollm2)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().mean())


def test_every_linear_is_exact_on_real_activations(model: Model) -> None:
    """The same input to both, layer by layer, so that nothing is amplified: all 210 linears by the oracle."""
    layers, judged = cpu("dynamic"), 0

    def judge(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        nonlocal judged
        out = layers(x, weight, scale)
        assert_exact(out.flatten(0, -2), Problem(x.flatten(0, -2), weight, scale))
        judged += 1
        return out

    model.texts, texts = model.texts[1:2], model.texts
    model.logprobs(judge)
    model.texts = texts
    assert judged == 210


def test_log_probabilities_without_activation_quantization(model: Model) -> None:
    original, spec, ours = (model.logprobs(f) for f in (None, specified("none"), cpu("none")))
    fp8, ours_off = distance(spec, original), distance(ours, spec)
    print(f"\nW8A16, nats a token: FP8 against the original {fp8:.4f}, cpu against the specification {ours_off:.7f}")
    assert 0.01 < fp8 < 0.3
    assert ours_off < fp8 / 1000


def test_log_probabilities_at_the_noise_floor(model: Model) -> None:
    """W8A8: the specification against itself with other roundings is the floor below which nobody can get.

    A difference of one fp32 rounding flips a few codes in a layer; each flip is 6 % of an activation, which flips
    more in the next layer. After a few layers two exact implementations are as far apart as the codes are coarse.
    """
    original, spec, wide, ours = (
        model.logprobs(f) for f in (None, specified("dynamic"), specified("dynamic", torch.float64), cpu("dynamic"))
    )
    fp8, floor, ours_off = distance(spec, original), distance(spec, wide), distance(ours, wide)
    print(f"\nW8A8, nats a token: FP8 against the original {fp8:.4f}, noise floor {floor:.4f}, cpu {ours_off:.4f}")
    assert floor < fp8
    assert ours_off < 1.5 * floor
