"""`--quantization ascend` beside vLLM-Ascend: block FP8 is ours, all else is theirs, in every process."""

import dataclasses
import importlib.metadata
import json
import logging
import multiprocessing
import os
import pickle
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm_ascend.quantization import AscendModelSlimConfig
from vllm_ascend.quantization.method_adapters import AscendLinearMethod

from qwen3_fp8_ascend.errors import BlockFp8Error
from qwen3_fp8_ascend.format import Activation
from qwen3_fp8_ascend.testing.models import QWEN3_8B
from qwen3_fp8_ascend.vllm_plugin import versions
from qwen3_fp8_ascend.vllm_plugin.ascend import AscendConfig, BlockFp8NpuConfig
from qwen3_fp8_ascend.vllm_plugin.linear import BlockFp8LinearMethod

from .conftest import BEFORE_SCHEMES, BLOCK_FP8, MOE, RELEASE, engine_config, write_config

OURS = BlockFp8NpuConfig.linear_method()

MISMATCH = (
    "Quantization method specified in the model config (fp8) does not match the quantization method specified in "
    "the `quantization` argument (ascend)."
)
THEIR_PLUGINS = ("ascend", "ascend_kv_connector", "ascend_model_loader", "ascend_service_profiling", "ascend_model")

pytestmark = pytest.mark.usefixtures("any_backend")


def linear_methods(model: torch.nn.Module) -> dict[str, Any]:
    from vllm.model_executor.layers.linear import LinearBase

    return {name: module.quant_method for name, module in model.named_modules() if isinstance(module, LinearBase)}


@dataclasses.dataclass(frozen=True)
class Fresh:
    """What forks of a process said that has imported vLLM and registered nothing.

    alone: the error of an engine's config of Qwen3-8B-FP8 without this package.
    orders: what `ascend` is and what a pickled config of this process's is, for each of `ORDERS` and of ours first or
        last.
    """

    alone: str
    orders: list[tuple[str, bool, str, str]]


@pytest.fixture(scope="module")
def qwen3_8b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("any") / "Qwen3-8B-FP8", **QWEN3_8B, quantization_config=BLOCK_FP8)


@pytest.fixture(scope="module")
def excluding(tmp_path_factory: pytest.TempPathFactory) -> Any:
    quantization = BLOCK_FP8 | {"modules_to_not_convert": ["lm_head"]}
    return engine_config(write_config(tmp_path_factory.mktemp("any"), quantization_config=quantization)).quant_config


@pytest.fixture(scope="module")
def fresh(qwen3_8b: Path, excluding: Any) -> Fresh:
    """From a spawned process, which the fixture `spawned_processes_are_forks` makes without imports."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=report_from_process, args=(qwen3_8b, pickle.dumps(excluding), sender))
    process.start()
    sender.close()
    try:
        alone, *orders = [receiver.recv() for _ in range(1 + 2 * len(ORDERS))]
    finally:
        process.join(300)
    assert process.exitcode == 0
    return Fresh(alone, orders)


def test_before_and_after(qwen3_8b: Path, fresh: Fresh, build: Callable[[Any], torch.nn.Module]) -> None:
    """Qwen3-8B-FP8's own config: refused by vLLM-Ascend alone, ours on every projection with this package."""
    assert MISMATCH in " ".join(fresh.alone.split())

    config = engine_config(qwen3_8b)
    assert type(config.quant_config) is BlockFp8NpuConfig
    methods = linear_methods(build(config))
    assert len(methods) == 4 * 36
    assert {type(method) for method in methods.values()} == {OURS}
    assert OURS is BlockFp8LinearMethod or issubclass(OURS, AscendLinearMethod)


def test_our_config_extends_theirs() -> None:
    assert get_quantization_config("ascend") is AscendConfig
    assert issubclass(AscendConfig, AscendModelSlimConfig)


ORDERS = ("plugins, platform, plugins", "platform, plugins, platform")


