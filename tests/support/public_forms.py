"""The forms in which block-FP8 checkpoints are public, each as a small model, and what `inspect` says of them.

`python -m tests.support.public_forms` renews the table of docs/checkpoints.md, with the distances that are recorded.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from qwen3_fp8_ascend.checkpoints.inspect import inspect_checkpoint
from qwen3_fp8_ascend.checkpoints.quantize import quantize_checkpoint, quantize_weight
from qwen3_fp8_ascend.errors import printable
from tests.support.offline import EMBEDDINGS, LOGPROBS, SCORES
from tests.support.public_models import write_model
from tests.test_containers import LLM_COMPRESSOR, MODELOPT_CONFIG, MODELOPT_FILE, changed

DOCUMENT = Path(__file__).parent.parent.parent / "docs" / "checkpoints.md"
RESULTS = DOCUMENT.parent / "results" / "forms" / "forms.json"
"""What `tests.support.measured_forms` measured."""
BEGIN, END = "<!-- forms -->", "<!-- end of forms -->"
E4M3 = torch.float8_e4m3fn
FP8: dict[str, Any] = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}
LEFT_ALONE = ("*.in_proj_a", "*.in_proj_b", "*.in_proj_ba")
EVERY_NAME = "every name"
"""Stands for the list of all modules that are not quantized, as official releases have it."""

Tensors = dict[str, torch.Tensor]


def as_they_are(tensors: Tensors) -> Tensors:
    return tensors


def _scales(tensors: Tensors, change: Callable[[str, torch.Tensor], tuple[str, torch.Tensor]]) -> Tensors:
    return dict(change(n, t) if n.endswith("_scale_inv") else (n, t) for n, t in tensors.items())


def bf16_scales(tensors: Tensors) -> Tensors:
    return _scales(tensors, lambda name, scale: (name, scale.bfloat16()))


def weight_scale(tensors: Tensors) -> Tensors:
    return _scales(tensors, lambda name, scale: (name.removesuffix("_inv"), scale))


def bf16_weight_scale(tensors: Tensors) -> Tensors:
    return weight_scale(bf16_scales(tensors))


def four_axes(tensors: Tensors) -> Tensors:
    return _scales(tensors, lambda name, scale: (name.removesuffix("_inv"), scale[:, None, :, None].contiguous()))


def channel_scales(tensors: Tensors) -> Tensors:
    return _scales(
        tensors,
        lambda name, s: (
            name.removesuffix("_inv"),
            torch.ones(len(tensors[name.removesuffix("_scale_inv")]), 1).bfloat16(),
        ),
    )


def powers_of_two(tensors: Tensors) -> Tensors:
    return _scales(tensors, lambda name, scale: (name, torch.exp2(torch.ceil(torch.log2(scale)))))


def e8m0_scales(tensors: Tensors) -> Tensors:
    return _scales(powers_of_two(tensors), lambda name, scale: (name, scale.to(torch.float8_e8m0fnu)))


def rows_of_their_own(tensors: Tensors) -> Tensors:
    """Blocks of 1 x 128."""

    def grown(name: str, scale: torch.Tensor) -> tuple[str, torch.Tensor]:
        rows = len(tensors[name.removesuffix("_scale_inv")])
        return name, scale.repeat_interleave(128, 0)[:rows].contiguous()

    return _scales(tensors, grown)


def cache_scales(tensors: Tensors) -> Tensors:
    attention = "model.layers.0.self_attn"
    return tensors | {f"{attention}.{name}": torch.ones(1) for name in ("k_scale", "v_scale", "k_proj.k_scale")}


def fp8_head(tensors: Tensors) -> Tensors:
    codes, scale = quantize_weight(tensors["lm_head.weight"])
    return tensors | {"lm_head.weight": codes, "lm_head.weight_scale_inv": scale}


def transposed_experts(tensors: Tensors) -> Tensors:
    """All experts of a layer in two tensors of transposed matrices, with their scales; the masters have them so."""
    rest = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    parts: dict[str, dict[int, dict[str, torch.Tensor]]] = {}
    for name in tensors.keys() - rest.keys():
        layer, _, tail = name.partition(".experts.")
        number, _, tail = tail.partition(".")
        parts.setdefault(layer, {}).setdefault(int(number), {})[tail] = tensors[name].view(_bytes(tensors[name]))
    for layer, experts in parts.items():
        for merged, projections in {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}.items():
            for ending, stored in {"weight": merged, "weight_scale_inv": f"{merged}_scale_inv"}.items():
                whole = [torch.cat([experts[e][f"{p}.{ending}"] for p in projections]) for e in sorted(experts)]
                made = torch.stack(whole).mT.contiguous()
                rest[f"{layer}.experts.{stored}"] = made.view(E4M3) if ending == "weight" else made
    return rest


def _bytes(tensor: torch.Tensor) -> torch.dtype:
    return torch.uint8 if tensor.dtype == E4M3 else tensor.dtype


@dataclass(frozen=True, eq=False)
class Form:
    """A family's model, the list or container that its config.json has, and how its tensors differ."""

    family: str
    said: str
    quantization: dict[str, Any]
    edit: Callable[[Tensors], Tensors] = as_they_are
    file: str = "config.json"
    options: dict[str, Any] = field(default_factory=dict)
    """Arguments of vLLM's LLM with which this form is served, its twin too."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Of this plugin."""
    asked: str = LOGPROBS


