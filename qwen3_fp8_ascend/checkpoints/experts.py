"""What must hold for a checkpoint's mixture of experts to be served.

Imports neither torch nor vllm, like all that `inspect` needs; the vLLM plugin asks how experts can be divided too.
"""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from qwen3_fp8_ascend.checkpoints.anomaly import Anomaly
from qwen3_fp8_ascend.checkpoints.folder import Checkpoint
from qwen3_fp8_ascend.checkpoints.layers import (
    DOWN,
    EXPERT,
    FUSED_EXPERTS,
    GATE,
    GATE_UP,
    LAYER,
    PROJECTIONS,
    UP,
    experts_of,
    fused_layout,
    is_stacked_experts,
)
from qwen3_fp8_ascend.checkpoints.model_config import positive, setting
from qwen3_fp8_ascend.checkpoints.rules import DOWNLOAD_AGAIN, E4M3, QUANTIZE_AGAIN
from qwen3_fp8_ascend.checkpoints.weight_file import TensorEntry
from qwen3_fp8_ascend.errors import describe
from qwen3_fp8_ascend.format import BlockFp8Config, BlockSize

FUSED_BIASES = re.compile(r"^(?:.+\.)?experts\.(?:gate_up_proj|down_proj)_bias$")

COUNT_KEYS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")
"""What config.json calls the number of routed experts of a layer."""

ACTIVATIONS = ("silu", "swish", "gelu_pytorch_tanh")
"""What there may be between an expert's linears; with a `swiglu_limit` MiniMax-M3's is beside them."""

MAX_RANKS = 64
SERVE_BF16 = "serve the bf16 model"


@dataclass(frozen=True)
class ExpertsSummary:
    """The mixture of experts of a checkpoint whose layers are all alike, for people and for `--json`.

    ranks: the sizes of tensor parallelism by which the experts can be divided. whole_block_ranks: those of them that
    leave blocks whole.
    """

    layers: int
    experts: int
    hidden: int
    intermediate: int
    ranks: tuple[int, ...]
    whole_block_ranks: tuple[int, ...]

    @property
    def divided(self) -> str:
        """Among how many ranks the experts can be divided, in words."""
        return divided(self.intermediate)


@dataclass
class ExpertsLayer:
    """The tensors of one layer's experts: by their number and projection, or those that hold all of them.

    fused: gate above up, and down. stacked: the three projections.
    """

    weights: dict[int, dict[str, TensorEntry]] = field(default_factory=lambda: defaultdict(dict))
    fused: dict[str, TensorEntry] = field(default_factory=dict)
    stacked: dict[str, TensorEntry] = field(default_factory=dict)

    @property
    def tensors(self) -> list[TensorEntry]:
        """All of them, the first expert's first."""
        whole = (*self.fused.values(), *self.stacked.values())
        return [*whole, *(t for _, found in sorted(self.weights.items()) for t in found.values())]

    @property
    def count(self) -> int:
        """Number of experts."""
        tensors = (*self.fused.values(), *self.stacked.values())
        whole = next((tensor.shape[0] for tensor in tensors if tensor.shape), 0)
        return whole or len(self.weights)


def divided(intermediate: int) -> str:
    """Among how many ranks an expert's intermediate channels, or whole experts, can be divided, in words."""
    sizes = ", ".join(map(str, dividing_ranks(intermediate)))
    return f"--tensor-parallel-size {sizes}, or any with --enable-expert-parallel"


def dividing_ranks(intermediate: int) -> tuple[int, ...]:
    """The sizes of tensor parallelism, up to 64, that give each rank as many of an expert's intermediate channels.

    vLLM takes no others. Where they cut within a block, ranks agree on the activations' scales
    (`vllm_plugin/partition.py`).
    """
    return tuple(ranks for ranks in range(1, MAX_RANKS + 1) if intermediate % ranks == 0)


def whole_block_ranks(intermediate: int, block: BlockSize) -> tuple[int, ...]:
    """The sizes of tensor parallelism, up to 64, that cut an expert's intermediate channels between blocks only.

    They are rows of gate_proj and up_proj, and columns of down_proj.
    """
    return tuple(
        ranks
        for ranks in range(1, MAX_RANKS + 1)
        if ranks == 1 or all(intermediate % (ranks * size) == 0 for size in block)
    )