def report_from_process(folder: Path, pickled: bytes, sender: Any) -> None:
    """A fork of this process stands for one without this package, and for one of each order."""
    fork = multiprocessing.get_context("fork")
    orders = [(report_from_order, (order, first, pickled, sender)) for order in ORDERS for first in (True, False)]
    for report, arguments in ((report_alone, (folder, sender)), *orders):
        process = fork.Process(target=report, args=arguments, daemon=True)
        process.start()
        process.join(120)
        if process.exitcode != 0:
            sys.exit(f"{report.__name__} {arguments[:2]}: exit code {process.exitcode}")


def report_alone(folder: Path, sender: Any) -> None:
    os.environ["VLLM_PLUGINS"] = ",".join(THEIR_PLUGINS)
    with pytest.raises(ValueError) as refused:
        engine_config(folder)
    assert get_quantization_config("ascend").__module__.startswith("vllm_ascend.")
    sender.send(str(refused.value))


def report_from_order(order: str, ours_first: bool, pickled: bytes, sender: Any) -> None:
    found = importlib.metadata.entry_points

    def ordered(**selection: str) -> list[importlib.metadata.EntryPoint]:
        return sorted(found(**selection), key=lambda entry: (entry.name == "qwen3_fp8_ascend") != ours_first)

    importlib.metadata.entry_points = ordered  # type: ignore[assignment]
    from vllm import plugins
    from vllm.platforms import current_platform

    assert not plugins.plugins_loaded
    steps = {"plugins": plugins.load_general_plugins, "platform": current_platform.pre_register_and_update}
    for step in order.split(", "):
        steps[step]()
    registered = get_quantization_config("ascend")
    sender.send((order, ours_first, f"{registered.__module__}.{registered.__name__}", repr(pickle.loads(pickled))))


def test_it_survives_in_spawned_processes(excluding: Any, fresh: Fresh) -> None:
    """Whatever comes first, vLLM-Ascend's platform or the plugins, and whatever the order of their entry points."""
    ours = "qwen3_fp8_ascend.vllm_plugin.ascend.AscendConfig"
    described = "BlockFp8NpuConfig(block=128x128, 1 names excluded)"
    assert repr(excluding) == described
    assert fresh.orders == [(order, first, ours, described) for order in ORDERS for first in (True, False)]


def write_modelslim(folder: Path) -> Path:
    """A checkpoint as ModelSlim leaves it: quantized projections, a float head, no `quantization_config`."""
    write_config(folder)
    layers = [f"model.layers.{i}" for i in range(2)]
    names = [f"self_attn.{p}_proj" for p in "qkvo"] + [f"mlp.{p}_proj" for p in ("gate", "up", "down")]
    description = {f"{layer}.{name}.weight": "W8A8_DYNAMIC" for layer in layers for name in names}
    description["model.layers.1.self_attn.o_proj.weight"] = "FLOAT"
    description |= {"model.embed_tokens.weight": "FLOAT", "lm_head.weight": "FLOAT", "model_quant_type": "W8A8_DYNAMIC"}
    (folder / "quant_model_description.json").write_text(json.dumps(description))
    return folder


def described(model: torch.nn.Module) -> dict[str, Any]:
    """Every layer's method and scheme, and every parameter."""
    out: dict[str, Any] = {}
    for name, module in model.named_modules():
        if hasattr(module, "quant_method"):
            method = module.quant_method
            out[name] = type(method), type(getattr(method, "quant_method", None))
    return out | {name: (p.dtype, p.shape, type(p)) for name, p in model.named_parameters()}


INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
COMPRESSED_TENSORS = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False},
            "input_activations": {
                "num_bits": 8,
                "type": "int",
                "symmetric": True,
                "strategy": "token",
                "dynamic": True,
            },
        }
    },
}


