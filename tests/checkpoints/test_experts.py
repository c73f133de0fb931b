"""Mixtures of experts in checkpoints: what `inspect` says of them, and what the conversions make of them."""

from __future__ import annotations

import io
import json
import operator
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from qwen3_fp8_ascend import reference
from qwen3_fp8_ascend.checkpoints.dequantize import dequantize_checkpoint
from qwen3_fp8_ascend.checkpoints.experts import dividing_ranks, whole_block_ranks
from qwen3_fp8_ascend.checkpoints.folder import read_checkpoint
from qwen3_fp8_ascend.checkpoints.inspect import check_checkpoint, inspect_checkpoint
from qwen3_fp8_ascend.checkpoints.plan import make_plan
from qwen3_fp8_ascend.checkpoints.quantize import quantize_checkpoint, quantize_weight
from qwen3_fp8_ascend.checkpoints.render import render
from qwen3_fp8_ascend.errors import BlockFp8Error
from qwen3_fp8_ascend.format import BlockFp8Config, BlockSize, scale_shape
from tests.support.checkpoint_folders import BLOCK_FP8, one_thread, write_folder  # noqa: F401

E4M3 = torch.float8_e4m3fn
EXPERTS, HIDDEN, INNER = 4, 200, 256
MLP, MOE = "model.layers.0.mlp", "model.layers.0.moe"
CONFIG = {
    "num_hidden_layers": 1,
    "hidden_size": HIDDEN,
    "num_experts": EXPERTS,
    "moe_intermediate_size": INNER,
    "hidden_act": "silu",
}
SHAPES = {"gate_proj": (INNER, HIDDEN), "up_proj": (INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}

Tensors = dict[str, torch.Tensor]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def masters() -> Tensors:
    """An embedding and a layer with a router, a shared expert and routed experts, bf16, each projection a tensor."""
    tensors = {
        f"{MLP}.experts.{expert}.{name}.weight": random(*shape, seed=10 * expert + i)
        for expert in range(EXPERTS)
        for i, (name, shape) in enumerate(SHAPES.items())
    }
    tensors |= {f"{MLP}.shared_expert.{name}.weight": random(*shape, seed=77) for name, shape in SHAPES.items()}
    tensors[f"{MLP}.gate.weight"] = random(EXPERTS, HIDDEN)
    tensors[f"{MLP}.shared_expert_gate.weight"] = random(1, HIDDEN)
    tensors["model.embed_tokens.weight"] = random(8, HIDDEN)
    return tensors


def fused(tensors: Tensors) -> Tensors:
    """The same with all experts in two tensors, gate above up."""
    out = {name: t for name, t in tensors.items() if ".experts." not in name}
    parts = {
        name: torch.stack([tensors[f"{MLP}.experts.{expert}.{name}.weight"] for expert in range(EXPERTS)])
        for name in SHAPES
    }
    out[f"{MLP}.experts.gate_up_proj"] = torch.cat([parts["gate_proj"], parts["up_proj"]], dim=1)
    out[f"{MLP}.experts.down_proj"] = parts["down_proj"]
    return out


def transposed(tensors: Tensors) -> Tensors:
    """All experts in two tensors of transposed matrices, as Qwen3-VL-MoE and Llama 4 have them."""
    return {name: t.mT.contiguous() if t.dim() == 3 else t for name, t in fused(tensors).items()}


def stacked(tensors: Tensors) -> Tensors:
    """All experts in three tensors beside their router, as Step-3.5 has them."""
    out = {name.replace(".mlp.", ".moe."): t for name, t in tensors.items() if ".experts." not in name}
    for name in SHAPES:
        parts = [tensors[f"{MLP}.experts.{expert}.{name}.weight"] for expert in range(EXPERTS)]
        out[f"{MOE}.{name}.weight"] = torch.stack(parts)
    return out


def quantized(tensors: Tensors) -> Tensors:
    """In block FP8 but for routers and the embedding, by `quantize_weight` alone; fused tensors stay fused."""
    out = {}
    for name, tensor in tensors.items():
        matrices = tensor if tensor.dim() == 3 else tensor[None]
        if name.endswith(("gate.weight", "embed_tokens.weight")):
            out[name] = tensor
            continue
        codes, scales = zip(*(quantize_weight(matrix) for matrix in matrices), strict=True)
        made = torch.stack([c.view(torch.uint8) for c in codes]).view(E4M3), torch.stack(scales)
        out[name], out[f"{name}_scale_inv"] = made if tensor.dim() == 3 else (made[0][0], made[1][0])
    return out


def write(folder: Path, tensors: Tensors, **changes: Any) -> Path:
    """A block-FP8 checkpoint of one layer."""
    quantization = BLOCK_FP8 | {"modules_to_not_convert": [f"{MLP}.gate", f"{MLP}.shared_expert_gate"]}
    quantization |= changes.pop("quantization", {})
    config = CONFIG | {"quantization_config": quantization} | changes
    return write_folder(folder, {"model.safetensors": tensors}, config)


@pytest.mark.parametrize("form", [lambda t: t, fused, transposed], ids=["one by one", "fused", "transposed"])
def test_experts_become_tensors_of_their_own(tmp_path: Path, form: Callable[[Tensors], Tensors]) -> None:
    """Whichever form the source has: as official FP8 releases, routers and their gates left as they are and listed."""
    source = write_folder(tmp_path / "source", {"model.safetensors": form(masters())}, CONFIG)
    quantize_checkpoint(source, tmp_path / "fp8", progress=False)
    out, expected = load_file(tmp_path / "fp8" / "model.safetensors"), quantized(masters())
    assert out.keys() == expected.keys()
    for name, tensor in expected.items():
        raw = [t.view(torch.uint8) if t.dtype == E4M3 else t for t in (out[name], tensor)]
        assert torch.equal(*raw), name
    report = check_checkpoint(tmp_path / "fp8")
    assert report.anomalies == ()
    assert report.config is not None
    assert set(report.config.ignored) == {"lm_head", f"{MLP}.gate", f"{MLP}.shared_expert_gate"}
    assert report.experts is not None
    assert report.to_dict()["experts"] == {
        "layers": 1,
        "experts": EXPERTS,
        "hidden": HIDDEN,
        "intermediate": INNER,
        "ranks": (1, 2, 4, 8, 16, 32, 64),
        "whole_block_ranks": (1, 2),
    }
    console = Console(file=io.StringIO(), width=300)
    render(report, console)
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert (
        "1 layers of 4" in said
        and "--tensor-parallel-size 1, 2, 4, 8, 16, 32, 64, or any with --enable-expert-parallel" in said
    )


@pytest.mark.parametrize("form", [fused, transposed])
def test_fused_fp8_experts_are_read_and_dequantized(tmp_path: Path, form: Callable[[Tensors], Tensors]) -> None:
    folder = write(tmp_path / "fp8", quantized(form(masters())))
    report = check_checkpoint(folder)
    assert report.anomalies == () and report.experts is not None
    assert (report.experts.experts, report.experts.hidden, report.experts.intermediate) == (EXPERTS, HIDDEN, INNER)
    dequantize_checkpoint(folder, tmp_path / "bf16", progress=False)
    out = load_file(tmp_path / "bf16" / "model.safetensors")
    assert out.keys() == form(masters()).keys()
    for name, tensor in form(masters()).items():
        if tensor.dim() == 3:
            for expert, matrix in enumerate(tensor):
                assert torch.equal(out[name][expert], reference.dequantize_weight(*quantize_weight(matrix)))


def test_stacked_experts_stay_stacked(tmp_path: Path) -> None:
    """There and back: the tensors of the public checkpoint, each with the scales of all experts."""
    source = write_folder(tmp_path / "source", {"model.safetensors": stacked(masters())}, CONFIG)
    quantize_checkpoint(source, tmp_path / "fp8", progress=False)
    out, expected = load_file(tmp_path / "fp8" / "model.safetensors"), quantized(stacked(masters()))
    assert out.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(*(t.view(torch.uint8) if t.dtype == E4M3 else t for t in (out[name], tensor))), name
    report = check_checkpoint(tmp_path / "fp8")
    assert report.anomalies == () and report.experts is not None
    assert (report.experts.experts, report.experts.hidden, report.experts.intermediate) == (EXPERTS, HIDDEN, INNER)
    plan = make_plan(read_checkpoint(tmp_path / "fp8"), BlockFp8Config.from_dict(BLOCK_FP8))
    assert plan.kinds()[f"{MOE}.experts"] == "fp8" and plan.modules[f"{MOE}.experts"].experts == EXPERTS
    dequantize_checkpoint(tmp_path / "fp8", tmp_path / "bf16", progress=False)
    back = load_file(tmp_path / "bf16" / "model.safetensors")
    assert back.keys() == stacked(masters()).keys()
    for name in SHAPES:
        for expert, matrix in enumerate(stacked(masters())[f"{MOE}.{name}.weight"]):
            want = reference.dequantize_weight(*quantize_weight(matrix))
            assert torch.equal(back[f"{MOE}.{name}.weight"][expert], want)


def test_stacked_experts_may_be_left_alone_together(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", {"model.safetensors": stacked(masters())}, CONFIG)
    with pytest.raises(BlockFp8Error, match=r"(?s)split the experts of a layer.*moe\.down_proj"):
        quantize_checkpoint(source, tmp_path / "fp8", ignore=["*.moe.down_proj"], progress=False)
    globs = [f"*.moe.{name}" for name in SHAPES]
    quantize_checkpoint(source, tmp_path / "fp8", ignore=globs, progress=False)
    report = check_checkpoint(tmp_path / "fp8")
    assert report.anomalies == () and report.experts is None
    assert report.config is not None
    assert {f"{MOE}.{name}" for name in SHAPES} <= set(report.config.ignored)


def of_stacked(name: str, change: Callable[[torch.Tensor], torch.Tensor] | None) -> Callable[[Tensors], None]:
    """Change a projection of all experts and its scales, or lose it."""

    def damage(t: Tensors) -> None:
        for tensor in (f"{MOE}.{name}.weight", f"{MOE}.{name}.weight_scale_inv"):
            held = t.pop(tensor)
            if change is not None:
                t[tensor] = change(held.view(torch.uint8) if held.dtype == E4M3 else held).view(held.dtype)

    return damage


def stacked_in_bf16(t: Tensors) -> None:
    t[f"{MOE}.up_proj.weight"] = t[f"{MOE}.up_proj.weight"].bfloat16()
    del t[f"{MOE}.up_proj.weight_scale_inv"]


STACKED_ANOMALIES: dict[str, tuple[Callable[[Tensors], None], str, str]] = {
    "a lost projection": (of_stacked("up_proj", None), "lacks a tensor of all its experts", "up_proj.weight"),
    "a lost expert": (of_stacked("up_proj", lambda t: t[:-1]), "another shape than the model's", "up_proj.weight"),
    "transposed": (
        of_stacked("down_proj", lambda t: t.mT.contiguous()),
        "another shape than the model's experts",
        "down_proj.weight",
    ),
    "a lost scale": (
        lambda t: operator.delitem(t, f"{MOE}.up_proj.weight_scale_inv"),
        "no block scales",
        "up_proj.weight",
    ),
    "bf16 in part": (stacked_in_bf16, "only some experts", "up_proj.weight"),
}


@pytest.mark.parametrize("name", STACKED_ANOMALIES)
def test_anomalies_of_stacked_experts_are_named(tmp_path: Path, name: str) -> None:
    damage, what, tensor = STACKED_ANOMALIES[name]
    tensors = quantized(stacked(masters()))
    damage(tensors)
    report = inspect_checkpoint(write(tmp_path / "damaged", tensors))
    assert [(what in a.what, a.tensor) for a in report.errors] == [(True, f"{MOE}.{tensor}")], report.errors


@pytest.mark.parametrize(
    ("form", "glob"),
    [(lambda t: t, f"{MLP}.experts*"), (lambda t: t, "*.experts.*"), (fused, f"{MLP}.experts")],
)
def test_ignored_experts_stay_and_are_listed(tmp_path: Path, form: Callable[[Tensors], Tensors], glob: str) -> None:
    source = write_folder(tmp_path / "source", {"model.safetensors": form(masters())}, CONFIG)
    quantize_checkpoint(source, tmp_path / "fp8", ignore=[glob], progress=False)
    report = check_checkpoint(tmp_path / "fp8")
    assert report.anomalies == () and report.experts is None and report.block_fp8_layers == 3
    assert report.config is not None
    listed = [name for name in report.config.ignored if ".experts" in name]
    assert listed == [f"{MLP}.experts"] if form is fused else len(listed) == 3 * EXPERTS


def test_ignoring_some_experts_of_a_layer_is_refused(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", {"model.safetensors": masters()}, CONFIG)
    with pytest.raises(BlockFp8Error, match=r"(?s)split the experts of a layer.*experts\.2\.down_proj"):
        quantize_checkpoint(source, tmp_path / "fp8", ignore=["*.experts.2.*"], progress=False)
    with pytest.raises(BlockFp8Error, match=r"(?s)split the experts of a layer.*experts\.0\.down_proj"):
        quantize_checkpoint(source, tmp_path / "fp8", ignore=["*.experts.*.down_proj"], progress=False)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda t: _transpose(t, "down_proj"), r"not laid out as gate above up.*\[4, 512, 200\]"),
        (lambda t: add("gate_up_proj_bias", EXPERTS, 2 * INNER)(t), r"experts with biases are not served"),
    ],
)
def test_other_masters_are_refused(tmp_path: Path, damage: Callable[[Tensors], None], said: str) -> None:
    """One of two tensors transposed; biases, as GPT-OSS has them, whose gate and up are interleaved besides."""
    tensors = fused(masters())
    damage(tensors)
    source = write_folder(tmp_path / "source", {"model.safetensors": tensors}, CONFIG)
    with pytest.raises(BlockFp8Error, match=f"(?s){said}"):
        quantize_checkpoint(source, tmp_path / "fp8", progress=False)


