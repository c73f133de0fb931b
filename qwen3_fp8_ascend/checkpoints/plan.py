"""The plan of a checkpoint: what each module is, decided once from headers and config.

`inspect` prints it and vLLM's plugin obeys it. Where the config's list and the tensors disagree, the tensors are right.
Imports neither torch nor vllm.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from qwen3_fp8_ascend.checkpoints.anomaly import Anomaly, collect
from qwen3_fp8_ascend.checkpoints.completeness import find_missing
from qwen3_fp8_ascend.checkpoints.experts import expert_layers, find_expert_anomalies
from qwen3_fp8_ascend.checkpoints.folder import Checkpoint
from qwen3_fp8_ascend.checkpoints.ignore import IgnoreList
from qwen3_fp8_ascend.checkpoints.layers import FUSED, is_decoder_linear, is_stacked_experts, layer_index, module_of
from qwen3_fp8_ascend.checkpoints.patterns import UnreadableError
from qwen3_fp8_ascend.checkpoints.rules import (
    DOWNLOAD_AGAIN,
    E4M3,
    FLOATS,
    QUANTIZE_AGAIN,
    find_anomalies,
    find_unused,
    is_cache_scale,
    of_token_prediction,
)
from qwen3_fp8_ascend.checkpoints.weight_file import TensorEntry
from qwen3_fp8_ascend.errors import describe, printable
from qwen3_fp8_ascend.format import DEFAULT_BLOCK, SMALLEST_BLOCK, WEIGHT_SUFFIX, BlockFp8Config, BlockSize

FP8, FLOAT = "fp8", "float"
MLP = {"gate_proj", "up_proj", "down_proj"}
EXCLUDED_FP8 = "config.json excludes a module from quantization whose weight is FP8"
UNLISTED_FLOAT = "a linear layer is not FP8, though config.json does not exclude it from quantization"


@dataclass(frozen=True, slots=True)
class Module:
    """A module with a weight of two or more dimensions, or all experts of a layer (then `experts` is their number).

    kind: "fp8" or "float", by the tensors. listed: whether the config says that it stays unquantized.
    """

    name: str
    kind: str
    tensor: TensorEntry
    listed: bool = False
    experts: int | None = None


@dataclass(frozen=True)
class Plan:
    """What each module of a checkpoint is, by its name there, and everything that is wrong or worth saying."""

    config: BlockFp8Config
    modules: Mapping[str, Module]
    anomalies: tuple[Anomaly, ...]

    def kinds(self) -> dict[str, str]:
        """Module -> "fp8" or "float": plain values, for vLLM's processes."""
        return {name: module.kind for name, module in self.modules.items()}

    def to_dict(self) -> dict[str, Any]:
        """As JSON data: names of modules by kind, and the number of experts of a layer."""
        fp8 = [name for name, module in self.modules.items() if module.kind == FP8]
        unquantized = [name for name, module in self.modules.items() if module.kind == FLOAT]
        experts = {name: module.experts for name, module in self.modules.items() if module.experts}
        return {"fp8": fp8, "float": unquantized, "experts": experts, "scale_name": self.config.scale_name}


def make_plan(checkpoint: Checkpoint, config: BlockFp8Config) -> Plan:
    """Decide what each module is, and find all that is wrong."""
    modules = _modules(checkpoint)
    listed, doubts = _compare(modules, config)
    modules |= {name: replace(modules[name], listed=True) for name in listed}
    quantized = any(module.kind == FP8 for module in modules.values())
    findings = chain(
        find_anomalies(checkpoint, config),
        find_missing(checkpoint) if quantized else (),
        find_expert_anomalies(checkpoint, config),
        _check_merged(modules),
        _check_alike(modules),
        find_unused(checkpoint),
        doubts if quantized else (),
        _check_block(config.block),
        _notes(checkpoint, config),
    )
    return Plan(config, modules, tuple(collect(findings)))


def _check_block(block: BlockSize) -> Iterator[Anomaly]:
    """Blocks of a size that serving refuses, or serves on CPUs only; by name the specification serves any."""
    if block == DEFAULT_BLOCK:
        return
    rows, columns = SMALLEST_BLOCK
    by_cpu = block.n >= rows and block.k % columns == 0
    yield Anomaly(
        f"blocks of {block} are served on CPUs only" if by_cpu else f"no fast backend serves blocks of {block}",
        file="config.json",
        expected=f"{DEFAULT_BLOCK}; on a CPU {rows} rows or more, and a multiple of {columns} columns",
        got=str(block),
        fix="quantize the bf16 model in blocks of 128x128, or name the backend `reference`, which is slow",
        severity="warning",
    )


