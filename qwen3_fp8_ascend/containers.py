"""The containers that block FP8 comes in: what other tools' ``quantization_config`` says, in the words of this format.

compressed-tensors (llm-compressor's ``FP8_BLOCK``) and ModelOpt (``FP8_PB_WO``) hold the same arithmetic under other
names: scales are called ``weight_scale``, the ignore list has another key, and groups say which modules are meant.
Source: compressed-tensors 0.17 (`QuantizationScheme`, preset ``FP8_BLOCK``); vLLM 0.30's ``modelopt.py``.
Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from qwen3_fp8_ascend.errors import BlockFp8Error, describe

FP8 = "fp8"
COMPRESSED_TENSORS = "compressed-tensors"
MODELOPT = "modelopt"

SCALE_ENDINGS: Mapping[str, str] = {FP8: "_scale_inv", COMPRESSED_TENSORS: "_scale", MODELOPT: "_scale"}
"""What is added to a weight's name for that of its block scales. All of them multiply."""

MODELOPT_ALGORITHMS = ("FP8_PB_WO", "FP8_BLOCK_SCALES")
"""Two names of one layout. "WO" notwithstanding, vLLM quantizes activations in groups of 128 for it."""

STORED_AS_CODES = ("float-quantized", "naive-quantized")
"""compressed-tensors' formats that hold e4m3 codes as they are."""

ANY_LINEAR = "Linear"
MAX_GROUPS = 64

CHANGES_MEANING: Mapping[str, tuple[Any, ...]] = {
    "expert_dtype": (FP8,),
    "routed_experts_quant_method": (FP8,),
    "modules_to_convert": ([],),
}
"""Keys that make some weights something else than block FP8, and the values with which they do not."""

KNOWN_KEYS: Mapping[str, frozenset[str]] = {
    FP8: frozenset(
        {
            *("quant_method", "fmt", "activation_scheme", "weight_block_size", "scale_fmt", "dequantize"),
            *("ignored_layers", "modules_to_not_convert", *CHANGES_MEANING),
        }
    ),
    COMPRESSED_TENSORS: frozenset(
        {
            *("quant_method", "config_groups", "format", "ignore", "sparsity_config", "transform_config", "version"),
            *("quantization_status", "global_compression_ratio", "run_compressed", "dequantize"),
            *("total_num_heads", "total_num_kv_heads"),  # which vLLM adds
        }
    ),
    MODELOPT: frozenset(
        {
            *("quant_method", "quant_algo", "quantization", "exclude_modules", "ignore", "producer", "config_groups"),
            *("group_size", "quantized_layers"),
        }
    ),
}
"""What is obeyed, or says nothing that matters here; others are named by `inspect` and in the log."""

QUANTIZE_HINT = "quantize the bf16 model with `qwen3-fp8-ascend quantize`, or serve it without this plugin"


@dataclass(frozen=True)
class Reading:
    """A ``quantization_config`` in this format's own words.

    settings: ``weight_block_size`` and ``modules_to_not_convert`` as an ``fp8`` container would have them.
    targets: which modules are quantized, as compressed-tensors names them; empty for every linear layer.
    weights_only: activations are not quantized.
    set_aside: keys that were given and are not obeyed, since they say nothing about linear layers.
    """

    container: str
    settings: Mapping[str, Any]
    targets: tuple[str, ...] = ()
    weights_only: bool = False
    set_aside: tuple[str, ...] = ()


def container_of(config: object) -> str | None:
    """Which container a ``quantization_config`` is, by its name; None for any other, or for what is no object."""
    if not isinstance(config, Mapping):
        return None
    method = config.get("quant_method")
    if isinstance(method, str):
        method = method.lower().replace("compressed_tensors", COMPRESSED_TENSORS)
        return method if method in SCALE_ENDINGS else None
    producer = config.get("producer")
    if "quantization" in config and isinstance(producer, Mapping) and producer.get("name") == MODELOPT:
        return MODELOPT  # hf_quant_config.json, which names no method
    return None


def holds_fp8(config: object) -> bool:
    """Whether a container's weights are FP8 of any kind: what this package serves, or refuses with a reason."""
    container = container_of(config)
    if container is None or not isinstance(config, Mapping):
        return False
    if container == FP8:
        return True
    if container == MODELOPT:
        return _algorithm(config).startswith("FP8")
    groups = config.get("config_groups")
    weights = [g.get("weights") for g in groups.values() if isinstance(g, Mapping)] if _is_object(groups) else []
    return any(_is_object(w) and (w.get("type"), w.get("num_bits")) == ("float", 8) for w in weights)


