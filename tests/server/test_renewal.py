"""What operators do to a running server besides asking it: new weights, sleep, LoRA adapters."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen3_fp8_ascend.checkpoints.dequantize import dequantize_checkpoint
from qwen3_fp8_ascend.serving import Server, serve, serving_environment
from qwen3_fp8_ascend.testing.models import write_block_fp8_qwen3
from tests.support.forked_server import forked
from tests.support.logprobs import distance, prompt_logprobs
from tests.support.lora_adapters import RANK, write_adapter
from tests.support.processes import resident_bytes

from .conftest import ASCEND, COMMON, EAGER, Start

pytestmark = pytest.mark.server

FP32 = ("--dtype", "float32")
W8A16 = ("--additional-config", json.dumps({"qwen3_fp8_ascend": {"activation": "w8a16"}}))
DEVELOPER = {"VLLM_SERVER_DEV_MODE": "1"}
"""vLLM offers reloading and sleep over HTTP only so."""


@pytest.fixture(scope="module")
def adapters(tiny_qwen3: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    folder = tmp_path_factory.mktemp("adapters")
    strong, idle = (write_adapter(folder / name, tiny_qwen3, size) for name, size in (("strong", 0.5), ("idle", 0)))
    return "--enable-lora", "--max-lora-rank", str(RANK), "--lora-modules", f"strong={strong}", f"idle={idle}"


@pytest.fixture(scope="module")
def server(tiny_qwen3: Path, adapters: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The tiny Qwen3 with adapters and developer endpoints. The module's tests use it one after the other."""
    log = tmp_path_factory.mktemp("renewal") / "server.log"
    options = (*COMMON, *ASCEND, EAGER, *FP32, *adapters)
    environment = serving_environment(**DEVELOPER)
    with forked(), serve(tiny_qwen3, *options, log=log, environment=environment) as running:
        yield running


@pytest.fixture(scope="module")
def other_qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same shapes with other weights."""
    return write_block_fp8_qwen3(tmp_path_factory.mktemp("other") / "qwen3", seed=1)


def asked_as(server: Server, adapter: str) -> np.ndarray:
    return prompt_logprobs(dataclasses.replace(server, model=adapter))


def reload(server: Server, folder: Path) -> httpx.Response:
    body = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
    return httpx.post(f"{server.url}/collective_rpc", json=body, timeout=120)


def test_adapters_act_beside_fp8_linears(server: Server) -> None:
    base = prompt_logprobs(server)
    assert distance(asked_as(server, "idle"), base) == 0
    assert distance(asked_as(server, "strong"), base) > 0.1


def test_sleep_changes_nothing_and_says_that_it_frees_nothing(server: Server) -> None:
    """A CPU's memory cannot be offloaded: vLLM pauses the scheduler and keeps the weights."""
    before = prompt_logprobs(server)
    for level in (1, 2):
        httpx.post(f"{server.url}/sleep?level={level}").raise_for_status()
        assert httpx.get(f"{server.url}/is_sleeping").json() == {"is_sleeping": True}
        httpx.post(f"{server.url}/wake_up").raise_for_status()
        assert distance(prompt_logprobs(server), before) == 0
    assert "sleep mode is not supported on CPU" in server.log.read_text()


def test_reloaded_weights_serve_and_the_old_ones_come_back(server: Server, tiny_qwen3: Path, other_qwen3: Path) -> None:
    before, strong = prompt_logprobs(server), asked_as(server, "strong")
    assert reload(server, other_qwen3).status_code == 200
    other, memory = prompt_logprobs(server), resident_bytes(server.process.pid)
    assert distance(other, before) > 0.1
    for _ in range(4):
        assert reload(server, tiny_qwen3).status_code == 200
        assert distance(prompt_logprobs(server), before) == 0
        assert distance(asked_as(server, "strong"), strong) == 0
        assert reload(server, other_qwen3).status_code == 200
        assert distance(prompt_logprobs(server), other) == 0
    grown = resident_bytes(server.process.pid) - memory
    print(f"\nresident memory after eight more reloads: {grown / 1e6:+.1f} MB")
    assert grown < 16e6


def test_bad_weights_are_refused_by_name_and_never_served(server: Server, other_qwen3: Path, tmp_path: Path) -> None:
    """The last test of this server: layers that were renewed already have no old weights to go back to."""
    damaged = tmp_path / "damaged"
    shutil.copytree(other_qwen3, damaged)
    tensors = load_file(damaged / "model.safetensors")
    name = "model.layers.1.self_attn.k_proj.weight"
    tensors[name].view(torch.uint8)[3, 5] = 0x7F
    save_file(tensors, damaged / "model.safetensors", {"format": "pt"})
    refused = reload(server, damaged)
    assert refused.status_code == 500
    assert "holds NaN codes" in refused.text
    assert name in refused.text
    body = {"model": server.model, "prompt": "Hello", "max_tokens": 1}
    assert httpx.post(f"{server.url}/v1/completions", json=body).status_code == 500


@pytest.mark.long
@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_reloaded_weights_give_what_a_fresh_server_gives(
    start: Start, tiny_qwen3: Path, other_qwen3: Path, logprobs_of: Callable[..., np.ndarray], mode: str
) -> None:
    options = (*ASCEND, *((EAGER,) if mode == "eager" else ()))
    fresh = logprobs_of(other_qwen3, *options)
    server = start(tiny_qwen3, *options, *FP32, **DEVELOPER)
    assert distance(prompt_logprobs(server), fresh) > 0.1
    assert reload(server, other_qwen3).status_code == 200
    assert distance(prompt_logprobs(server), fresh) == 0


@pytest.mark.long
def test_adapters_act_as_beside_bf16_linears(tiny_qwen3: Path, adapters: tuple[str, ...], tmp_path: Path) -> None:
    dequantized = tmp_path / "dequantized"
    dequantize_checkpoint(tiny_qwen3, dequantized)
    common, environment = (*COMMON, EAGER, *FP32, *adapters), serving_environment()
    with serve(tiny_qwen3, *ASCEND, *W8A16, *common, log=tmp_path / "fp8.log", environment=environment) as server:
        fp8 = asked_as(server, "strong")
    with serve(dequantized, *common, log=tmp_path / "bf16.log", environment=environment) as server:
        bf16, base = asked_as(server, "strong"), prompt_logprobs(server)
    near, effect = distance(fp8, bf16), distance(base, bf16)
    print(f"\nnats a token: FP8 against bf16, both with the adapter {near:.6f}; the adapter's effect {effect:.4f}")
    assert near < 0.02
    assert effect > 10 * near
