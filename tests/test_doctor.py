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
from qwen3_fp8_ascend.backends import ascendc, registry, soc, triton
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
    """A machine with an NPU as the packages and files tell of it: `ascend_machine(chip, backends, **versions)`.

    The Ascend C kernels are built if their backend is usable. `devices`, `cann` and `image` are the number of
    /dev/davinci*, the version of CANN (None: its set_env.sh was not sourced), and the chip of this vLLM-Ascend.
    """

    def examine(
        chip: str | None,
        usable: tuple[str, ...],
        devices: int = 1,
        cann: str | None = "9.1.0",
        image: str | None = None,
        without_npu: bool = False,
        **changes: str | None,
    ) -> doctor.Report:
        monkeypatch.setattr(ascendc, "LIBRARY", tmp_path / ascendc.LIBRARY.name)
        if "ascendc" in usable:
            ascendc.LIBRARY.touch()
        for number in range(devices):
            (tmp_path / f"davinci{number}").touch()
        monkeypatch.setattr(doctor, "DEVICES", tmp_path)
        monkeypatch.setattr(triton, "_current_device_type", lambda: "npu")
        monkeypatch.setattr(doctor, "_vllm_ascend_chip", lambda: image)
        npu = SimpleNamespace(is_available=lambda: chip is not None, get_device_name=lambda: chip)
        monkeypatch.setitem(sys.modules, "torch_npu", SimpleNamespace(npu=npu, __spec__=SimpleNamespace()))
        soc.device_name.cache_clear()
        found = VERSIONS | {name.replace("_", "-"): version for name, version in changes.items()}
        for module in (doctor, versions):
            monkeypatch.setattr(module, "installed_version", found.get)
        toolkit = tmp_path / f"{platform.machine()}-linux"
        toolkit.mkdir(exist_ok=True)
        (toolkit / "ascend_toolkit_install.info").write_text(f"version={cann}\n")
        if cann is None:
            monkeypatch.delenv("ASCEND_HOME_PATH", raising=False)
        else:
            monkeypatch.setenv("ASCEND_HOME_PATH", str(tmp_path))
        (tmp_path / "version.info").write_text("Version=25.5.0\n")
        monkeypatch.setattr(doctor, "DRIVER", tmp_path / "version.info")
        for name in ("ascendc", "triton", "torch_npu"):
            reason = soc.missing_npu() or (None if name in usable else "not on this machine")
            backend = dataclasses.replace(registry.load_backend(name), unusable=lambda reason=reason: reason)
            monkeypatch.setitem(registry.LOADED, name, backend)
        registry.select_backend.cache_clear()
        return doctor.examine(without_npu)

    yield examine
    soc.device_name.cache_clear()
    registry.select_backend.cache_clear()


def both_forms(report: doctor.Report) -> tuple[str, dict[str, Any]]:
    """What people and what programs are told."""
    console = Console(file=io.StringIO(), width=250)
    doctor.render(report, console)
    return console.file.getvalue(), json.loads(json.dumps(report.to_dict()))  # type: ignore[attr-defined]


FUSED = "fused kernel: decoded on vector cores, multiplied by the cube"
SCRATCH = "decode into the shared scratch, then the stock product"
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
    ascend_machine: Machine, chip: str, machines: str, usable: tuple[str, ...],
    w8a8: str, w8a16: str,
) -> None:  # fmt: skip
    """CANN, driver, SoC, torch-npu, vLLM-Ascend, and which backend takes which number of rows."""
    text, facts = both_forms(ascend_machine(chip, usable))
    ascend = facts["ascend"]
    assert ascend["SoC"] == f"{chip}: {machines}" and ascend["driver"] == "25.5.0"
    assert ascend["CANN"].startswith("9.1.0 in ")
    assert (ascend["torch-npu"], ascend["vllm-ascend"]) == ("2.10.0.post4", "0.30.0rc2")
    plans = {
        "ascendc": {"m = 1": "linear kernel", "m <= 64": FUSED, "m > 64": SCRATCH},
        "triton": {"m <= 64": "fused kernel", "m > 64": SCRATCH},
        "torch_npu": {"any": NATIVE},
    }
    for computes, backend in (("npu, w8a8", w8a8), ("npu, w8a16", w8a16)):
        assert facts["serving"][computes] == {"backend": backend, "rows": plans[backend]}
    for shown in (chip, machines, "25.5.0", "9.1.0", "2.10.0.post4", "0.30.0rc2", *plans[w8a8], *plans[w8a8].values()):
        assert shown in text, shown
    assert not any("NPU" in what or "tested" in what or "torch-npu" in what for what, _ in facts["problems"]), facts