def test_a_bad_value_is_named_by_expert(tmp_path: Path) -> None:
    tensors = fused(masters())
    tensors[f"{MLP}.experts.gate_up_proj"][2, INNER + 3, 5] = torch.inf
    source = write_folder(tmp_path / "source", {"model.safetensors": tensors}, CONFIG)
    with pytest.raises(BlockFp8Error, match=r"(?s)NaN or infinite.*experts\.2\.up_proj\.weight"):
        quantize_checkpoint(source, tmp_path / "fp8", progress=False)


def drop(*endings: str) -> Callable[[Tensors], None]:
    def damage(t: Tensors) -> None:
        for name in [name for name in t if any(f"experts.{ending}" in name for ending in endings)]:
            del t[name]

    return damage


def swap_shapes(t: Tensors) -> None:
    """Transposed, with scales that fit."""
    name = f"{MLP}.experts.1.up_proj.weight"
    t[name] = t[name].view(torch.uint8).t().contiguous().view(E4M3)
    t[f"{name}_scale_inv"] = t[f"{name}_scale_inv"].t().contiguous()


def one_in_bf16(t: Tensors) -> None:
    name = f"{MLP}.experts.3.down_proj.weight"
    t[name] = t[name].bfloat16()
    del t[f"{name}_scale_inv"]