@pytest.mark.parametrize("kind", ["ModelSlim", "compressed-tensors", "bf16"])
def test_other_checkpoints_are_still_theirs(tmp_path: Path, build: Callable[[Any], torch.nn.Module], kind: str) -> None:
    """Every layer's method and scheme and every parameter, with our config registered and with theirs."""
    from vllm.model_executor.layers.quantization import register_quantization_config

    if kind == "ModelSlim":
        folder = write_modelslim(tmp_path / "model")
    else:
        quantization = {"quantization_config": COMPRESSED_TENSORS} if kind == "compressed-tensors" else {}
        folder = write_config(tmp_path / "model", **quantization)
    flag = "ascend" if kind == "ModelSlim" else None
    with_ours = engine_config(folder, quantization=flag)
    try:
        register_quantization_config("ascend")(AscendModelSlimConfig)
        theirs = engine_config(folder, quantization=flag)
    finally:
        register_quantization_config("ascend")(AscendConfig)
    if kind == "ModelSlim":
        assert isinstance(with_ours.quant_config, AscendModelSlimConfig)
        assert type(theirs.quant_config) is AscendModelSlimConfig
    else:
        assert type(with_ours.quant_config) is type(theirs.quant_config)
    description = [getattr(config.quant_config, "quant_description", None) for config in (with_ours, theirs)]
    assert description[0] == description[1]
    mine, expected = described(build(with_ours)), described(build(theirs))
    assert mine == expected
    assert (kind == "bf16") != ("AscendLinearMethod" in str(expected))


def test_this_pair_of_versions_is_not_warned_about_and_others_are(caplog: pytest.LogCaptureFixture) -> None:
    """With the real distributions' metadata; vLLM's version ends in `+empty` on an Ascend machine."""
    package = logging.getLogger("qwen3_fp8_ascend")
    package.addHandler(caplog.handler)
    try:
        versions.warn_if_untested()
        assert caplog.text == ""
        with pytest.MonkeyPatch.context() as other:
            other.setattr(versions, "TESTED_VLLM_ASCEND", {"0.99.0": "0.99.0"})
            versions.warn_if_untested()
    finally:
        package.removeHandler(caplog.handler)
    installed = importlib.metadata.version("vllm-ascend")
    assert f"with vLLM-Ascend {installed}" in caplog.text and importlib.metadata.version("vllm").endswith("+empty")