def find_expert_anomalies(checkpoint: Checkpoint, config: BlockFp8Config) -> Iterator[Anomaly]:
    """What would keep the FP8 experts of a checkpoint from being served, by layer, expert and tensor."""
    layers = expert_layers(checkpoint)
    quantized = {name: layer for name, layer in layers.items() if _quantized(layer)}
    yield from _check_routers(checkpoint, layers)
    if not quantized:
        return
    yield from _check_config(checkpoint.config)
    yield from _check_biases(checkpoint, quantized)
    for name, layer in quantized.items():
        yield from _check_alike(name, layer)
        if layer.fused:
            yield from _check_fused(layer, checkpoint.config, config.block)
        elif layer.stacked:
            yield from _check_stacked(layer, checkpoint.config)
        elif not any(GATE in tensors for tensors in layer.weights.values()):
            yield _anomaly(
                layer.tensors[0],
                "experts without a gate projection are not served in block FP8",
                "silu(gate) * up, and down",
                " and ".join(sorted({projection for tensors in layer.weights.values() for projection in tensors})),
                SERVE_BF16,
            )
        else:
            yield from _check_complete(name, layer, checkpoint.config)
            yield from _check_shapes(layer, checkpoint.config)


def summarize_experts(checkpoint: Checkpoint, block: BlockSize) -> ExpertsSummary | None:
    """Number and size of FP8 experts; None if there are none, or if layers differ."""
    found: set[tuple[int, ...]] = set()
    layers = [layer for layer in expert_layers(checkpoint).values() if _quantized(layer)]
    for layer in layers:
        if layer.fused:
            gate_up, down = (layer.fused[name].shape if name in layer.fused else () for name in (GATE_UP, DOWN))
            layout = fused_layout(gate_up, down)
            found.add((layout.experts, layout.hidden, layout.intermediate) if layout else ())
        elif layer.stacked:
            found.add(layer.stacked[DOWN].shape if DOWN in layer.stacked else ())
        else:
            shapes = {tensors[DOWN].shape for tensors in layer.weights.values() if DOWN in tensors}
            found.update((len(layer.weights), *shape) for shape in shapes)
    if len(found) != 1:
        return None
    shape = found.pop()
    if len(shape) != 3:
        return None
    experts, hidden, intermediate = shape
    ranks = dividing_ranks(intermediate), whole_block_ranks(intermediate, block)
    return ExpertsSummary(len(layers), experts, hidden, intermediate, *ranks)


def expert_layers(checkpoint: Checkpoint) -> dict[str, ExpertsLayer]:
    """The experts of each layer, by the name that their tensors share."""
    layers: dict[str, ExpertsLayer] = defaultdict(ExpertsLayer)
    for tensor in checkpoint.tensors.values():
        if ".experts." not in tensor.name and not tensor.name.startswith("experts."):
            if is_stacked_experts(tensor.name, tensor.shape):
                block, projection, _ = tensor.name.rsplit(".", 2)
                layers[f"{block}.experts"].stacked[projection] = tensor
            continue
        match = EXPERT.match(tensor.name)
        if match is not None and match["kind"] == "weight":
            layers[match["layer"]].weights[int(match["expert"])][PROJECTIONS[match["projection"]]] = tensor
        elif (match := FUSED_EXPERTS.match(tensor.name)) is not None:
            layers[match["layer"]].fused[match["projection"]] = tensor
    return dict(layers)


def _quantized(layer: ExpertsLayer) -> bool:
    return any(tensor.dtype == E4M3 for tensor in layer.tensors)