def add(name: str, *shape: int) -> Callable[[Tensors], None]:
    def damage(t: Tensors) -> None:
        t[f"{MLP}.experts.{name}"] = torch.zeros(*shape)

    return damage


def drop_gates(t: Tensors) -> None:
    for name in [name for name in t if ".experts." in name and ".gate_proj." in name]:
        del t[name]


def move_router(t: Tensors) -> None:
    t[f"{MLP}.router.gate.weight"] = t.pop(f"{MLP}.gate.weight")


def lose_experts_of_a_moved_router(t: Tensors) -> None:
    move_router(t)
    drop("")(t)


def two_more(t: Tensors) -> None:
    for name in [name for name in t if "experts.0." in name]:
        for expert in (4, 7):
            t[name.replace("experts.0.", f"experts.{expert}.")] = t[name].clone()


ANOMALIES: dict[str, tuple[Callable[[Tensors], None], dict[str, Any], str, str | None]] = {
    "a lost expert": (drop("2."), {}, "experts are missing", f"{MLP}.experts.2"),
    "the last expert lost": (drop("3."), {}, "experts are missing", f"{MLP}.experts.3"),
    "all experts lost": (drop(""), {}, "has a router and no experts", f"{MLP}.gate.weight"),
    "all experts lost beside a router of its own": (
        lose_experts_of_a_moved_router,
        {},
        "has a router and no experts",
        f"{MLP}.router.gate.weight",
    ),
    "no gates": (drop_gates, {}, "experts without a gate projection", f"{MLP}.experts.0.down_proj.weight"),
    "a lost projection": (drop("1.up_proj"), {}, "an expert lacks a weight", f"{MLP}.experts.1.up_proj"),
    "a lost scale": (drop("1.up_proj.weight_scale_inv"), {}, "no block scales", f"{MLP}.experts.1.up_proj.weight"),
    "too many": (two_more, {}, "more experts than config.json says", f"{MLP}.experts.4"),
    "swapped": (swap_shapes, {}, "another shape than the model's experts", f"{MLP}.experts.1.up_proj.weight"),
    "swapped, sizes unknown": (
        swap_shapes,
        {"moe_intermediate_size": None},
        "another shape than the model's experts",
        f"{MLP}.experts.1.up_proj.weight",
    ),
    "ignored in part": (
        one_in_bf16,
        {"quantization": {"modules_to_not_convert": [f"{MLP}.experts.3.down_proj", f"{MLP}.gate"]}},
        "only some experts of a layer are FP8",
        f"{MLP}.experts.3.down_proj.weight",
    ),
    "bf16 in part": (one_in_bf16, {}, "only some experts", f"{MLP}.experts.3.down_proj.weight"),
    "a bias": (add("0.gate_proj.bias", INNER), {}, "with biases are not served", f"{MLP}.experts.0.gate_proj.bias"),
    "biases": (add("gate_up_proj_bias", EXPERTS, 9), {}, "with biases", f"{MLP}.experts.gate_up_proj_bias"),
    "gelu": (lambda t: None, {"hidden_act": "gelu"}, "another activation than SiLU", None),
    "swigluoai": (lambda t: None, {"hidden_act": "swigluoai"}, "another activation than SiLU", None),
    "clamped to nothing": (lambda t: None, {"swiglu_limit": 0}, "no positive number", None),
    "clamped by an escape": (lambda t: None, {"swiglu_limit": "\x1b[2J\n"}, "no positive number", None),
}