def _modules(checkpoint: Checkpoint) -> dict[str, Module]:
    modules: dict[str, Module] = {}
    layers = expert_layers(checkpoint)
    of_experts = {tensor.name for layer in layers.values() for tensor in layer.tensors}
    for tensor in checkpoint.tensors.values():
        if tensor.name in of_experts or tensor.dtype not in (E4M3, *FLOATS):
            continue
        if tensor.name.endswith(WEIGHT_SUFFIX) and len(tensor.shape) >= 2:
            name = module_of(tensor.name)
            modules[name] = Module(name, FP8 if tensor.dtype == E4M3 else FLOAT, tensor)
    for name, layer in layers.items():
        first = next((tensor for tensor in layer.tensors if tensor.dtype == E4M3), layer.tensors[0])
        if first.dtype in (E4M3, *FLOATS):
            modules[name] = Module(name, FP8 if first.dtype == E4M3 else FLOAT, first, experts=layer.count)
    return dict(sorted(modules.items()))


def _compare(modules: Mapping[str, Module], config: BlockFp8Config) -> tuple[set[str], list[Anomaly]]:
    """Which modules the config's list leaves unquantized, and where it contradicts the tensors."""
    ignored, targets = IgnoreList(config.ignored), IgnoreList(config.targets)
    unreadable = [*ignored.unreadable, *targets.unreadable]
    doubts = [_unreadable(unreadable[0], len(unreadable))] if unreadable else []
    listed: set[str] = set()
    try:
        for name, module in modules.items():
            asked = module.tensor.name.removesuffix(WEIGHT_SUFFIX)  # of experts, the first one's
            if ignored.has(asked) or (config.targets and not targets.has(asked)):
                listed.add(name)
            if module.kind == FP8 and name in listed:
                doubts.append(_doubt(module, EXCLUDED_FP8))
            elif module.kind == FLOAT and name not in listed and _should_be_fp8(module):
                doubts.append(_doubt(module, UNLISTED_FLOAT))
    except UnreadableError:
        text = "asking it takes longer than any real list does"
        doubts.append(Anomaly("the ignore list is not compared with the tensors", got=text, severity="warning"))
    return listed, doubts


def _should_be_fp8(module: Module) -> bool:
    return module.experts is not None or is_decoder_linear(module.tensor.name, module.tensor.shape)


def _doubt(module: Module, what: str) -> Anomaly:
    entry = module.tensor
    return Anomaly(
        what,
        entry.file,
        entry.name,
        expected="a list and tensors that agree",
        got=entry.dtype,
        fix=f"it is served as its tensors are; {'remove' if module.kind == FP8 else 'add'} {module.name!r} "
        f"{'from' if module.kind == FP8 else 'to'} the ignore list in config.json to say so",
        severity="warning",
    )


def _unreadable(entry: str, count: int) -> Anomaly:
    return Anomaly(
        "a pattern of the ignore list is not understood",
        file="config.json",
        expected="a module's name, a shell-style pattern, or a regular expression without look-around",
        got=describe(entry, 100) + (f" and {count - 1} more" if count > 1 else ""),
        fix="the tensors decide; write it otherwise where there are none (--load-format dummy)",
        severity="warning",
    )


def _check_merged(modules: Mapping[str, Module]) -> Iterator[Anomaly]:
    """Shards of one merged layer must be alike."""
    for name, module in modules.items():
        parent, dot, last = name.rpartition(".")
        if module.kind != FLOAT or module.experts is not None or layer_index(module.tensor.name) is None:
            continue
        for group in FUSED:
            others = (modules.get(f"{parent}{dot}{sibling}") for sibling in group if last in group)
            quantized = next((other for other in others if other is not None and other.kind == FP8), None)
            if quantized is not None:
                yield _error(
                    module.tensor,
                    "layers that are merged when served are FP8 only in part",
                    f"all or none of {', '.join(group)} in {E4M3}",
                    f"{module.tensor.dtype}, and {quantized.name} in {E4M3}",
                    QUANTIZE_AGAIN,
                )