def _fp8(*ignored: str, **changes: Any) -> dict[str, Any]:
    return FP8 | ({"modules_to_not_convert": list(ignored)} if ignored else {}) | changes


def _llm_compressor(*ignored: str) -> dict[str, Any]:
    return LLM_COMPRESSOR | {"ignore": list(ignored)}


RERANKER: dict[str, Any] = {
    "runner": "pooling",
    "hf_overrides": {
        "architectures": ["Qwen3ForSequenceClassification"],
        "classifier_from_token": ["n", "y"],  # of Qwen3-Reranker "no" and "yes"; the tests' tokenizer knows bytes
        "is_original_qwen3_reranker": True,
    },
}
REFERENCE_MLA = {"attention_backend": "CPU_MLA"}
"""What vLLM takes on an AMX processor is for bf16."""

VISION = ("model.visual", "lm_head", r"re:.*in_proj_[ab]$")
FORMS = (
    Form("qwen3", "`fp8`, no list", _fp8()),
    Form("qwen3", '`fp8`, `["lm_head"]`, bf16 scales', _fp8("lm_head"), bf16_scales),
    Form("qwen2", "`fp8`", _fp8("lm_head")),
    Form("llama", "`fp8`", _fp8("lm_head")),
    Form("seed_oss", "`fp8`", _fp8("lm_head")),
    Form("gemma3_text", "`fp8`", _fp8("lm_head")),
    Form("glm4", "`fp8`, gate and up merged on disk", _fp8("lm_head")),
    Form("phi3", "`fp8`, q, k and v merged too", _fp8("lm_head")),
    Form("qwen3_vl", "`fp8`, every name in the list, bf16 scales", _fp8(EVERY_NAME), bf16_scales),
    Form("qwen3_vl", "`fp8`, `model.visual` alone", _fp8("model.visual", "lm_head")),
    Form("qwen3_vl", "`fp8`, names without the wrapper", _fp8("visual", "lm_head")),
    Form("qwen3_5", "`fp8`, every name in the list, bf16 scales", _fp8(EVERY_NAME), bf16_scales),
    Form("qwen3_5", "`fp8`, `re:` patterns", _fp8(*VISION)),
    Form("qwen3_5", "`fp8`, shell-style patterns", _fp8("model.visual*", "lm_head", "*.linear_attn.in_proj_[ab]")),
    Form("qwen3_5", "`fp8`, transformers' patterns", _fp8("visual", "lm_head", r"model.*.linear_attn.in_proj_(a|b)$")),
    Form("qwen3_5", "`fp8`, merged names", _fp8("model.visual", "lm_head", "in_proj_ba")),
    Form("qwen3_5", "`fp8`, a list that forgets `in_proj_a` and `in_proj_b`", _fp8("model.visual", "lm_head")),
    Form("mistral3", "`fp8`, `model.vision_tower`", _fp8("model.vision_tower", "multi_modal_projector", "lm_head")),
    Form("qwen3_moe", "`fp8`, experts one by one", _fp8("lm_head", "re:.*mlp.gate$")),
    Form("qwen3_next", "`fp8`, experts and a delta net", _fp8(EVERY_NAME)),
    Form("deepseek_v3", "`fp8`, experts and latent attention", _fp8("lm_head")),
    Form("qwen3_vl_moe", "`fp8`, experts one by one", _fp8("model.visual", "lm_head", "re:.*mlp.gate$")),
    Form(
        "qwen3_vl_moe",
        "`fp8`, a layer's experts in two transposed tensors",
        _fp8("model.visual", "lm_head", "re:.*mlp.gate$"),
        transposed_experts,
    ),
    Form("afmoe", "`fp8`, a router in a module of its own", _fp8("lm_head")),
    Form("granitemoe", "`fp8`, experts that stay in bf16", _fp8("lm_head")),
    Form(
        "minimax_m2",
        "`fp8`, experts chosen by a corrected sigmoid",
        _fp8("gate", "e_score_correction_bias", "lm_head", fmt="float8_e4m3fn"),
    ),
    Form("gemma4_text", "`fp8`, experts with GELU, values that are the keys", _fp8("lm_head")),
    Form("ernie4_5_moe", "`fp8`, experts chosen by a corrected softmax", _fp8("lm_head")),
    Form("qwen3", "compressed-tensors `FP8_BLOCK`", _llm_compressor("lm_head"), weight_scale),
    Form("qwen3", "compressed-tensors `FP8_BLOCK`, bf16 scales", _llm_compressor("lm_head"), bf16_weight_scale),
    Form(
        "qwen3",
        "compressed-tensors, weights only",
        changed("config_groups/group_0/input_activations", None),
        weight_scale,
    ),
    Form(
        "qwen3_vl", "compressed-tensors, `re:` patterns", _llm_compressor("re:.*lm_head", "re:.*visual.*"), weight_scale
    ),
    Form("qwen3_moe", "compressed-tensors, experts", _llm_compressor("lm_head", "re:.*mlp.gate$"), bf16_weight_scale),
    Form("qwen3", "ModelOpt `FP8_PB_WO`, scales of four axes", MODELOPT_CONFIG, four_axes),
    Form("qwen3", "ModelOpt, `hf_quant_config.json`", MODELOPT_FILE, four_axes, "hf_quant_config.json"),
    Form("qwen3_moe", "ModelOpt, experts", MODELOPT_CONFIG | {"ignore": ["lm_head", "*.mlp.gate"]}, four_axes),
    Form("qwen3", "`fp8`, scales of a KV cache", _fp8("lm_head"), cache_scales),
    Form("qwen3", "`fp8`, a list that excludes what is FP8", _fp8("lm_head", "mlp")),
    Form("qwen3", "`scale_fmt: ue8m0`, stored as fp32", _fp8("lm_head", scale_fmt="ue8m0"), powers_of_two),
    Form("qwen3", "`scale_fmt: ue8m0`, stored as e8m0", _fp8("lm_head", scale_fmt="ue8m0"), e8m0_scales),
    Form("qwen3", "`fp8`, an output head in FP8", _fp8(), fp8_head),
    Form(
        "qwen3",
        "`fp8`, blocks of 1×128",
        _fp8("lm_head", weight_block_size=[1, 128]),
        rows_of_their_own,
        settings={"backend": "reference"},
    ),
    Form("deepseek_v3, dense", "`fp8`, latent attention", _fp8("lm_head"), options=REFERENCE_MLA),
    Form(
        "deepseek_v3, dense, q_lora",
        "`fp8`, latent attention, queries of low rank",
        _fp8("lm_head"),
        options=REFERENCE_MLA,
    ),
    Form("qwen3", "`fp8`, as an embedding model", _fp8(), options={"runner": "pooling"}, asked=EMBEDDINGS),
    Form("qwen3", "`fp8`, as a reranker", _fp8(), options=RERANKER, asked=SCORES),
    Form("qwen3", "`fp8`, `--model-impl transformers`", _fp8(), options={"model_impl": "transformers"}),
    Form("llama", "`fp8`, static, no blocks", _fp8(activation_scheme="static", weight_block_size=None)),
    Form(
        "qwen3",
        "compressed-tensors per channel",
        changed("config_groups/group_0/weights/strategy", "channel"),
        channel_scales,
    ),
    Form("qwen3", "ModelOpt `FP8` per tensor", MODELOPT_CONFIG | {"quant_algo": "FP8"}, weight_scale),
    Form("deepseek_v3", "`expert_dtype: fp4`", _fp8("lm_head", expert_dtype="fp4")),
    Form("qwen3_moe", "`routed_experts_quant_method: mxfp4`", _fp8("lm_head", routed_experts_quant_method="mxfp4")),
    Form("qwen3", "`modules_to_convert`", _fp8(modules_to_convert=["mlp"])),
)