@pytest.mark.parametrize("name", ANOMALIES)
def test_anomalies_are_named(tmp_path: Path, name: str) -> None:
    """Each once, and nothing else: `inspect` says before anything starts what serving would refuse."""
    damage, config, what, tensor = ANOMALIES[name]
    tensors = quantized(masters())
    assert (
        inspect_checkpoint(write(tmp_path / "sound", tensors, **(config if damage is swap_shapes else {}))).errors == ()
    )
    damage(tensors)
    report = inspect_checkpoint(write(tmp_path / "damaged", tensors, **config))
    assert [(what in a.what, a.tensor) for a in report.errors] == [(True, tensor)], report.errors
    assert report.errors[0].expected and report.errors[0].got and report.errors[0].fix
    assert report.errors[0].got.isprintable()


@pytest.mark.parametrize(
    "config",
    [{"swiglu_limit": 7.0}, {"swiglu_limit": 10, "hidden_act": "swigluoai"}, {"hidden_act": "gelu_pytorch_tanh"}],
)
def test_other_activations_that_are_served(tmp_path: Path, config: dict[str, Any]) -> None:
    """DeepSeek-V4, MiniMax-M3 and Gemma 4 have them."""
    assert inspect_checkpoint(write(tmp_path / "sound", quantized(masters()), **config)).anomalies == ()