def _check_alike(modules: Mapping[str, Module]) -> Iterator[Anomaly]:
    """Tensors that no layer of the model could take: shards and projections of a layer that do not fit each other."""
    parents: dict[str, dict[str, Module]] = defaultdict(dict)
    for name, module in modules.items():
        parent, _, last = name.rpartition(".")
        if module.kind == FP8 and module.experts is None and len(module.tensor.shape) == 2:
            parents[parent][last] = module
    for found in parents.values():
        for group in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
            columns = [found[name].tensor.shape[1] for name in group if name in found]
            if len(set(columns)) < 2:
                continue
            most = Counter(columns).most_common(1)[0][0]
            for name in group:
                if name in found and found[name].tensor.shape[1] != most:
                    yield _misfit(found[name].tensor, f"{most} columns, as its siblings have")
        if found.keys() >= MLP:
            gate, up, down = (found[name].tensor for name in ("gate_proj", "up_proj", "down_proj"))
            if up.shape == gate.shape and down.shape != gate.shape[::-1]:
                yield _misfit(down, f"{list(gate.shape[::-1])} beside a gate_proj of {list(gate.shape)}")
            elif up.shape[0] != gate.shape[0]:
                yield _misfit(up, f"{gate.shape[0]} rows, as gate_proj has")


def _notes(checkpoint: Checkpoint, config: BlockFp8Config) -> Iterator[Anomaly]:
    """What is left aside, since it says nothing about linear layers, and what vLLM lacks for it on a CPU."""
    cached = [t for t in checkpoint.tensors.values() if is_cache_scale(t.name)]
    if cached:
        yield Anomaly(
            "scales of a quantized KV cache are ignored: the cache keeps the model's dtype",
            cached[0].file,
            cached[0].name,
            got=f"{len(cached)} tensors",
            severity="note",
        )
    predicting = of_token_prediction(checkpoint)
    if predicting:
        yield Anomaly(
            "layers for multi-token prediction (MTP) are loaded only to speculate with them",
            predicting[0].file,
            predicting[0].name,
            got=f"{len(predicting)} tensors",
            fix="""--speculative-config '{"method": "mtp", "num_speculative_tokens": 1}'""",
            severity="note",
        )
    stacked = [tensor for tensor in checkpoint.tensors.values() if _is_stacked(tensor)]
    if stacked:
        yield Anomaly(
            "matrices that a layer has in one tensor, under names that block FP8 does not know, stay as they are",
            stacked[0].file,
            stacked[0].name,
            expected="FP8 for experts named experts.0.gate_proj, or experts.gate_up_proj",
            got=f"{len(stacked)} tensors in {stacked[0].dtype}",
            severity="note",
        )
    if config.weights_only:
        yield Anomaly(
            "config.json quantizes weights alone: activations stay as they are (W8A16) unless a flag says otherwise",
            file="config.json",
            got="no input_activations",
            fix='set {"qwen3_fp8_ascend": {"activation": "w8a8"}} to quantize them all the same',
            severity="note",
        )
    if config.set_aside:
        yield Anomaly(
            "keys of quantization_config that say nothing about linear layers, or are unknown, are not obeyed",
            file="config.json",
            got=printable(", ".join(config.set_aside), 300),
            severity="note",
        )


def _is_stacked(tensor: TensorEntry) -> bool:
    """GraniteMoE's experts; a convolution has one channel or a few places."""
    is_weight = tensor.name.endswith(WEIGHT_SUFFIX) and tensor.dtype in FLOATS
    if is_stacked_experts(tensor.name, tensor.shape):
        return False
    return is_weight and len(tensor.shape) == 3 and min(tensor.shape[1:]) >= 32 and layer_index(tensor.name) is not None


def _misfit(tensor: TensorEntry, expected: str) -> Anomaly:
    return _error(
        tensor, "a weight does not fit the others of its layer", expected, str(list(tensor.shape)), DOWNLOAD_AGAIN
    )


def _error(tensor: TensorEntry, what: str, expected: str, got: str, fix: str) -> Anomaly:
    return Anomaly(what, tensor.file, tensor.name, expected, got, fix)