def read_container(config: Mapping[str, Any], where: str) -> Reading:
    """Read a ``quantization_config`` of any of the containers.

    Raises:
        BlockFp8Error: it is none of them, or says something that is not block FP8; the message names the key.
    """
    container = container_of(config)
    if container is None:
        expected = ", ".join(repr(name) for name in SCALE_ENDINGS)
        raise refusal(config, "quant_method", where, expected)
    if container == FP8:
        return Reading(container, config, set_aside=_set_aside(config, container))
    if container == MODELOPT:
        return _read_modelopt(config, where)
    return _read_compressed_tensors(config, where)


def refusal(
    holder: Mapping[str, Any], key: str, where: str, expected: object, fix: str = QUANTIZE_HINT
) -> BlockFp8Error:
    """The error for a key of a ``quantization_config`` that does not fit."""
    return BlockFp8Error(
        f"this is not a block-FP8 checkpoint that can be served: {key!r} does not fit",
        where=f"{where}.{key}",
        expected=expected,
        got=describe(holder.get(key, "nothing")),
        fix=fix,
    )


def check_meaning(config: Mapping[str, Any], where: str) -> None:
    """Refuse keys by which some of the weights would be something else than block FP8.

    Raises:
        BlockFp8Error: names the key.
    """
    for key, harmless in CHANGES_MEANING.items():
        value = config.get(key)
        if value is not None and value not in harmless:
            raise refusal(config, key, where, f"no such key, or {harmless[0]!r}: it changes what the weights are")


def _read_modelopt(config: Mapping[str, Any], where: str) -> Reading:
    inner = config.get("quantization")
    if inner is not None and not _is_object(inner):
        raise refusal(config, "quantization", where, "an object with quant_algo")
    said, place = (inner, f"{where}.quantization") if _is_object(inner) else (config, where)
    if _algorithm(config) not in MODELOPT_ALGORITHMS:
        raise refusal(said, "quant_algo", place, f"{MODELOPT_ALGORITHMS[0]!r}: FP8 in blocks of 128 x 128")
    if said.get("group_size") not in (None, 128):
        raise refusal(said, "group_size", place, "128")
    if said.get("quantized_layers"):
        raise refusal(said, "quantized_layers", place, "one algorithm for all layers")
    key = "exclude_modules" if "exclude_modules" in said else "ignore"
    settings = {"weight_block_size": [128, 128], "modules_to_not_convert": _names(said, key, place)}
    aside = _set_aside(config, MODELOPT) + (_set_aside(said, MODELOPT) if said is not config else ())
    return Reading(MODELOPT, settings, set_aside=aside)


def _algorithm(config: Mapping[str, Any]) -> str:
    inner = config.get("quantization")
    return str((inner if _is_object(inner) else config).get("quant_algo", ""))[:100].upper()


def _read_compressed_tensors(config: Mapping[str, Any], where: str) -> Reading:
    groups = config.get("config_groups")
    if not _is_object(groups) or not groups or len(groups) > MAX_GROUPS:
        raise refusal(config, "config_groups", where, f"1 to {MAX_GROUPS} groups, of which one is FP8 in blocks")
    for key in ("sparsity_config", "transform_config"):
        value = config.get(key)
        if value and not (_is_object(value) and value.get("format") == "dense"):
            raise refusal(config, key, where, "none: it changes what the weights are")
    targets: dict[str, None] = {}
    blocks: dict[tuple[int, int], str] = {}
    weights_only: dict[bool, str] = {}
    aside = list(_set_aside(config, COMPRESSED_TENSORS))
    for name, group in groups.items():
        place = f"{where}.config_groups.{describe(name, 60)}"
        if not _is_object(group):
            raise BlockFp8Error("a config group is not an object", where=place, got=describe(group))
        meant = _names(group, "targets", place)
        if all(target.endswith("Attention") for target in meant):  # of the KV cache, or of nothing
            aside += [f"config_groups.{describe(name, 60)}"] if meant else []
            continue
        blocks[_block_of(group, config.get("format"), place)] = place
        weights_only[group.get("input_activations") is None] = place
        targets |= dict.fromkeys(meant)
    if len(blocks) != 1:
        got = ", ".join(f"{n}x{k} in {place}" for (n, k), place in blocks.items()) or "no group for linear layers"
        raise BlockFp8Error("block FP8 has one size of blocks", where=f"{where}.config_groups", got=got)
    if len(weights_only) != 1:
        raise BlockFp8Error(
            "activations are quantized for all linear layers or for none",
            where=f"{where}.config_groups",
            got=f"not in {weights_only[True]}, but in {weights_only[False]}",
        )
    settings = {
        "weight_block_size": list(next(iter(blocks))),
        "modules_to_not_convert": _names(config, "ignore", where),
    }
    named = () if ANY_LINEAR in targets else tuple(targets)
    return Reading(COMPRESSED_TENSORS, settings, named, next(iter(weights_only)), tuple(aside))


