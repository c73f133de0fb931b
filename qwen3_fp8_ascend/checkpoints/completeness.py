"""What a checkpoint lacks, told by the rest of it: what a lost file or tensor looks like.

Of a quantized model vLLM does not ask whether everything was loaded: where a tensor is lost it computes with whatever
is in memory (`load_weights` in vllm/model_executor/model_loader/default_loader.py, 0.30 to 0.33).
Scales that an FP8 weight lacks are in `rules`, and lost experts in `experts`.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Set
from typing import Any

from qwen3_fp8_ascend.checkpoints.anomaly import Anomaly
from qwen3_fp8_ascend.checkpoints.folder import Checkpoint
from qwen3_fp8_ascend.checkpoints.layers import LAYER, MTP_NAME, experts_of, is_of_encoder, layer_index, module_of
from qwen3_fp8_ascend.checkpoints.model_config import positive, setting
from qwen3_fp8_ascend.checkpoints.rules import DOWNLOAD_AGAIN, E4M3, FLOATS
from qwen3_fp8_ascend.checkpoints.weight_file import TensorEntry
from qwen3_fp8_ascend.format import WEIGHT_SUFFIX

BIAS_SUFFIX = ".bias"
EMBEDDINGS = ("embed", "wte")
"""Parts of the names of a model's table of token embeddings."""

HEADS = ("lm_head", "embed_out", "output", "output_layer", "head")
"""Last names of output heads."""

FINAL_NORMS = ("norm", "ln_f")
KEYS_AND_VALUES = ("k_proj", "v_proj", "k_norm", "v_norm")
NUMBERS = re.compile(r"\.\d+(?=\.|$)")
MAX_KINDS = 8
"""Of layers under the same names; a hostile checkpoint could have as many as layers."""

GENERATES = ("ForCausalLM", "ForConditionalGeneration")
"""How the names of architectures end that have an output head."""


def find_missing(checkpoint: Checkpoint) -> Iterator[Anomaly]:
    """What is not there though the rest of the checkpoint says that it should be."""
    tensors = checkpoint.tensors
    layers = {name: index for name in tensors if (index := layer_index(name)) is not None}
    count = positive(checkpoint.config, "num_hidden_layers")
    yield from _check_layers_present(checkpoint, set(layers.values()), count)
    decoder = [
        tensors[name]
        for name, index in layers.items()
        if (count is None or index < count) and MTP_NAME.search(name) is None  # which has more norms
    ]
    fp8 = {module_of(name) for name, tensor in tensors.items() if _is_dense_fp8(tensor)}
    of_fp8 = (t for t in decoder if t.name.endswith((WEIGHT_SUFFIX, BIAS_SUFFIX)) and module_of(t.name) in fp8)
    norms = (tensor for tensor in decoder if _is_norm(tensor))
    for chosen in (of_fp8, norms):
        yield from _check_alike(chosen, checkpoint)
    if fp8 and layers:  # a whole model
        yield from _check_around(checkpoint, layers)


def _check_layers_present(checkpoint: Checkpoint, found: Set[int], count: int | None) -> Iterator[Anomaly]:
    """Decoder layers without any tensor: what a lost file looks like when there is no index."""
    if count is None or len(checkpoint.files) == 0:
        return
    present = {index for index in found if index < count}
    missing = count - len(present)
    if missing > 0 and not checkpoint.anomalies:
        first = next(i for i in range(count) if i not in present)
        yield Anomaly(
            "decoder layers have no tensors",
            file="config.json",
            expected=f"num_hidden_layers = {count}",
            got=f"{missing} missing, the first is layer {first}",
            fix=DOWNLOAD_AGAIN,
        )


