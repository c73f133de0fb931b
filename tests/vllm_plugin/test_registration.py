"""`--quantization ascend` as vLLM sees it: registration, acceptance, refusal."""

import io
import json
import logging
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm.config import ModelConfig
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.plugins import load_general_plugins

from qwen3_fp8_ascend.backends import select_backend
from qwen3_fp8_ascend.errors import BlockFp8Error
from qwen3_fp8_ascend.format import Activation
from qwen3_fp8_ascend.testing.models import qwen3_config
from qwen3_fp8_ascend.vllm_plugin import versions

BLOCK_FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def model_config(folder: Path, quantization: str | None = "ascend", **changes: Any) -> ModelConfig:
    config = qwen3_config(quantization_config=BLOCK_FP8 | changes)
    config["quantization_config"] = {k: v for k, v in config["quantization_config"].items() if v is not None}
    (folder / "config.json").write_text(json.dumps(config))
    return ModelConfig(str(folder), skip_tokenizer_init=True, quantization=quantization)  # type: ignore[arg-type]


def quant_config(config: ModelConfig) -> Any:
    from vllm.config import LoadConfig
    from vllm.model_executor.model_loader.weight_utils import get_quant_config

    return get_quant_config(config, LoadConfig())


def test_importing_the_package_is_cheap() -> None:
    code = "import sys, qwen3_fp8_ascend; print(sorted({'torch', 'vllm', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_vllm_finds_the_plugin_and_registering_again_changes_nothing() -> None:
    from qwen3_fp8_ascend import register
    from qwen3_fp8_ascend.vllm_plugin.config import BlockFp8AscendConfig

    load_general_plugins()
    assert get_quantization_config("ascend") is BlockFp8AscendConfig
    register()
    assert get_quantization_config("ascend") is BlockFp8AscendConfig


def test_a_block_fp8_checkpoint_is_accepted(tmp_path: Path) -> None:
    config = model_config(tmp_path, modules_to_not_convert=["lm_head"])
    assert config.quantization == "ascend"
    quantization = pickle.loads(pickle.dumps(quant_config(config)))
    assert quantization.get_name() == "ascend"
    assert quantization.weight_block_size == [128, 128]
    assert quantization.ignored_layers == ["lm_head"]


@pytest.fixture
def vllm_serves(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Whether this processor has what vLLM's own kernel for block FP8 needs, whatever it is."""
    monkeypatch.setattr("vllm._custom_ops._supports_cpu_fp8_w8a16", True)  # not in vLLM's library for AVX2
    return lambda does: monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: does)


Serves = Callable[[bool], None]


def test_what_vllm_serves_itself_is_left_to_it(tmp_path: Path, vllm_serves: Serves) -> None:
    vllm_serves(True)
    assert model_config(tmp_path, quantization=None).quantization == "fp8"


def test_what_vllm_would_refuse_is_served_without_the_flag(
    tmp_path: Path, vllm_serves: Serves, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    vllm_serves(False)
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    caplog.set_level("INFO")
    assert model_config(tmp_path, quantization=None).quantization == "ascend"
    assert "as with --quantization ascend: vLLM's own kernel for it says: requires AMX tile support" in caplog.text


@pytest.mark.parametrize("change", [{"weight_block_size": None}, {"activation_scheme": "static"}])
def test_other_fp8_is_left_to_vllm_without_the_flag(tmp_path: Path, vllm_serves: Serves, change: dict) -> None:
    vllm_serves(False)
    assert model_config(tmp_path, quantization=None, **change).quantization == "fp8"


def test_who_names_another_method_gets_it(tmp_path: Path, vllm_serves: Serves) -> None:
    vllm_serves(False)
    assert model_config(tmp_path, quantization="fp8").quantization == "fp8"


def test_a_vllm_that_cannot_be_asked_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from qwen3_fp8_ascend.vllm_plugin.config import BlockFp8AscendConfig

    monkeypatch.delattr("vllm.model_executor.kernels.linear.CPUFp8BlockScaledMMKernel")
    assert BlockFp8AscendConfig.override_quantization_method(BLOCK_FP8, None) is None


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"weight_block_size": None}, "weight_block_size"),
        ({"activation_scheme": "static"}, "activation_scheme"),
        ({"scale_fmt": "ue4m3"}, "scale_fmt"),
    ],
)
def test_other_fp8_checkpoints_are_refused_with_the_reason(tmp_path: Path, change: dict, named: str) -> None:
    config = model_config(tmp_path, **change)
    with pytest.raises(BlockFp8Error, match=rf"quantization_config\.{named}"):
        quant_config(config)


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_other_methods_are_not_taken_over(tmp_path: Path, method: str) -> None:
    from qwen3_fp8_ascend.vllm_plugin.config import BlockFp8AscendConfig

    assert BlockFp8AscendConfig.override_quantization_method({"quant_method": method}, "ascend") is None
    assert BlockFp8AscendConfig.override_quantization_method({"quant_method": method}, None) is None
    assert BlockFp8AscendConfig.override_quantization_method(BLOCK_FP8, "fp8") is None