def test_atlas_300i_is_left_alone(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """vLLM-Ascend registers yet another config there, and this package has no kernels for it."""
    import vllm_ascend._build_info

    from qwen3_fp8_ascend import vllm_plugin

    monkeypatch.setattr(vllm_ascend._build_info, "__device_type__", "_310P")
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    assert vllm_plugin._config_class() is None
    assert "not for Atlas 300I (310P)" in caplog.text
    monkeypatch.undo()
    assert vllm_plugin._config_class() is AscendConfig


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fp32_is_refused_at_the_start(tmp_path: Path, dtype: str) -> None:
    folder = write_config(tmp_path / "fp8", quantization_config=BLOCK_FP8)
    if dtype == "bfloat16":
        assert type(engine_config(folder, dtype=dtype).quant_config) is BlockFp8NpuConfig
        return
    with pytest.raises(ValueError, match=r"float32 is not supported for quantization method ascend"):
        engine_config(folder, dtype=dtype)


def test_a_folder_that_is_neither_gets_their_error(tmp_path: Path) -> None:
    folder = write_config(tmp_path / "bf16")
    with pytest.raises(ValueError, match="ModelSlim Quantization Config Not Found"):
        engine_config(folder)


def test_without_the_flag_block_fp8_is_what_it_was(tmp_path: Path) -> None:
    folder = write_config(tmp_path / "fp8", quantization_config=BLOCK_FP8)
    config = engine_config(folder, quantization=None)
    assert config.model_config.quantization == "fp8"
    assert type(config.quant_config).__module__.startswith("vllm_ascend.")


@pytest.mark.parametrize("method", ["awq", "gptq", "compressed-tensors"])
def test_other_methods_are_not_taken_over(method: str) -> None:
    config = {"quant_method": method, "bits": 4}
    theirs = AscendModelSlimConfig.override_quantization_method(config, "ascend")
    assert AscendConfig.override_quantization_method(config, "ascend") == theirs
    assert AscendConfig.override_quantization_method(BLOCK_FP8, None) is None
    assert AscendConfig.override_quantization_method(BLOCK_FP8, "fp8") is None


@pytest.mark.parametrize(
    ("change", "named"), [({"weight_block_size": None}, "weight_block_size"), ({"scale_fmt": "ue4m3"}, "scale_fmt")]
)
def test_other_fp8_checkpoints_are_refused_with_the_reason(tmp_path: Path, change: dict, named: str) -> None:
    quantization = {key: value for key, value in (BLOCK_FP8 | change).items() if value is not None}
    folder = write_config(tmp_path / "fp8", quantization_config=quantization)
    with pytest.raises(ValueError, match=rf"quantization_config\.{named}"):
        engine_config(folder)


def test_experts_need_the_schemes_of_a_newer_release(tmp_path: Path, build: Callable[[Any], torch.nn.Module]) -> None:
    """0.23.0 is refused by name; what 0.30.0rc2 does with experts is in test_experts.py."""
    folder = write_config(tmp_path / "moe", **MOE, quantization_config=BLOCK_FP8)
    if not BEFORE_SCHEMES:
        assert sum("routed_experts" in name for name, _ in build(engine_config(folder)).named_modules()) == 2
        return
    with pytest.raises(BlockFp8Error, match=r"(?s)newer vLLM-Ascend.*model\.layers\.0\.mlp\.experts.*0\.23\.0"):
        build(engine_config(folder))


@pytest.mark.parametrize("activation", list(Activation))
def test_settings_reach_the_layers(
    tmp_path: Path, build: Callable[[Any], torch.nn.Module], activation: Activation
) -> None:
    """Through the flag that vLLM-Ascend lets pass: its 0.30.0rc2 refuses what it does not know in the other one."""
    settings = {"qwen3_fp8_ascend": {"activation": activation, "backend": "triton"}}
    folder = write_config(tmp_path / "m", quantization_config=BLOCK_FP8)
    methods = linear_methods(build(engine_config(folder, hf_overrides=settings)))
    assert {(method.activation, method.backend) for method in methods.values()} == {(activation, "triton")}
    if RELEASE == "0.30.0rc2":
        with pytest.raises(ValueError, match="Unexpected keyword argument"):
            engine_config(folder, additional_config=settings)
    else:
        assert settings.items() <= engine_config(folder, additional_config=settings).additional_config.items()


def test_what_vllm_ascend_asks_a_quantization_config(tmp_path: Path) -> None:
    """Read without asking whether it is there, by norms and by connectors between prefill and decode servers."""
    from vllm_ascend.quantization.utils import enable_fa_quant

    config = engine_config(write_config(tmp_path / "m", quantization_config=BLOCK_FP8))
    ours = config.quant_config
    assert (ours.quant_description, ours.enable_fa_quant, ours.enable_c8_quant) == ({}, False, False)
    assert not enable_fa_quant(config)
    sources = Path(os.environ["ASCEND_SOURCE"], "vllm_ascend")
    connectors = [file.read_text() for file in sources.glob("distributed/**/*.py")]
    asked = {name for text in connectors for name in re.findall(r"quant_config\.(enable\w+)", text)}
    assert asked and all(hasattr(ours, name) for name in asked), asked


def test_layers_that_the_checkpoint_leaves_alone_get_their_method(
    tmp_path: Path, build: Callable[[Any], torch.nn.Module]
) -> None:
    from vllm_ascend.ops.linear import AscendUnquantizedLinearMethod

    ignored = ["lm_head", "model.layers.0.mlp.down_proj"]
    folder = write_config(tmp_path / "m", quantization_config=BLOCK_FP8 | {"modules_to_not_convert": ignored})
    methods = linear_methods(build(engine_config(folder)))
    assert type(methods.pop("model.layers.0.mlp.down_proj")) is AscendUnquantizedLinearMethod
    assert {type(method) for method in methods.values()} == {OURS}