def _check_alike(chosen: Iterable[TensorEntry], checkpoint: Checkpoint) -> Iterator[Anomaly]:
    """A layer that has less than others and nothing more: something is lost, or it shares another's.

    Hybrids have layers of several kinds under the same names, of which each has something that the others lack.
    """
    parents: dict[str, dict[str, TensorEntry]] = defaultdict(dict)
    for tensor in chosen:
        module, _, kind = tensor.name.rpartition(".")
        parent, _, last = module.rpartition(".")
        parents[parent][f"{last}.{kind}"] = tensor
    layers: dict[str, list[str]] = defaultdict(list)
    for parent in parents:
        layers[NUMBERS.sub(".*", parent)].append(parent)
    for alike in layers.values():
        endings = [frozenset(parents[parent]) for parent in alike]
        kinds = Counter(endings)
        if len(kinds) < 2:
            continue
        frequent = kinds.most_common(MAX_KINDS)
        for parent, own in zip(alike, endings, strict=True):
            larger = [kind for kind, count in frequent if own < kind and count >= kinds[own]]
            if not larger:
                continue
            wanted = larger[0]
            for ending in sorted(wanted - own):
                lost = f"{parent}.{ending}" not in checkpoint.tensors
                if lost and not _is_left_out(checkpoint.config, parent, ending):
                    yield Anomaly(
                        "a layer lacks a weight that the others have",
                        next(iter(parents[parent].values())).file,
                        f"{parent}.{ending}",
                        expected=f"as in {kinds[wanted]} of {len(alike)} layers",
                        got="no such tensor",
                        fix="if the model is not built so, " + DOWNLOAD_AGAIN,
                        severity="warning",
                    )


def _is_left_out(config: Mapping[str, Any], parent: str, ending: str) -> bool:
    """Keys and values that are another layer's (Gemma 3n and 4, the last layers), and values that are the keys."""
    module = module_of(ending)
    count, shared = positive(config, "num_hidden_layers"), positive(config, "num_kv_shared_layers")
    index = layer_index(f"{parent}.{ending}")
    if count is not None and shared is not None and index is not None and index >= count - shared:
        return module in KEYS_AND_VALUES
    return module == "v_proj" and setting(config, "attention_k_eq_v") is True


def _check_around(checkpoint: Checkpoint, layers: Collection[str]) -> Iterator[Anomaly]:
    """What is before and behind the decoder layers."""
    outside = {name for name in checkpoint.tensors if LAYER.match(name) is None and MTP_NAME.search(name) is None}
    last = {module_of(name).rpartition(".")[2].lower() for name in outside}
    text = {module_of(name).rpartition(".")[2].lower() for name in outside if not is_of_encoder(name)}
    if not any(word in name for name in last for word in EMBEDDINGS):
        yield _lost("no token embedding is in the checkpoint", "model.embed_tokens.weight")
    has_norms = any(_is_norm(checkpoint.tensors[name]) for name in layers)
    if has_norms and not any(word in name for name in text for word in FINAL_NORMS):
        yield _lost("no norm behind the decoder layers is in the checkpoint", "model.norm.weight")
    architectures = checkpoint.config.get("architectures")
    generates = isinstance(architectures, list) and any(str(name).endswith(GENERATES) for name in architectures)
    if generates and setting(checkpoint.config, "tie_word_embeddings") is False and not last & set(HEADS):
        yield _lost(
            "no output head is in the checkpoint, and config.json does not tie it to the embedding",
            "lm_head.weight",
            fix="an embedding model needs none; otherwise " + DOWNLOAD_AGAIN,
        )


def _lost(what: str, example: str, fix: str = "if the model is not built so, " + DOWNLOAD_AGAIN) -> Anomaly:
    return Anomaly(what, expected=f"such as {example}", got="no such tensor", fix=fix, severity="warning")


def _is_dense_fp8(tensor: TensorEntry) -> bool:
    is_weight = tensor.dtype == E4M3 and tensor.name.endswith(WEIGHT_SUFFIX) and len(tensor.shape) == 2
    return is_weight and experts_of(tensor.name, tensor.shape) is None


def _is_norm(tensor: TensorEntry) -> bool:
    is_vector = len(tensor.shape) == 1 and tensor.dtype in FLOATS and tensor.name.endswith(WEIGHT_SUFFIX)
    return is_vector and "norm" in module_of(tensor.name).rpartition(".")[2].lower()
