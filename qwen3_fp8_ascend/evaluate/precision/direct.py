"""Runs without a server: a transformers model whose linears are replaced by ours. All logits and layer outputs.

This is also how a GPU or an NPU is measured by itself, without vLLM.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qwen3_fp8_ascend import ops, reference
from qwen3_fp8_ascend.checkpoints.folder import Checkpoint, read_checkpoint
from qwen3_fp8_ascend.checkpoints.tensors import WeightReader
from qwen3_fp8_ascend.errors import BlockFp8Error
from qwen3_fp8_ascend.evaluate.precision.runs import TOP, Run
from qwen3_fp8_ascend.format import Activation, BlockFp8Config, BlockGrid
from qwen3_fp8_ascend.provenance import npu_name

DEQUANTIZED = "dequantized"
WIDE = "reference-fp64"
"""The specification with fp64 sums: the same arithmetic in another order and precision, for the noise floor."""

SPECIFICATIONS = {"reference": torch.float32, WIDE: torch.float64}
"""What the specification sums in. It is called directly, so that its codes need not be converted at every call."""

Progress = Callable[[str], None]


class BlockFp8Linear(torch.nn.Module):
    """A linear layer of a block-FP8 checkpoint, computed by one of our backends or by the specification.

    `converted` keeps the codes as the numbers that the specification multiplies: 4 or 8 bytes a weight, the same
    results, a fraction of the time for few rows.

    Shapes: x (..., k) -> (..., n) in x.dtype.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        scale: torch.Tensor,
        grid: BlockGrid,
        bias: torch.Tensor | None,
        backend: str,
        activation: Activation,
        converted: bool = False,
    ) -> None:
        super().__init__()
        self.grid, self.bias, self.activation = grid, bias, activation
        self.sums = SPECIFICATIONS.get(backend)
        self.packed = None if self.sums else ops.pack_weight(weight, scale, grid, backend)
        self.original = (weight, scale) if self.sums else None
        self.codes = weight.to(self.sums) if converted and self.sums else weight if self.sums else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.packed is not None:
            return ops.block_linear(x, self.packed, self.bias, self.activation)
        assert self.original and self.sums and self.codes is not None
        scale = self.original[1]
        out = reference.block_linear(
            x, self.codes, scale, self.bias, activation=self.activation, grid=self.grid, compute_dtype=self.sums
        )
        return out.to(x.dtype)