def _block_of(group: Mapping[str, Any], format_of_all: object, where: str) -> tuple[int, int]:
    """The block size of a group, which must be FP8 in blocks, with dynamic activations in groups or with none."""
    weights = _checked(
        group,
        "weights",
        where,
        {"num_bits": (8,), "type": ("float",), "strategy": ("block",), "dynamic": (False, None)}
        | {"symmetric": (True, None), "actorder": (None,)},
    )
    block = _sizes(weights.get("block_structure"))
    if block is None:
        raise refusal(weights, "block_structure", f"{where}.weights", "two positive integers, such as [128, 128]")
    if group.get("input_activations") is not None:
        _checked(
            group,
            "input_activations",
            where,
            {"num_bits": (8,), "type": ("float",), "strategy": ("group",), "dynamic": (True,)}
            | {"group_size": (block[1],), "symmetric": (True, None), "actorder": (None,)},
        )
    if group.get("output_activations") is not None:
        raise refusal(group, "output_activations", where, "none")
    form = group.get("format") or format_of_all
    if form is not None and form not in STORED_AS_CODES:
        holder = group if group.get("format") else {"format": form}
        raise refusal(holder, "format", where, " or ".join(map(repr, STORED_AS_CODES)))
    return block


def _checked(
    group: Mapping[str, Any], key: str, where: str, allowed: Mapping[str, tuple[Any, ...]]
) -> Mapping[str, Any]:
    """A part of a config group whose values are all among those allowed."""
    part = group.get(key)
    if not _is_object(part):
        raise refusal(group, key, where, "FP8 in blocks of 128 x 128, and activations quantized in groups of 128")
    for name, values in allowed.items():
        value = part.get(name)
        if not any(value is one or (type(value) is type(one) and value == one) for one in values):
            raise refusal(part, name, f"{where}.{key}", " or ".join(repr(one) for one in values))
    return part


def _sizes(value: object) -> tuple[int, int] | None:
    """[128, 128], or "128x128" as older files have it."""
    if isinstance(value, str) and len(value) < 40:
        value = [int(part) if part.isascii() and part.isdigit() else part for part in value.split("x")]
    if isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 2:
        n, k = value
        if all(isinstance(size, int) and not isinstance(size, bool) and 1 <= size <= 1 << 20 for size in (n, k)):
            return n, k
    return None


def _names(holder: Mapping[str, Any], key: str, where: str) -> list[str]:
    names = holder.get(key) or []
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise refusal(holder, key, where, "a list of module names", "correct the list in config.json")
    return list(names)


def _set_aside(config: Mapping[str, Any], container: str) -> tuple[str, ...]:
    """Keys with a value that this package does not know, or that are about the KV cache, in their order."""
    unknown = (key for key, value in config.items() if key not in KNOWN_KEYS[container] and value not in (None, {}, []))
    return tuple(describe(key, 60).strip("'\"") for key in list(unknown)[:16])


def _is_object(value: object) -> TypeGuard[Mapping[str, Any]]:
    return isinstance(value, Mapping)


def written(
    container: str, block: Sequence[int], ignored: Iterable[str], targets: Iterable[str], weights_only: bool = False
) -> dict[str, Any]:
    """The ``quantization_config`` of another container than this format's own, to be written into config.json."""
    ignore = list(ignored)
    if container == MODELOPT:
        algorithm = {"quant_method": MODELOPT, "quant_algo": MODELOPT_ALGORITHMS[0]}
        return algorithm | {"producer": {"name": MODELOPT}, "ignore": ignore}
    codes = {"num_bits": 8, "type": "float", "symmetric": True}
    group = {
        "targets": list(targets) or [ANY_LINEAR],
        "weights": codes | {"strategy": "block", "block_structure": list(block), "dynamic": False},
        "input_activations": None
        if weights_only
        else codes | {"strategy": "group", "group_size": block[1], "dynamic": True},
        "output_activations": None,
        "format": STORED_AS_CODES[0],
    }
    return {
        "quant_method": COMPRESSED_TENSORS,
        "format": STORED_AS_CODES[0],
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ignore,
    }
