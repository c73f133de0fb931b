"""What `doctor` reads from an Ascend machine's files, and what it says would serve."""

import dataclasses
import io
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from qwen3_fp8_ascend import doctor
from qwen3_fp8_ascend.backends import registry, soc
from qwen3_fp8_ascend.vllm_plugin import versions


@pytest.mark.parametrize("folder", ["", "{arch}-linux"])
def test_cann_version_is_read_where_the_toolkit_writes_it(tmp_path: Path, folder: str) -> None:
    where = tmp_path / folder.format(arch=platform.machine())
    where.mkdir(exist_ok=True)
    (where / "ascend_toolkit_install.info").write_text("package_name=Ascend-cann-toolkit\nversion=8.5.0\n")
    assert doctor._cann(str(tmp_path)) == f"8.5.0 in {tmp_path}"


def test_cann_that_says_nothing(tmp_path: Path) -> None:
    assert "unknown version" in doctor._cann(str(tmp_path))
    assert "set_env.sh" in doctor._cann(None)


def test_driver_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "version.info"
    monkeypatch.setattr(doctor, "DRIVER", file)
    packages = dict.fromkeys(doctor.PACKAGES)
    assert "not found" in doctor._ascend(packages, "", "")["driver"]
    file.write_text("Version=25.2.0\nascendhal_version=7.35.23\n")
    assert doctor._ascend(packages, "", "")["driver"] == "25.2.0"


def test_what_serves_on_this_machine() -> None:
    report = doctor.examine()
    assert report.serving["cpu, w8a8"]["backend"] == "cpu"
    assert report.serving["cpu, w8a8"]["rows"]
    assert not any(key.startswith("npu") for key in report.serving)