def test_a_router_in_a_module_of_its_own(tmp_path: Path) -> None:
    """AFMoE (Trinity) and Hunyuan 3 have it so."""
    tensors = quantized(masters())
    move_router(tensors)
    assert inspect_checkpoint(write(tmp_path / "sound", tensors)).anomalies == ()


def test_experts_under_other_names_are_noted(tmp_path: Path) -> None:
    """GraniteMoE's are in two tensors a layer, which `quantize` leaves alone."""
    tensors = quantized(masters()) | {f"{MLP}.input_linear.weight": torch.zeros(4, 128, 64).bfloat16()}
    report = inspect_checkpoint(write(tmp_path / "sound", tensors))
    assert report.errors == () and report.warnings == ()
    assert [(note.tensor, note.got) for note in report.notes] == [(f"{MLP}.input_linear.weight", "1 tensors in BF16")]
    tensors[f"{MLP}.input_linear.weight"] = torch.zeros(128, 1, 4).bfloat16()  # a convolution
    assert inspect_checkpoint(write(tmp_path / "other", tensors)).notes == ()


FUSED_ANOMALIES: dict[str, tuple[Callable[[Tensors], None], str]] = {
    "one lost": (lambda t: drop("down_proj")(t), "lacks a tensor of all its experts"),
    "swapped": (lambda t: _transpose(t, "down_proj"), "do not fit each other"),
    "fewer": (lambda t: _halve(t), "another shape than the model's experts"),
}