@pytest.mark.parametrize(
    ("chip", "found", "reason", "fix"),
    [
        (None, {"devices": 0}, "torch_npu sees no NPU", "--device /dev/davinci0"),
        (None, {"cann": None}, "torch_npu sees no NPU", "source CANN's set_env.sh"),
        (None, {}, "torch_npu sees no NPU", "npu-smi info"),
        ("Ascend310P3", {}, "this NPU is Ascend310P3, on which block FP8 has no path", "another format"),
        ("Ascend910PremiumA", {}, "this NPU is Ascend910PremiumA, on which block FP8 has no path", "another format"),
    ],
    ids=["not in the container", "set_env.sh", "taken", "310P", "910A"],
)
def test_an_ascend_machine_without_a_usable_npu(
    ascend_machine: Machine, chip: str | None, found: dict[str, Any], reason: str, fix: str
) -> None:
    """The first obstacle is named, with what removes that one and not another."""
    text, facts = both_forms(ascend_machine(chip, (), **found))
    assert facts["ascend"]["SoC"].startswith(f"none to use: {reason}")
    ((what, how),) = [p for p in facts["problems"] if "no NPU can be used" in p[0]]
    assert what.startswith(f"vLLM-Ascend is installed, but no NPU can be used: {reason}") and fix in how
    assert what in text and fix in text and "ready" not in text and facts["next"] is None
    fixes = {"--device /dev/davinci0", "source CANN's set_env.sh", "npu-smi info", "another format"}
    assert {other for other in fixes if other in how} <= {fix, *(["npu-smi info"] if found.get("devices") == 0 else [])}
    assert not any(key.startswith("npu") for key in facts["serving"])


def test_a_ready_ascend_machine_is_told_what_to_type_next(
    ascend_machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_vllm_problems", lambda packages: [])  # the plugin may not be installed here
    text, facts = both_forms(ascend_machine("Ascend910B3", ("ascendc",), image="A2"))
    assert (facts["problems"], facts["notes"]) == ([], [])
    assert text.splitlines()[-1].startswith("ready to serve block FP8; next: vllm serve ")
    assert "--quantization ascend" in facts["next"] and "qwen3-fp8-ascend verify" in facts["next"]
    assert facts["ascend"]["Ascend C kernels"] == "built" and facts["ascend"]["devices"] == 1


@pytest.mark.parametrize("chip", ["Ascend910B3", "Ascend910_9392"])
def test_a_machine_that_serves_without_the_ascend_c_kernels_is_told(ascend_machine: Machine, chip: str) -> None:
    """It works, with the second choice: a note, no problem."""
    text, facts = both_forms(ascend_machine(chip, ("triton",)))
    ((what, fix),) = facts["notes"]
    generation = soc.generation_of(chip)
    assert generation and what == f"{generation.name} is served by triton: the Ascend C kernels are not built"
    assert "set_env.sh" in fix and f"note {what}" in text
    assert not any("kernels" in problem for problem, _ in facts["problems"])


def test_ascend_950_needs_no_ascend_c_kernels(ascend_machine: Machine) -> None:
    assert ascend_machine("Ascend950PR_9589", ("torch_npu", "triton")).notes == []


@pytest.mark.parametrize(("image", "problem"), [("A3", True), ("A2", False), (None, False), ("_310P", False)])
def test_an_image_for_another_chip(ascend_machine: Machine, image: str | None, problem: bool) -> None:
    report = ascend_machine("Ascend910B3", ("ascendc",), image=image)
    said = [(what, fix) for what, fix in report.problems if "was built for" in what]
    assert bool(said) == problem
    if problem:
        assert said[0][0] == "vLLM-Ascend was built for A3, this NPU is Ascend910B3 (A2)" and "-a5" in said[0][1]


def test_what_vllm_ascend_was_built_for_is_read_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "vllm_ascend"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "vllm_ascend", raising=False)
    assert doctor._vllm_ascend_chip() is None
    (package / "_build_info.py").write_text("# Auto-generated file\n__device_type__ = 'A3'\n")
    assert doctor._vllm_ascend_chip() == "A3"