def test_an_npu_that_nothing_serves_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Atlas A2 with neither Triton nor the Ascend C kernels."""
    monkeypatch.setattr(soc, "missing_npu", lambda: None)
    monkeypatch.setattr(soc, "device_name", lambda: "Ascend910B3")
    registry.select_backend.cache_clear()
    try:
        report = doctor.examine()
    finally:
        registry.select_backend.cache_clear()
    assert report.ascend["SoC"] == "Ascend910B3: Atlas A2 (910B)"
    assert report.serving["npu, w8a8"]["backend"] is None
    assert any("NPU" in what for what, _ in report.problems)


VERSIONS = {
    "torch": "2.10.0+cpu",
    "vllm": "0.30.0+empty",
    "vllm-ascend": "0.30.0rc2",
    "torch-npu": "2.10.0.post4",
    "triton-ascend": "3.2.2",
}

Machine = Callable[..., doctor.Report]


@pytest.fixture
def ascend_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """A machine with an NPU as the packages and files tell of it: `ascend_machine(chip, backends, **versions)`."""

    def examine(chip: str | None, usable: tuple[str, ...], **changes: str | None) -> doctor.Report:
        npu = SimpleNamespace(is_available=lambda: chip is not None, get_device_name=lambda: chip)
        monkeypatch.setitem(sys.modules, "torch_npu", SimpleNamespace(npu=npu, __spec__=SimpleNamespace()))
        soc.device_name.cache_clear()
        found = VERSIONS | {name.replace("_", "-"): version for name, version in changes.items()}
        for module in (doctor, versions):
            monkeypatch.setattr(module, "installed_version", found.get)
        toolkit = tmp_path / f"{platform.machine()}-linux"
        toolkit.mkdir(exist_ok=True)
        (toolkit / "ascend_toolkit_install.info").write_text("version=9.1.0\n")
        monkeypatch.setenv("ASCEND_HOME_PATH", str(tmp_path))
        (tmp_path / "version.info").write_text("Version=25.5.0\n")
        monkeypatch.setattr(doctor, "DRIVER", tmp_path / "version.info")
        for name in ("ascendc", "triton", "torch_npu"):
            reason = soc.missing_npu() or (None if name in usable else "not on this machine")
            backend = dataclasses.replace(registry.load_backend(name), unusable=lambda reason=reason: reason)
            monkeypatch.setitem(registry.LOADED, name, backend)
        registry.select_backend.cache_clear()
        return doctor.examine()

    yield examine
    soc.device_name.cache_clear()
    registry.select_backend.cache_clear()


def both_forms(report: doctor.Report) -> tuple[str, dict[str, Any]]:
    """What people and what programs are told."""
    console = Console(file=io.StringIO(), width=250)
    doctor.render(report, console)
    return console.file.getvalue(), json.loads(json.dumps(report.to_dict()))  # type: ignore[attr-defined]


FUSED = "fused kernel, exact: decoded on vector cores, multiplied by the cube"
SCRATCH = (
    "decoded into a scratch, then the stock fp16 product: rounds its operands, and is slower than BF16 (predicted)"
)
NATIVE = "npu_dynamic_block_quant, npu_quant_matmul with 1x128 and 128x128 scales"


@pytest.mark.parametrize(
    ("chip", "machines", "usable", "w8a8", "w8a16"),
    [
        ("Ascend910B3", "Atlas A2 (910B)", ("ascendc", "triton", "torch_npu"), "ascendc", "ascendc"),
        ("Ascend910_9392", "Atlas A3 (910C)", ("ascendc", "torch_npu"), "ascendc", "ascendc"),
        ("Ascend910_9392", "Atlas A3 (910C)", ("triton", "torch_npu"), "triton", "triton"),
        ("Ascend950PR_9589", "Ascend 950", ("triton", "torch_npu"), "torch_npu", "triton"),
    ],
)
def test_an_ascend_machine(
    ascend_machine: Machine, monkeypatch: pytest.MonkeyPatch, chip: str, machines: str, usable: tuple[str, ...],
    w8a8: str, w8a16: str,
) -> None:  # fmt: skip
    """CANN, driver, SoC, torch-npu, vLLM-Ascend, and which backend takes which number of rows."""
    from qwen3_fp8_ascend.backends import triton

    monkeypatch.setattr(triton, "_current_device_type", lambda: "npu")
    text, facts = both_forms(ascend_machine(chip, usable))
    ascend = facts["ascend"]
    assert ascend["SoC"] == f"{chip}: {machines}" and ascend["driver"] == "25.5.0"
    assert ascend["CANN"].startswith("9.1.0 in ")
    assert (ascend["torch-npu"], ascend["vllm-ascend"]) == ("2.10.0.post4", "0.30.0rc2")
    plans = {
        "ascendc": {"m = 1": "linear kernel, exact", "m <= 64": FUSED, "m > 64": SCRATCH},
        "triton": {"m <= 64": "fused kernel, exact", "m > 64": SCRATCH},
        "torch_npu": {"any": NATIVE},
    }
    for computes, backend in (("npu, w8a8", w8a8), ("npu, w8a16", w8a16)):
        assert facts["serving"][computes] == {"backend": backend, "rows": plans[backend]}
    for shown in (chip, machines, "25.5.0", "9.1.0", "2.10.0.post4", "0.30.0rc2", *plans[w8a8], *plans[w8a8].values()):
        assert shown in text, shown
    assert not any("NPU" in what or "tested" in what or "torch-npu" in what for what, _ in facts["problems"]), facts


def test_an_ascend_machine_without_a_usable_npu(ascend_machine: Machine) -> None:
    text, facts = both_forms(ascend_machine(None, ()))
    assert facts["ascend"]["SoC"] == "none to use: torch_npu sees no NPU"
    assert "vLLM-Ascend is installed, but no NPU can be used: torch_npu sees no NPU" in text
    assert "npu-smi info" in text and not any(key.startswith("npu") for key in facts["serving"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"torch_npu": "2.9.0"}, "torch-npu 2.9.0 is beside torch 2.10.0+cpu"),
        ({"torch": "2.9.1+cpu"}, "torch 2.9.1+cpu is too old for the native kernels, which are for torch 2.10 to 2.14"),
        ({"torch": "2.15.0"}, "torch 2.15.0 is newer than what the kernels were tried with, torch 2.10 to 2.14"),
        ({"vllm_ascend": "0.29.0rc1"}, "vLLM 0.30.0 with vLLM-Ascend 0.29.0rc1 was not tested"),
    ],
)
def test_versions_that_do_not_go_together(ascend_machine: Machine, changes: dict[str, str], said: str) -> None:
    report = ascend_machine("Ascend910B3", ("ascendc",), **changes)
    assert any(said in what for what, _ in report.problems), report.problems


def test_a_plugin_that_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "ascend")
    assert any("leaves this plugin out" in what for what, _ in doctor.examine().problems)
    monkeypatch.setenv("VLLM_PLUGINS", "ascend,qwen3_fp8_ascend")
    assert not any("leaves this plugin out" in what for what, _ in doctor.examine().problems)


@pytest.mark.parametrize("as_json", [True, False], ids=["json", "human"])
def test_a_torch_that_does_not_load_is_a_problem_not_a_traceback(tmp_path: Path, as_json: bool) -> None:
    """As on an Ascend machine where CANN's set_env.sh was not sourced: torch loads torch_npu, which fails."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(
        "raise RuntimeError('Failed to load the backend extension: torch_npu.') from ImportError('libhccl.so')"
    )
    (tmp_path / "torch_npu-2.13.0.dist-info").mkdir()
    (tmp_path / "torch_npu-2.13.0.dist-info" / "METADATA").write_text("Name: torch-npu\nVersion: 2.13.0\n")
    done = subprocess.run(
        [sys.executable, "-m", "qwen3_fp8_ascend", "doctor", *(["--json"] if as_json else [])],
        env=os.environ | {"PYTHONPATH": str(tmp_path), "COLUMNS": "300"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (2, "")
    said = "torch does not load: Failed to load the backend extension: torch_npu.: libhccl.so"
    if as_json:
        report = json.loads(done.stdout)
        assert any(what == said and "set_env.sh" in fix for what, fix in report["problems"])
        assert report["backends"] == [] and report["ascend"]["torch-npu"] == "2.13.0"
    else:
        assert said in done.stdout and "source CANN's set_env.sh" in done.stdout


def test_square_brackets_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "installed", lambda: None)
    text, facts = both_forms(doctor.examine())
    assert "pip install 'qwen3-fp8-ascend[cpu]'" in text
    assert ["vLLM is not installed", "on a CPU: pip install 'qwen3-fp8-ascend[cpu]', or run `make venv`"] in facts[
        "problems"
    ]