def _transpose(t: Tensors, projection: str) -> None:
    for name in [name for name in t if f".experts.{projection}" in name]:
        raw = t[name].view(torch.uint8) if t[name].dtype == E4M3 else t[name]
        t[name] = raw.mT.contiguous().view(t[name].dtype)


def _halve(t: Tensors) -> None:
    for name in [name for name in t if ".experts." in name]:
        t[name] = t[name].view(torch.uint8 if t[name].dtype == E4M3 else torch.float32)[:2].view(t[name].dtype)


@pytest.mark.parametrize("name", FUSED_ANOMALIES)
def test_anomalies_of_fused_experts_are_named(tmp_path: Path, name: str) -> None:
    damage, what = FUSED_ANOMALIES[name]
    tensors = quantized(fused(masters()))
    damage(tensors)
    errors = inspect_checkpoint(write(tmp_path / "m", tensors)).errors
    assert [what in error.what for error in errors] == [True], errors


@pytest.mark.parametrize("inner", [96, 192])
def test_a_block_in_both_gate_and_up_is_refused(tmp_path: Path, inner: int) -> None:
    """transformers quantizes gate and up as one matrix: 96 + 96 rows have as many blocks as 2 x 96, but not those."""
    tensors: Tensors = {
        f"{MLP}.experts.gate_up_proj": torch.zeros(EXPERTS, 2 * inner, HIDDEN).to(E4M3),
        f"{MLP}.experts.gate_up_proj_scale_inv": torch.ones(EXPERTS, *scale_shape(2 * inner, HIDDEN)),
        f"{MLP}.experts.down_proj": torch.zeros(EXPERTS, HIDDEN, inner).to(E4M3),
        f"{MLP}.experts.down_proj_scale_inv": torch.ones(EXPERTS, *scale_shape(HIDDEN, inner)),
    }
    errors = inspect_checkpoint(write(tmp_path / "m", tensors, moe_intermediate_size=inner)).errors
    assert ["one block lies in both" in error.what for error in errors] == [True], errors
    assert errors[0].got == str(inner)


def test_a_count_of_experts_is_not_counted_up_to(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", quantized(masters()), num_experts=1 << 62)
    (error,) = inspect_checkpoint(folder).errors
    assert error.tensor == f"{MLP}.experts.4" and "experts are missing" in error.what


def test_experts_of_a_language_model_within_another(tmp_path: Path) -> None:
    """Qwen3.5 keeps its sizes in text_config."""
    folder = write(tmp_path / "m", quantized(masters()))
    config = json.loads((folder / "config.json").read_text())
    text = {key: config.pop(key) for key in CONFIG}
    (folder / "config.json").write_text(json.dumps(config | {"text_config": text | {"num_experts": 5}}))
    (error,) = inspect_checkpoint(folder).errors
    assert error.expected == "experts 0 to 4"


def test_ranks_that_leave_blocks_whole() -> None:
    """The table of the public models."""
    for intermediate, ranks in {
        768: (1, 2, 3, 6),
        1536: (1, 2, 3, 4, 6, 12),
        2560: (1, 2, 4, 5, 10, 20),
        512: (1, 2, 4),
        2048: (1, 2, 4, 8, 16),
        640: (1, 5),
        192: (1,),
    }.items():
        assert whole_block_ranks(intermediate, BlockSize()) == ranks
    assert whole_block_ranks(512, BlockSize(128, 256)) == (1, 2)


def test_the_document_says_which_public_experts_can_be_divided() -> None:
    text = (Path(__file__).parent.parent.parent / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([^|]+) \| (\d+) \| ([\d, ]+) \| ([\d, ]+) \|$", text, re.MULTILINE)
    assert len(rows) == 5
    for name, channels, whole, cut in rows:
        blocks, working = whole_block_ranks(int(channels), BlockSize()), dividing_ranks(int(channels))
        assert {int(size) for size in whole.split(",")} <= set(blocks), name
        assert {int(size) for size in cut.split(",")} <= set(working) - set(blocks), name