@pytest.mark.parametrize(
    ("cann", "old"), [("8.2.RC1", True), ("8.5.0", False), ("9.2.0_20260930220649", False), ("master", False)]
)
def test_a_cann_that_is_too_old(ascend_machine: Machine, cann: str, old: bool) -> None:
    report = ascend_machine("Ascend910B3", ("ascendc",), cann=cann)
    assert any(f"CANN {cann} is older than 8.5" in what for what, _ in report.problems) == old


def test_while_an_image_is_built(ascend_machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """No NPU and no driver is what is expected then; missing kernels, or a wrong pair, are told all the same."""
    monkeypatch.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    monkeypatch.setattr(doctor, "_vllm_problems", lambda packages: [])
    text, facts = both_forms(ascend_machine(None, ("ascendc",), devices=0, image="A2", without_npu=True))
    assert (facts["problems"], facts["notes"]) == ([], [])
    assert text.splitlines()[-1] == "ready for a machine with an NPU; next: qwen3-fp8-ascend doctor, there"
    ascendc.LIBRARY.unlink()
    report = ascend_machine(None, (), devices=0, image="A2", without_npu=True)
    assert [what for what, _ in report.notes] == ["A2 is served by triton at most: the Ascend C kernels are not built"]
    report = ascend_machine(None, ("ascendc",), devices=0, without_npu=True, torch_npu="2.9.0")
    assert any("torch-npu 2.9.0 is beside torch" in what for what, _ in report.problems) and report.next is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"torch_npu": "2.9.0"}, "torch-npu 2.9.0 is beside torch 2.10.0+cpu"),
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


@pytest.mark.parametrize(
    ("cann", "fix"), [({}, "source CANN's set_env.sh"), ({"ASCEND_HOME_PATH": "/opt/cann"}, "mount /usr/local/Ascend")]
)
@pytest.mark.parametrize("as_json", [True, False], ids=["json", "human"])
def test_a_torch_that_does_not_load_is_a_problem_not_a_traceback(
    tmp_path: Path, as_json: bool, cann: dict[str, str], fix: str
) -> None:
    """As on an Ascend machine where CANN's set_env.sh was not sourced, or a container without the driver's libraries:
    torch loads torch_npu, which fails."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(
        "raise RuntimeError('Failed to load the backend extension: torch_npu.') from ImportError('libhccl.so')"
    )
    (tmp_path / "torch_npu-2.13.0.dist-info").mkdir()
    (tmp_path / "torch_npu-2.13.0.dist-info" / "METADATA").write_text("Name: torch-npu\nVersion: 2.13.0\n")
    done = subprocess.run(
        [sys.executable, "-m", "qwen3_fp8_ascend", "doctor", *(["--json"] if as_json else [])],
        env={k: v for k, v in os.environ.items() if k != "ASCEND_HOME_PATH"}
        | {"PYTHONPATH": str(tmp_path), "COLUMNS": "500", **cann},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (2, "")
    said = "torch does not load: Failed to load the backend extension: torch_npu.: libhccl.so"
    if as_json:
        report = json.loads(done.stdout)
        assert any(what == said and fix in how for what, how in report["problems"])
        assert report["backends"] == [] and report["ascend"]["torch-npu"] == "2.13.0"
    else:
        assert said in done.stdout and fix in done.stdout


def test_square_brackets_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "installed", lambda: None)
    text, facts = both_forms(doctor.examine())
    assert "pip install 'qwen3-fp8-ascend[cpu]'" in text
    assert ["vLLM is not installed", "on a CPU: pip install 'qwen3-fp8-ascend[cpu]', or run `make venv`"] in facts[
        "problems"
    ]