def load_model(folder: Path, backend: str, activation: Activation, dtype: torch.dtype, device: str) -> torch.nn.Module:
    """A checkpoint as a transformers model; block-FP8 linears are ours, or expanded if `backend` is "dequantized".

    Raises:
        BlockFp8Error: the checkpoint is damaged, another FP8 format, or of a model that transformers does not know.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    checkpoint = read_checkpoint(folder)
    quantization = checkpoint.quantization
    said = BlockFp8Config.from_dict(*quantization) if quantization is not None else BlockFp8Config()
    try:
        config = AutoConfig.from_pretrained(folder)
    except ValueError as error:
        fix = "install a transformers that knows it, or make the run through a server"
        raise BlockFp8Error("transformers does not know this model", where=folder, got=error, fix=fix) from error
    for holder in (config, getattr(config, "text_config", None)):
        if holder is not None and hasattr(holder, "quantization_config"):
            del holder.quantization_config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    converted = device == "cpu" and _has_room(checkpoint, backend)
    with WeightReader(folder) as reader, torch.no_grad():
        _fill(model, checkpoint, reader, said, backend, said.activation(activation), dtype, device, converted)
    _compute_buffers(model, config, device)
    return model.eval()


def _has_room(checkpoint: Checkpoint, backend: str) -> bool:
    """Whether converted codes take no more than a third of the memory that is free."""
    sums = SPECIFICATIONS.get(backend)
    weights = sum(math.prod(e.shape) for e in checkpoint.tensors.values() if e.dtype == "F8_E4M3")
    return sums is not None and weights * sums.itemsize < _free_memory() / 3


def _free_memory() -> int:
    try:
        with open("/proc/meminfo") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 0


def _fill(
    model: torch.nn.Module,
    checkpoint: Checkpoint,
    reader: WeightReader,
    said: BlockFp8Config,
    backend: str,
    activation: Activation,
    dtype: torch.dtype,
    device: str,
    converted: bool,
) -> None:
    tensors = checkpoint.tensors
    state: dict[str, torch.Tensor] = {}
    for name, entry in tensors.items():
        if name.endswith(f".{said.scale_name}"):
            continue
        tensor = reader.read(entry)
        module, _, kind = name.rpartition(".")
        if entry.dtype != "F8_E4M3":
            state[name] = tensor.to(device, dtype)
            continue
        scale_name = said.scale_of(name)
        if kind != "weight" or scale_name not in tensors:
            fix = "look at the checkpoint with `qwen3-fp8-ascend inspect`"
            raise BlockFp8Error("an FP8 tensor has no block scales", where=name, expected=scale_name, fix=fix)
        grid = BlockGrid((tensor.shape[0],), tensor.shape[1], said.block)
        scale = reader.read(tensors[scale_name]).float().reshape(grid.scale_shape)
        if backend == DEQUANTIZED:
            state[name] = ops.dequantize_weight(tensor, scale, grid, dtype).to(device)
            continue
        bias = tensors.get(f"{module}.bias")
        ours = BlockFp8Linear(
            tensor.to(device),
            scale.to(device),
            grid,
            None if bias is None else reader.read(bias).to(device, dtype),
            backend,
            activation,
            converted,
        )
        model.set_submodule(module, ours)
    state = {name: tensor for name, tensor in state.items() if not _belongs_to_ours(model, name)}
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()  # type: ignore[operator]
    still = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if still:
        raise BlockFp8Error(
            "tensors of the model are not in the checkpoint",
            where=checkpoint.folder,
            expected=", ".join(still[:3]),
            got=f"{len(missing)} missing, {len(unexpected)} that the model does not have",
            fix="make the run through a server",
        )


def _belongs_to_ours(model: torch.nn.Module, name: str) -> bool:
    try:
        return isinstance(model.get_submodule(name.rpartition(".")[0]), BlockFp8Linear)
    except AttributeError:
        return False


def _compute_buffers(model: torch.nn.Module, config: Any, device: str) -> None:
    """Make anew what no checkpoint holds and a meta device cannot compute: frequencies of position embeddings."""
    for name, module in list(model.named_modules()):
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            with torch.device(device):
                model.set_submodule(name, type(module)(config))


def run_model(
    model: torch.nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    name: str,
    source: str,
    *,
    greedy_tokens: int,
    keep_logits: bool,
    keep_layers: bool,
    facts: dict[str, Any],
    progress: Progress = lambda text: None,
) -> Run:
    """What the model makes of the prompts: teacher-forced, and continued greedily for `greedy_tokens`."""
    device = next(model.parameters()).device
    all_ids, logprobs, tops, top_values, logits, layers, greedy = [], [], [], [], [], [], []
    with torch.inference_mode():
        for number, prompt in enumerate(prompts, 1):
            progress(f"{name}: prompt {number} of {len(prompts)}")
            ids = encode(tokenizer, prompt, model).to(device)
            out = model(ids, output_hidden_states=keep_layers, use_cache=False)
            scores = out.logits[0, :-1].float().cpu()
            normalized = scores.double().log_softmax(-1)
            best = normalized.topk(min(TOP, normalized.shape[1]), dim=-1)
            all_ids.append(ids[0].cpu().numpy())
            logprobs.append(normalized.gather(1, ids[0, 1:, None].cpu())[:, 0].float().numpy())
            tops.append(best.indices.numpy())
            top_values.append(best.values.float().numpy())
            if keep_logits:
                logits.append(scores.numpy())
            if keep_layers:
                layers.append(torch.stack([h[0, :-1].float().cpu() for h in out.hidden_states[1:]]).numpy())
            greedy.append(list(_continue(model, ids, greedy_tokens)))
    return Run(
        name,
        source,
        list(prompts),
        np.concatenate(all_ids).astype(np.int64),
        np.array([len(ids) for ids in all_ids], dtype=np.int64),
        np.concatenate(logprobs),
        np.concatenate(tops),
        np.concatenate(top_values),
        np.array(greedy, dtype=np.int64).reshape(len(prompts), greedy_tokens),
        np.concatenate(logits) if keep_logits else None,
        np.concatenate(layers, axis=1) if keep_layers else None,
        facts,
    )


def encode(tokenizer: Any, prompt: str, model: torch.nn.Module) -> torch.Tensor:
    """A prompt's tokens, at least two: the first is given, the others are predicted.

    Shapes: -> (1, tokens) int64 on the CPU.
    Raises:
        BlockFp8Error: there are fewer, or the model does not know one.
    """
    ids = tokenizer(prompt).input_ids
    known = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    if len(ids) < 2 or max(ids) >= known:
        raise BlockFp8Error(
            "a prompt's tokens cannot be used",
            where=prompt if len(prompt) < 40 else f"{prompt[:40]}...",
            expected=f"two tokens or more, all below {known}",
            got=f"{len(ids)}" + (f", the largest {max(ids)}" if ids else ""),
            fix="use longer prompts, and the tokenizer's files of this very model",
        )
    return torch.tensor([ids])


def has_our_linears(model: torch.nn.Module) -> bool:
    """Whether any linear is of a block-FP8 checkpoint and ours."""
    return any(isinstance(module, BlockFp8Linear) for module in model.modules())


def describe(model: torch.nn.Module, backend: str, activation: Activation, dtype: str, device: str) -> dict[str, str]:
    """How a run is computed, for its facts; a model without our linears has neither backend nor activation."""
    facts = {"device": device_name(device), "dtype": dtype}
    return facts | {"backend": backend, "activation": activation} if has_our_linears(model) else facts


def device_name(device: str) -> str:
    """The name of the GPU or NPU, or "cpu"."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return (npu_name() or device) if device == "npu" else device


def _continue(model: torch.nn.Module, ids: torch.Tensor, steps: int) -> Iterator[int]:
    """Greedy tokens; an end token does not end them, so that all continuations are equally long."""
    # transformers 5 calls it otherwise.
    kept = "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"
    cache = None
    for _ in range(steps):
        out = model(ids, use_cache=True, **{kept: cache})
        cache, ids = getattr(out, kept), out.logits[:, -1:].argmax(-1)
        yield int(ids)