def write_forms(folder: Path) -> dict[Form, Path]:
    """Write every form into a folder of its own."""
    sources: dict[str, Path] = {}
    made: dict[Form, Path] = {}
    for number, form in enumerate(FORMS):
        if form.family not in sources:
            master = write_model(folder / f"{form.family}-bf16", form.family)
            sources[form.family] = folder / form.family
            names = load_file(master / "model.safetensors")
            ignore = [glob for glob in LEFT_ALONE if any(name.endswith(f"{glob[1:]}.weight") for name in names)]
            quantize_checkpoint(master, sources[form.family], ignore=ignore, progress=False)
        made[form] = _write_form(sources[form.family], folder / f"form{number}", form)
    return made


def _write_form(source: Path, folder: Path, form: Form) -> Path:
    shutil.copytree(source, folder)
    file = folder / "model.safetensors"
    save_file(form.edit(load_file(file)), file, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    every = config.pop("quantization_config")["modules_to_not_convert"]
    quantization = json.loads(json.dumps(form.quantization))
    if quantization.get("modules_to_not_convert") == [EVERY_NAME]:
        quantization["modules_to_not_convert"] = every
    if form.file == "config.json":
        config["quantization_config"] = quantization
    else:
        (folder / form.file).write_text(json.dumps(quantization))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def verdict(folder: Path) -> str:
    """What `inspect` says of a checkpoint, in one line."""
    report = inspect_checkpoint(folder)
    if report.errors:
        first = report.errors[0]
        where = (first.tensor or first.file or "").removeprefix("config.json: ")
        return f"refused: {first.what} (`{where}`: expected {first.expected}, got {first.got})"
    said = f"served; experts with {report.experts.divided}" if report.experts else "served"
    for kind, found in (("warning", report.warnings), ("note", report.notes)):
        if found:
            count = f"{len(found)} {kind}s, the first" if len(found) > 1 else f"one {kind}"
            said += f"; {count}: {found[0].what} (`{found[0].tensor or found[0].file}`)"
    return said


UNITS = {LOGPROBS: "", EMBEDDINGS: ", of an embedding's numbers", SCORES: ", of scores"}


def table(forms: dict[Form, Path]) -> str:
    """The table of docs/checkpoints.md."""
    recorded = {(row["model"], row["form"]): row for row in json.loads(RESULTS.read_text())["forms"]}
    rows = []
    for form, folder in forms.items():
        row, measured = recorded.get((form.family, form.said)), "| |"
        if row is not None and row["error"]:
            measured = f"| not run here: {printable(row['error'], 200)} | |"
        elif row is not None:
            dtype = "" if row["dtype"] == "float32" else ", in bf16"
            measured = f"| {row['distance']:.1e}{UNITS[form.asked]}{dtype} | {row['cost']:.2g} |"
        rows.append(f"| {form.family} | {form.said} | {verdict(folder)} {measured}")
    head = "| model | form | `inspect` and serving | from the twin | twin from bf16 |"
    return "\n".join([head, "|---|---|---|---|---|", *rows])


def renewed(text: str, forms: dict[Form, Path]) -> str:
    """A document with the table between its marks written anew."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{table(forms)}\n{END}{rest.split(END)[1]}"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        text = DOCUMENT.read_text(encoding="utf-8")
        DOCUMENT.write_text(renewed(text, write_forms(Path(folder))), encoding="utf-8")


if __name__ == "__main__":
    main()