def _expert_shape(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """(intermediate, hidden) of the experts as config.json has it; Mixtral has no other MLPs and so no other key."""
    hidden, intermediate = positive(config, "hidden_size"), positive(config, "moe_intermediate_size")
    if intermediate is None and positive(config, "num_local_experts") is not None:
        intermediate = positive(config, "intermediate_size")
    return None if hidden is None or intermediate is None else (intermediate, hidden)


def _check_config(config: Mapping[str, Any]) -> Iterator[Anomaly]:
    activation, limit = setting(config, "hidden_act", "hidden_activation"), setting(config, "swiglu_limit")
    served = (*ACTIVATIONS, "swigluoai") if limit is not None else ACTIVATIONS
    if isinstance(activation, str) and activation not in served:
        yield Anomaly(
            "experts with another activation than SiLU, or GELU by tanh, are not served in block FP8",
            file="config.json",
            expected=f"hidden_act {' or '.join(served)}",
            got=describe(activation, 100),
            fix=SERVE_BF16,
        )
    if limit is not None and not (isinstance(limit, int | float) and not isinstance(limit, bool) and limit > 0):
        yield Anomaly(
            "the limit of the experts' activation is no positive number",
            file="config.json",
            expected="a positive swiglu_limit, or none",
            got=describe(limit, 100),
            fix=SERVE_BF16,
        )


def _check_biases(checkpoint: Checkpoint, quantized: Mapping[str, ExpertsLayer]) -> Iterator[Anomaly]:
    for tensor in checkpoint.tensors.values():
        match = EXPERT.match(tensor.name)
        biased = FUSED_BIASES.match(tensor.name) or (match is not None and match["kind"] == "bias")
        if biased and tensor.name.partition(".experts.")[0] + ".experts" in quantized:
            yield _anomaly(tensor, "experts with biases are not served", "no biases", "a bias", SERVE_BF16)


def _check_routers(checkpoint: Checkpoint, layers: Mapping[str, ExpertsLayer]) -> Iterator[Anomaly]:
    """A router in a decoder layer without experts: what a lost file looks like.

    The router is beside the experts (`mlp.gate`) or within a module of its own (`mlp.router.gate`).
    """
    count = positive(checkpoint.config, *COUNT_KEYS)
    if count is None:
        return
    yield from _check_alike_routers(checkpoint, layers, count)
    with_experts = {_decoder_layer(name) for name in layers}
    for tensor in checkpoint.tensors.values():
        block, _, last = tensor.name.rpartition(".gate.")
        if last == "weight" and tensor.shape[:1] == (count,) and _decoder_layer(block) not in with_experts:
            yield _anomaly(
                tensor,
                "a layer has a router and no experts",
                f"{block.removesuffix('.router')}.experts.0 to {count - 1}",
                "none",
                DOWNLOAD_AGAIN,
            )


def _check_alike_routers(checkpoint: Checkpoint, layers: Mapping[str, ExpertsLayer], count: int) -> Iterator[Anomaly]:
    """What most layers have for each expert beside the experts, as a router or a correction bias, and one lacks."""
    blocks = {name.removesuffix("experts") for name in layers}
    found: dict[str, set[str]] = defaultdict(set)
    for tensor in checkpoint.tensors.values():
        if tensor.shape[:1] == (count,) and experts_of(tensor.name, tensor.shape) is None:
            parts = tensor.name.split(".")
            block = next((b for n in (1, 2, 3) if (b := ".".join(parts[:-n]) + ".") in blocks), None)
            if block is not None:
                found[tensor.name.removeprefix(block)].add(block)
    for ending, having in found.items():
        for block in sorted(blocks - having) if 2 * len(having) >= len(blocks) else ():
            yield Anomaly(
                "a layer of experts lacks what chooses among them",
                tensor=block + ending,
                expected=f"as in {len(having)} of {len(blocks)} layers",
                got="no such tensor",
                fix=DOWNLOAD_AGAIN,
            )


def _decoder_layer(module: str) -> str:
    """``model.layers.1.mlp.experts`` -> ``model.layers.1``; what is around a module that is in no such layer."""
    match = LAYER.match(module)
    return f"{match['prefix']}layers.{match['index']}" if match else module.removesuffix(".experts")


def _check_complete(name: str, layer: ExpertsLayer, config: Mapping[str, Any]) -> Iterator[Anomaly]:
    numbers = set(layer.weights)
    count = positive(config, *COUNT_KEYS) or max(numbers) + 1
    present = sum(expert < count for expert in numbers)
    if present < count:  # a hostile count is never counted up to
        yield Anomaly(
            "experts are missing",
            tensor=f"{name}.{next(expert for expert in itertools.count() if expert not in numbers)}",
            expected=f"experts 0 to {count - 1}",
            got=f"{present} of them",
            fix=DOWNLOAD_AGAIN,
        )
    if present < len(numbers):
        yield Anomaly(
            "a layer has more experts than config.json says",
            tensor=f"{name}.{min(expert for expert in numbers if expert >= count)}",
            expected=f"experts 0 to {count - 1}",
            got=f"{len(numbers) - present} more",
            fix=DOWNLOAD_AGAIN,
        )
    for expert, tensors in sorted(layer.weights.items()):
        for projection in (GATE, UP, DOWN):
            if projection not in tensors:
                some = next(iter(tensors.values()))
                yield Anomaly(
                    "an expert lacks a weight",
                    file=some.file,
                    tensor=f"{name}.{expert}.{projection}",
                    expected=", ".join((GATE, UP, DOWN)),
                    got=", ".join(tensors),
                    fix=DOWNLOAD_AGAIN,
                )


def _check_alike(name: str, layer: ExpertsLayer) -> Iterator[Anomaly]:
    """One operator serves the experts of a layer: all are FP8, or none."""
    for tensor in layer.tensors:
        if tensor.dtype != E4M3:
            yield _anomaly(
                tensor, "only some experts of a layer are FP8", f"all or none of {name}", tensor.dtype, QUANTIZE_AGAIN
            )
            return


def _check_shapes(layer: ExpertsLayer, config: Mapping[str, Any]) -> Iterator[Anomaly]:
    gates = (tensors[GATE].shape for _, tensors in sorted(layer.weights.items()) if GATE in tensors)
    expected = _expert_shape(config) or next(gates, None)
    if expected is None:
        return
    for _, tensors in sorted(layer.weights.items()):
        for projection, tensor in tensors.items():
            shape = expected[::-1] if projection == DOWN else expected
            if tensor.shape != shape:
                yield _misshapen("an expert's weight", tensor, str(list(shape)))


def _check_stacked(layer: ExpertsLayer, config: Mapping[str, Any]) -> Iterator[Anomaly]:
    some = next(iter(layer.stacked.values()))
    missing = [projection for projection in (GATE, UP, DOWN) if projection not in layer.stacked]
    if missing:
        yield Anomaly(
            "a layer lacks a tensor of all its experts",
            file=some.file,
            tensor=f"{some.name.rsplit('.', 2)[0]}.{missing[0]}.weight",
            expected=", ".join((GATE, UP, DOWN)),
            got=", ".join(layer.stacked),
            fix=DOWNLOAD_AGAIN,
        )
        return
    count, sizes = positive(config, *COUNT_KEYS), _expert_shape(config)
    experts, intermediate, hidden = layer.stacked[GATE].shape
    expected = (count or experts, *(sizes or (intermediate, hidden)))
    for projection, tensor in layer.stacked.items():
        shape = (expected[0], *expected[:0:-1]) if projection == DOWN else expected
        if tensor.shape != shape:
            yield _misshapen("the tensor of a layer's experts", tensor, str(list(shape)))


def _check_fused(layer: ExpertsLayer, config: Mapping[str, Any], block: BlockSize) -> Iterator[Anomaly]:
    some = next(iter(layer.fused.values()))
    missing = [projection for projection in (GATE_UP, DOWN) if projection not in layer.fused]
    if missing:
        yield _anomaly(some, "a layer lacks a tensor of all its experts", missing[0], "no such tensor", DOWNLOAD_AGAIN)
        return
    gate_up, down = layer.fused[GATE_UP], layer.fused[DOWN]
    if len(gate_up.shape) != 3 or len(down.shape) != 3:
        return  # said of any FP8 tensor that is no weight
    layout = fused_layout(gate_up.shape, down.shape)
    if layout is None:
        experts, hidden, intermediate = down.shape
        yield _anomaly(
            gate_up,
            "the two tensors of a layer's experts do not fit each other",
            f"{[experts, 2 * intermediate, hidden]} beside a down_proj of {list(down.shape)}",
            str(list(gate_up.shape)),
            QUANTIZE_AGAIN,
        )
        return
    experts, intermediate, hidden, _ = layout
    count, sizes = positive(config, *COUNT_KEYS), _expert_shape(config)
    if (count is not None and count != experts) or (sizes is not None and sizes != (intermediate, hidden)):
        expected = f"{count or experts} experts of {list(reversed(sizes)) if sizes else [hidden, intermediate]}"
        yield _misshapen("the tensor of a layer's experts", down, expected)
    if intermediate % block.n:
        yield _anomaly(
            gate_up,
            "gate and up projections are in one tensor of all experts and are not whole blocks: one block lies in both",
            f"an intermediate size that is a multiple of {block.n}",
            str(intermediate),
            "store the projections of each expert as tensors of their own: " + QUANTIZE_AGAIN,
        )


def _misshapen(what: str, tensor: TensorEntry, expected: str) -> Anomaly:
    said = f"{what} has another shape than the model's experts"
    return _anomaly(tensor, said, expected, str(list(tensor.shape)), DOWNLOAD_AGAIN)


def _anomaly(tensor: TensorEntry, what: str, expected: str, got: str, fix: str) -> Anomaly:
    return Anomaly(what, tensor.file, tensor.name, expected, got, fix)