def test_headers_are_looked_at_before_anything_is_loaded(tmp_path: Path) -> None:
    config = model_config(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    with pytest.raises(BlockFp8Error, match=r"model\.safetensors"):
        quant_config(config).maybe_update_config(config.model)


@pytest.mark.parametrize("flag", ["additional_config", "hf_overrides"])
@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"qwen3_fp8_ascend": {"bakend": "cpu"}}, "unknown setting"),
        ({"qwen3_fp8_ascend": {"activation": "static"}}, "unknown activation mode"),
        ({"qwen3_fp8_ascend": {"lm_head": "int8"}}, "unknown lm_head"),
        ({"qwen3_fp8_ascend": {"backend": 1}}, "named by a string"),
        ({"qwen3_fp8_ascend": 3}, "unknown setting"),
    ],
)
def test_settings_are_checked(given: dict, said: str, flag: str) -> None:
    from qwen3_fp8_ascend.vllm_plugin.config import Settings

    with pytest.raises(BlockFp8Error, match=rf"(?s){said}.*--{flag.replace('_', '-')}"):
        Settings.from_flags(**{flag: given})
    assert Settings.from_flags(**{flag: {"other": 1}}) == Settings()


def test_settings_come_from_either_flag_but_not_from_two() -> None:
    from qwen3_fp8_ascend.vllm_plugin.config import Settings

    weights_only = {"qwen3_fp8_ascend": {"activation": "w8a16"}}
    assert (
        Settings.from_flags(weights_only)
        == Settings.from_flags(None, weights_only)
        == Settings(activation=Activation.W8A16)
    )
    assert Settings.from_flags(weights_only, weights_only) == Settings(activation=Activation.W8A16)
    with pytest.raises(BlockFp8Error, match=r"(?s)different things.*use one of --hf-overrides, --additional-config"):
        Settings.from_flags(weights_only, {"qwen3_fp8_ascend": {"backend": "cpu"}})
    assert Settings.from_flags({}, lambda config: config) == Settings()


def engine_config(folder: Path, **arguments: Any) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    (folder / "config.json").write_text(json.dumps(qwen3_config(quantization_config=BLOCK_FP8)))
    common = {"skip_tokenizer_init": True, "load_format": "dummy", "max_model_len": 128, "quantization": "ascend"}
    return EngineArgs(model=str(folder), **common, **arguments).create_engine_config()


def test_compiled_graphs_are_kept_by_settings_and_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph of other settings or of another backend's weights must not be taken from vLLM's cache."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.linear import ReplicatedLinear

    keys = {}
    for name, backend, overrides in [
        ("cpu", "cpu", {}),
        ("cpu again", "cpu", {}),
        ("reference", "reference", {}),
        ("weights only", "cpu", {"qwen3_fp8_ascend": {"activation": "w8a16"}}),
    ]:
        monkeypatch.setenv("QWEN3_FP8_ASCEND_BACKEND", backend)
        select_backend.cache_clear()
        config = engine_config(tmp_path, hf_overrides=overrides)
        with set_current_vllm_config(config):
            layer = ReplicatedLinear(128, 128, bias=False, quant_config=config.quant_config, prefix="model.layers.0.x")
            layer.quant_method.process_weights_after_loading(layer)
            assert layer.quant_method.activation == (Activation.W8A16 if overrides else Activation.W8A8)
        keys[name] = config.compute_hash()
    select_backend.cache_clear()
    assert keys["cpu"] == keys["cpu again"]
    assert len(set(keys.values())) == 3, keys


@pytest.mark.parametrize(
    ("version", "tested"),
    [
        ("0.30.0", True),
        ("0.32.0", True),
        ("0.30.0rc2", False),
        ("0.29.0", False),
        ("0.33.0", False),
        ("dev", False),
        (None, False),
    ],
)
def test_tested_range(version: str | None, tested: bool) -> None:
    assert versions.is_tested(version) is tested


@pytest.mark.parametrize(
    ("vllm", "ascend", "tested"),
    [
        ("0.30.0", "0.30.0rc2", True),
        ("0.23.0", "0.23.0", True),
        ("0.23.0", "0.23.0.post1", True),
        ("0.23.0", "0.23.0.post2", False),
        ("0.30.0", "0.23.0", False),
        ("0.31.0", "0.30.0rc2", False),
        (None, "0.23.0", False),
        ("0.30.0", "dev", False),
    ],
)
def test_vllm_ascend_goes_with_one_vllm(vllm: str | None, ascend: str, tested: bool) -> None:
    assert versions.is_tested(vllm, ascend) is tested


def test_an_untested_vllm_ascend_is_warned_about_by_name(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(versions, "installed", lambda: "0.30.0")
    monkeypatch.setattr(versions, "installed_vllm_ascend", lambda: "0.29.0rc1")
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    with caplog.at_level("WARNING"):
        versions.warn_if_untested()
    assert "0.29.0rc1" in caplog.text and "0.30.0rc2" in caplog.text and "0.23.0" in caplog.text


def test_an_untested_vllm_is_warned_about_by_range(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(versions, "installed", lambda: "0.29.0")
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    with caplog.at_level("WARNING"):
        versions.warn_if_untested()
    assert "0.29.0" in caplog.text and str(versions.TESTED) in caplog.text


def test_log_lines_reach_the_handlers_that_vllm_has_by_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """From 0.31 on it makes its handlers anew after it has called plugins; which backend serves is said later still."""
    stream = io.StringIO()
    monkeypatch.setattr(logging.getLogger("vllm"), "handlers", [logging.StreamHandler(stream)])
    logging.getLogger("qwen3_fp8_ascend.backends.registry").warning("a line")
    assert stream.getvalue() == "a line\n"


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[str]:
    """Registered with a vLLM in which something is missing; gives what was logged."""
    from vllm.model_executor.layers.quantization import register_quantization_config

    from qwen3_fp8_ascend import vllm_plugin

    def missing() -> None:
        raise ImportError("cannot import name 'RoutedExperts'")

    usual = get_quantization_config("ascend")
    with monkeypatch.context() as patch:
        patch.setattr(vllm_plugin, "_registered", False)
        patch.setattr(vllm_plugin, "_config_class", missing)
        patch.setattr(logging.getLogger("vllm"), "propagate", True)
        vllm_plugin.register()
    yield caplog.text
    register_quantization_config("ascend")(usual)


def test_an_unusable_vllm_is_an_error_to_who_asks_only(tmp_path: Path, broken: str) -> None:
    """vLLM calls plugins unguarded: an exception of ours would stop every model."""
    assert "cannot import name 'RoutedExperts'" in broken and str(versions.TESTED) in broken
    assert model_config(tmp_path, quantization=None).quantization == "fp8"
    with pytest.raises(ValueError, match=r"(?s)cannot register.*tested together"):
        model_config(tmp_path)


def test_an_unusable_vllm_ascend_keeps_its_own_method(monkeypatch: pytest.MonkeyPatch) -> None:
    from qwen3_fp8_ascend.vllm_plugin import _refusing_config

    assert _refusing_config(ImportError("x")) is not None
    monkeypatch.setattr(versions, "installed_vllm_ascend", lambda: "0.99.0")
    assert _refusing_config(ImportError("x")) is None
